"""Momentum DeltaNet: a gated DeltaNet whose memory moves by a fading sum of its errors, not by the last error alone.

    q, k, v = silu(conv(W_qkv x)),  q and k of unit length
    y       = W_o [ norm(momentum_delta_rule(q / sqrt K, k, v, p, alpha, mu, beta, eta)) * silu(W_z x) ]
    alpha   = exp(-exp(a_log) softplus(W_a x + dt_bias))        fading of the memory
    mu      = exp(-exp(mu_log) softplus(W_m x + mu_bias))       fading of the errors gathered
    b, e    = W_b x, W_e x

    gates "mean":     beta = sigmoid(b)                   eta = (1 - mu) sigmoid(e)
    gates "coupled":  beta = r^2 / (1 + r^2) sigmoid(b)   eta = 1 + tanh(e / sqrt D)   alpha <- alpha / (1 + r^2)
                      r = eta exp(ratio_log)

B batch   T time   D model width   H key heads   HV value heads (a multiple of H)   K key width   V value width
Source: Huang et al. 2026, arXiv 2605.05838, with the released code (HuuYuLong/MomentumDeltaNet) for what it leaves
open: "coupled" and p = alpha k are its. Not taken from there: its q - d k before q is made unit, its floor of -2 under
log mu (the op here is exact without one), its draws of a, mu and r (see `reset_parameters`).

"mean" is ours: what is gathered is a mean of errors, so that a slower mu alone makes no larger steps, and mu = 0 is
Gated DeltaNet with the step beta eta. Without the 1 - mu the memory diverges: with eta = beta = 1/2 and alpha = 0.97,
by 17 orders of magnitude in 4096 tokens of 32 key channels (1 of 128) where errors are gathered with a half-life of
16 tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.delta_inputs import delta_inputs
from seqzoo.kernels.momentum_delta_rule import momentum_delta_rule
from seqzoo.layers.conv import CausalConv
from seqzoo.layers.heads import Heads
from seqzoo.layers.linear import Linear
from seqzoo.layers.norm import GatedRMSNorm
from seqzoo.layers.precision import wide
from seqzoo.layers.span import Span

GATES = ("mean", "coupled")


class MomentumDeltaNetState(NamedTuple):
    conv: Tensor  # [B, conv_width - 1, 2HK + HV V] the convolution's last inputs, dtype of x
    memory: Tensor  # [B, HV, 2, K, V] the memory and the errors gathered, fp32


class MomentumDeltaNet(nn.Module):
    """Args:
    num_key_heads, num_value_heads: heads of q and k, and of v, which share a key head in equal groups.
    key_width, value_width: channels per head.
    conv_width: [tokens] length of the causal convolution of q, k and v.
    gates: "mean" or "coupled", see above.
    ask_faded: the error is that of the faded memory, p = alpha k, as in Gated DeltaNet; else of the memory, p = k.
    bias: of the projections of q, k and v.
    out_bias: of the projection of the output.

    Raises:
        ValueError: a size below 1, num_value_heads no multiple of num_key_heads, other gates.
    """

    PRECISE = ("bame_proj",)  # see `layers/float8.py`

    def __init__(
        self,
        hidden_size: int,
        *,
        num_key_heads: int,
        num_value_heads: int,
        key_width: int,
        value_width: int,
        conv_width: int = 4,
        gates: str = "mean",
        ask_faded: bool = True,
        bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = dict(num_key_heads=num_key_heads, key_width=key_width, value_width=value_width, conv_width=conv_width)
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"momentum_deltanet: {name}: expected a whole number, at least 1, got {size!r}")
        if not isinstance(num_value_heads, int) or num_value_heads < 1 or num_value_heads % num_key_heads:
            raise ValueError(
                f"momentum_deltanet: num_value_heads: expected a multiple of num_key_heads={num_key_heads}, "
                f"got {num_value_heads!r}"
            )
        if gates not in GATES:
            raise ValueError(f"momentum_deltanet: gates: expected one of {GATES}, got {gates!r}")
        self.H, self.HV, self.K, self.V = num_key_heads, num_value_heads, key_width, value_width
        self.sizes = [num_key_heads * key_width, num_key_heads * key_width, num_value_heads * value_width]
        self.gates, self.ask_faded = gates, ask_faded
        self.qkv_proj = Linear(hidden_size, sum(self.sizes), bias=bias)
        self.gate_proj = Linear(hidden_size, self.sizes[2], bias=False)
        self.bame_proj = Linear(hidden_size, 4 * num_value_heads, bias=False)  # b, a, m, e
        self.conv = CausalConv(sum(self.sizes), conv_width)
        self.a_log = nn.Parameter(torch.empty(num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_value_heads))
        self.mu_log = nn.Parameter(torch.empty(num_value_heads))
        self.mu_bias = nn.Parameter(torch.empty(num_value_heads))
        self.ratio_log = nn.Parameter(torch.empty(num_value_heads)) if gates == "coupled" else None
        self.norm = GatedRMSNorm(value_width, norm_eps)
        self.out_proj = Linear(self.sizes[2], hidden_size, bias=out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fading of the memory as in Gated DeltaNet, 0.001 to 1.6 nats per token, log-uniform.

        The errors' half-life log-uniform from 1 to 64 tokens. r log-uniform from 0.03 to 1: the memory's fading that
        comes with it is 0.001 to 0.7 nats per token. (The released code draws r uniform from 0 to 4: most heads would
        lose more than half of the memory at each token.)

        Own parameters only; `nn.init.*` only, so a checkpoint just loaded is never overwritten.
        """
        nn.init.uniform_(self.a_log, 0.0, math.log(16.0))
        nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1))  # softplus(x) is e^x to 5 % down there
        nn.init.uniform_(self.mu_log, math.log(math.log(2.0) / 64.0), math.log(math.log(2.0)))
        nn.init.constant_(self.mu_bias, math.log(math.e - 1.0))  # softplus of it is 1
        if self.ratio_log is not None:
            nn.init.uniform_(self.ratio_log, math.log(0.03), 0.0)

    def heads(self) -> Heads:
        """How it is dealt over processes."""
        qkv = dict.fromkeys(("qkv_proj.weight", "qkv_proj.bias", "conv.weight"), self.sizes)
        return Heads(("num_key_heads", "num_value_heads"), qkv | {"bame_proj.weight": 4 * [self.HV]})

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> MomentumDeltaNetState:
        return MomentumDeltaNetState(
            conv=torch.zeros(batch, self.conv.width - 1, sum(self.sizes), device=device, dtype=dtype),
            memory=torch.zeros(batch, self.HV, 2, self.K, self.V, device=device),
        )

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence keeps, however long it is."""
        return (self.conv.width - 1) * sum(self.sizes) * dtype.itemsize + 4 * self.HV * 2 * self.K * self.V

    def flops(self, context: int) -> int:
        """Forward, per token, of the recurrence and the matrices; a multiply-add is 2. `context` does not matter."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 2 * matrices + 12 * self.HV * self.K * self.V  # asked; errors fade, gain one; fades, moves; is read

    def forward(
        self, x: Tensor, span: Span | None = None, state: MomentumDeltaNetState | None = None
    ) -> tuple[Tensor, MomentumDeltaNetState | None]:
        """x [B, T, D] -> y [B, T, D] and, if a state came in, the next one."""
        starts = None if span is None else span.starts
        qkv = self.qkv_proj(x)
        if span is not None and span.valid is not None:  # k = v = 0: padding on the left writes nothing
            qkv = qkv * span.valid[..., None]
        past, memory = (None, None) if state is None else state
        qkv, conv = self.conv(qkv, past, starts)
        ba, me = self.bame_proj(x).chunk(2, dim=-1)
        q, k, v, log_alpha, beta = delta_inputs(
            qkv, ba, self.a_log, self.dt_bias, num_key_heads=self.H, key_width=self.K
        )
        log_alpha, log_mu, beta, eta = self._gates(log_alpha, beta, *wide(me).chunk(2, dim=-1), x.shape[-1])
        p = log_alpha.exp()[..., None] * k.repeat_interleave(self.HV // self.H, dim=2) if self.ask_faded else k
        o, memory = momentum_delta_rule(q, k, v, p, log_alpha, log_mu, beta, eta, state=memory, starts=starts)
        z = self.gate_proj(x).unflatten(-1, (self.HV, -1))
        y = self.out_proj(self.norm(o.to(x.dtype), z).flatten(-2))
        return y, None if state is None else MomentumDeltaNetState(conv, memory)

    def _gates(self, log_alpha: Tensor, beta: Tensor, m: Tensor, e: Tensor, D: int) -> tuple[Tensor, ...]:
        """[B, T, HV] each -> log alpha, log mu, beta, eta, in fp32."""
        log_mu = -wide(self.mu_log).exp() * F.softplus(m + self.mu_bias)
        if self.ratio_log is None:
            return log_alpha, log_mu, beta, -torch.expm1(log_mu) * e.sigmoid()
        eta = 1 + torch.tanh(e * D**-0.5)
        squared = (eta * wide(self.ratio_log).exp()).square()
        return log_alpha - torch.log1p(squared), log_mu, beta * squared / (1 + squared), eta
