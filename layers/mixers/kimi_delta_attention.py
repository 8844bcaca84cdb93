"""Kimi Delta Attention: Gated DeltaNet in which every key channel of the memory fades at a rate of its own.

    q, k, v = silu(conv(W_qkv x)),  q and k of unit length
    g       = -exp(a_log) softplus(W_fb W_fa x + dt_bias)      log decay per token and key channel
    beta    = sigmoid(W_b x)                                   step size
    y       = W_o [ norm(kimi_delta_rule(q / sqrt K, k, v, g, beta)) * sigmoid(W_gb W_ga x) ]

B batch   T time   D model width   H heads   K key width   V value width
Source: Kimi Team 2025, arXiv 2510.26692, section 4; the released Kimi-Linear-48B-A3B for what it leaves open.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.kimi_delta_rule import kimi_delta_rule
from seqzoo.layers.conv import CausalConv
from seqzoo.layers.heads import Heads
from seqzoo.layers.linear import Linear
from seqzoo.layers.norm import RMSNorm
from seqzoo.layers.precision import wide
from seqzoo.layers.span import Span

_EPS = 1e-6  # of the square that q and k are divided by the root of


class KimiDeltaAttentionState(NamedTuple):
    conv: Tensor  # [B, conv_width - 1, 2HK + HV] the convolution's last inputs, dtype of x
    memory: Tensor  # [B, H, K, V] fp32


class KimiDeltaAttention(nn.Module):
    """Args:
    num_heads: heads.
    key_width, value_width: channels per head.
    conv_width: [tokens] length of the causal convolution of q, k and v.
    decay_rank, gate_rank: channels between the two matrices of decays and of gates; None is key_width, value_width.
    bias: of the projections of q, k and v.
    out_bias: of the projection of the output.

    Raises:
        ValueError: a size below 1.
    """

    PRECISE = ("beta_proj", "decay_down_proj", "decay_up_proj")  # see `layers/float8.py`

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        key_width: int,
        value_width: int,
        conv_width: int = 4,
        decay_rank: int | None = None,
        gate_rank: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        decay_rank = key_width if decay_rank is None else decay_rank
        gate_rank = value_width if gate_rank is None else gate_rank
        sizes = dict(num_heads=num_heads, key_width=key_width, value_width=value_width, conv_width=conv_width)
        for name, size in (sizes | dict(decay_rank=decay_rank, gate_rank=gate_rank)).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"kimi_delta_attention: {name}: expected a whole number, at least 1, got {size!r}")
        self.H, self.K, self.V = num_heads, key_width, value_width
        self.sizes = [num_heads * key_width, num_heads * key_width, num_heads * value_width]
        self.qkv_proj = Linear(hidden_size, sum(self.sizes), bias=bias)
        self.conv = CausalConv(sum(self.sizes), conv_width)
        self.decay_down_proj = Linear(hidden_size, decay_rank, bias=False)
        self.decay_up_proj = Linear(decay_rank, num_heads * key_width, bias=False)
        self.a_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads * key_width))
        self.beta_proj = Linear(hidden_size, num_heads, bias=False)
        self.gate_down_proj = Linear(hidden_size, gate_rank, bias=False)
        self.gate_up_proj = Linear(gate_rank, num_heads * value_width, bias=False)
        self.norm = RMSNorm(value_width, norm_eps, zero_centred=False)
        self.out_proj = Linear(self.sizes[2], hidden_size, bias=out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decays of 0.001 to 1.6 nats per token, log-uniform, as in Gated DeltaNet: each channel its own.

        Own parameters only; `nn.init.*` only, so a checkpoint just loaded is never overwritten.
        """
        nn.init.uniform_(self.a_log, 0.0, math.log(16.0))
        nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1))  # softplus(x) is e^x to 5 % down there

    def heads(self) -> Heads:
        """How it is dealt over processes."""
        joined = ("qkv_proj.weight", "qkv_proj.bias", "conv.weight")
        return Heads(("num_heads",), dict.fromkeys(joined, self.sizes))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> KimiDeltaAttentionState:
        return KimiDeltaAttentionState(
            conv=torch.zeros(batch, self.conv.width - 1, sum(self.sizes), device=device, dtype=dtype),
            memory=torch.zeros(batch, self.H, self.K, self.V, device=device),
        )

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence keeps, however long it is."""
        return (self.conv.width - 1) * sum(self.sizes) * dtype.itemsize + 4 * self.H * self.K * self.V

    def flops(self, context: int) -> int:
        """Forward, per token, of the recurrence and the matrices; a multiply-add is 2. `context` does not matter."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 2 * matrices + 8 * self.H * self.K * self.V  # the memory fades, is read, corrected, and read

    def forward(
        self, x: Tensor, span: Span | None = None, state: KimiDeltaAttentionState | None = None
    ) -> tuple[Tensor, KimiDeltaAttentionState | None]:
        """x [B, T, D] -> y [B, T, D] and, if a state came in, the next one."""
        starts = None if span is None else span.starts
        qkv = self.qkv_proj(x)
        if span is not None and span.valid is not None:  # k = v = 0: padding on the left writes nothing
            qkv = qkv * span.valid[..., None]
        past, memory = (None, None) if state is None else state
        qkv, conv = self.conv(qkv, past, starts)
        q, k, v = (part.unflatten(-1, (self.H, -1)) for part in qkv.split(self.sizes, dim=-1))
        q, k = _unit(q) * self.K**-0.5, _unit(k)
        decay = wide(self.decay_up_proj(self.decay_down_proj(x))) + self.dt_bias
        g = -wide(self.a_log).exp()[:, None] * F.softplus(decay).unflatten(-1, (self.H, -1))
        beta = wide(self.beta_proj(x)).sigmoid()
        o, memory = kimi_delta_rule(q, k, v, g, beta, state=memory, starts=starts)
        gate = wide(self.gate_up_proj(self.gate_down_proj(x))).unflatten(-1, (self.H, -1)).sigmoid()
        y = self.out_proj((self.norm(wide(o)) * gate).to(x.dtype).flatten(-2))
        return y, None if state is None else KimiDeltaAttentionState(conv, memory)


def _unit(x: Tensor) -> Tensor:
    """Each head's channels as a vector of length one, in fp32."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)
