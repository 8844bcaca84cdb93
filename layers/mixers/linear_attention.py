"""Linear attention: a key-value memory that is added to, may fade, and serves all query heads of a group.

    q, k, v = W_q x, W_k x, W_v x                       then silu(conv(.)) if conv_width
    q, k    = feature(q), feature(k)                    then turned by their positions if rotary_width
    S_t     = diag(exp g_t) S_{t-1} + k_t v_t^T         one memory per key head
    o_t     = S_t^T q_t / sqrt K                        if `normalise`, divided by z_t^T q_t / sqrt K with
                                                        z_t = diag(exp g_t) z_{t-1} + k_t
    y       = W_o [ norm(o) * silu(W_z x) ]             the norm of each head if output_norm, the gate if output_gate

    decay     g, natural log                                                 source
    none      0                                                              arXiv 2006.16236
    fixed     ln(1 - 2^(-5 - head)), not learned                             RetNet, arXiv 2307.08621, eq. 8
    lightning -(8 head / G) (1 - decay_depth), not learned                   TransNormerLLM, arXiv 2307.14995; Lightning
                                                                             Attention-2, arXiv 2401.04658
    head      logsigmoid(w x + b) / decay_scale, per key head                arXiv 2103.02143, with the scale of GLA
    channel   logsigmoid(W_2 W_1 x + b) / decay_scale, per key channel       GLA, arXiv 2312.06635, sec. 4.4
    key       ln(1 - k), per key channel; k a sigmoid                        HGRN2, arXiv 2404.07904, no lower bound

B batch   T time   D model width   H query heads   G key heads   K key width   V value width
Grouped heads with relu features and a decay per channel are SpikingBrain-7B's (arXiv 2509.05276, sec. 3; its released
code repeats keys, values and decays for every query head, the numbers are the same).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.layers.conv import CausalConv
from seqzoo.layers.heads import Heads
from seqzoo.layers.linear import Linear
from seqzoo.layers.norm import NORMS, GatedRMSNorm, RMSNorm, check_eps
from seqzoo.layers.precision import wide
from seqzoo.layers.rope import rotate, turns
from seqzoo.layers.span import Span

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "elu": lambda x: F.elu(x) + 1.0,  # arXiv 2006.16236, eq. 7
    "softmax": lambda x: x.softmax(-1),
}
DECAYS = ("none", "fixed", "lightning", "head", "channel", "key")
LEAST = 1e-6  # of a denominator; under it there is hardly anything to divide


class LinearAttentionState(NamedTuple):
    conv: Tensor  # [B, conv_width - 1, HK + GK + GV] the convolution's last inputs, dtype of x; [B, 0, ..] without one
    memory: Tensor  # [B, G, K, V] fp32; [B, G, K, V + 1] where normalised, the last column is z
    seen: Tensor  # [B] int64, how many tokens came so far


class LinearAttention(nn.Module):
    """Args:
    num_heads, num_kv_heads: query heads, and key and value heads, which divide them; the memories are the latter's.
    key_width, value_width: channels per head.
    feature: of q and k after projection and convolution: identity, relu, sigmoid, elu (elu + 1), or softmax over a
        head's channels.
    decay: none, fixed, lightning, head, channel or key, as above; heads, of keys, are counted from 0.
    decay_depth: of "lightning", where in the model the layer stands, 0 the lowest, 1 the end: l / L there.
    decay_rank: width between the two matrices of decay="channel".
    decay_scale: what the log decays of "head" and "channel" are divided by; the larger, the longer the memory.
    normalise: divide by the sum of the weights, as softmax attention does.
    rotary_width: channels per head that are turned, the first ones; 0 is none.
    rope_theta: base of the rotary frequencies.
    conv_width: [tokens] of a causal convolution with silu of q, k and v; 0 is none.
    output_norm: RMS norm of each head's output, one weight for all heads.
    output_gate: times a silu of the input, per channel, after the norm.
    bias: of the projections of q, k and v.
    out_bias: of the projection of the output.
    qk_norm: of each head of q and k before the feature: zero_centred or rms; None is none.

    Raises:
        ValueError: sizes or options that do not fit each other.
    """

    PRECISE = ("decay_proj", "decay_down", "decay_up")  # see `layers/float8.py`

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        key_width: int,
        value_width: int,
        feature: str = "identity",
        decay: str = "none",
        decay_rank: int = 16,
        decay_scale: float = 16.0,
        decay_depth: float = 0.0,
        normalise: bool = False,
        rotary_width: int = 0,
        rope_theta: float = 10_000.0,
        conv_width: int = 0,
        output_norm: bool = True,
        output_gate: bool = False,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, key_width=key_width, value_width=value_width)
        for name, size in (sizes | dict(decay_rank=decay_rank)).items():
            _expect(isinstance(size, int) and size >= 1, name, "a whole number, 1 or more", size)
        _expect(num_heads % num_kv_heads == 0, "num_heads", f"a multiple of num_kv_heads={num_kv_heads}", num_heads)
        _expect(feature in FEATURES, "feature", f"one of {list(FEATURES)}", feature)
        _expect(decay in DECAYS, "decay", f"one of {list(DECAYS)}", decay)
        _expect(decay != "key" or feature == "sigmoid", "feature", "sigmoid, for decay=key is ln(1 - k)", feature)
        _expect(decay_scale > 0, "decay_scale", "more than 0, or memories grow", decay_scale)
        _expect(0 <= decay_depth <= 1, "decay_depth", "0 to 1", decay_depth)
        _expect(rope_theta > 0, "rope_theta", "more than 0", rope_theta)
        even = rotary_width % 2 == 0 and 0 <= rotary_width <= key_width
        _expect(even, "rotary_width", f"an even number from 0 to key_width={key_width}", rotary_width)
        _expect(isinstance(conv_width, int) and conv_width >= 0, "conv_width", "0 (none) or more", conv_width)
        check_eps(norm_eps)
        _expect(qk_norm in (None, "zero_centred", "rms"), "qk_norm", "zero_centred, rms or null", qk_norm)
        positive = feature != "identity" and not rotary_width
        asked = f"feature={feature}, rotary_width={rotary_width}"
        _expect(not normalise or positive, "normalise", "False, or features that are >= 0 and not turned", asked)
        self.H, self.G, self.K, self.V = num_heads, num_kv_heads, key_width, value_width
        self.first_head, self.all_heads = 0, num_kv_heads
        self.feature, self.decay, self.normalise = feature, decay, normalise
        self.decay_scale, self.decay_depth = decay_scale, decay_depth
        self.rotary_width, self.theta = rotary_width, rope_theta
        self.sizes = [num_heads * key_width, num_kv_heads * key_width, num_kv_heads * value_width]
        self.q_proj, self.k_proj, self.v_proj = (Linear(hidden_size, size, bias=bias) for size in self.sizes)
        self.conv = CausalConv(sum(self.sizes), conv_width) if conv_width else None
        self.decay_proj = Linear(hidden_size, num_kv_heads) if decay == "head" else None
        self.decay_down = Linear(hidden_size, decay_rank, bias=False) if decay == "channel" else None
        self.decay_up = Linear(decay_rank, num_kv_heads * key_width) if decay == "channel" else None
        self.gate_proj = Linear(hidden_size, num_heads * value_width, bias=False) if output_gate else None
        norm = GatedRMSNorm if output_gate else partial(RMSNorm, zero_centred=False)
        self.norm = norm(value_width, norm_eps) if output_norm else None
        self.out_proj = Linear(num_heads * value_width, hidden_size, bias=out_bias)
        norm = lambda: nn.Identity() if qk_norm is None else NORMS[qk_norm](key_width, norm_eps)
        self.q_norm, self.k_norm = norm(), norm()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A half-life of decay_scale tokens, whatever the input; small matrices, as GLA's released code draws them.

        Own parameters only; `nn.init.*` only, so a checkpoint just loaded is never overwritten.
        """
        for part in (self.decay_proj, self.decay_down, self.decay_up):
            if part is not None:
                nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def heads(self) -> Heads:
        """How it is dealt over processes."""
        return Heads(("num_heads", "num_kv_heads"), {"conv.weight": self.sizes})

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> LinearAttentionState:
        kept = 0 if self.conv is None else self.conv.width - 1
        return LinearAttentionState(
            conv=torch.zeros(batch, kept, sum(self.sizes), device=device, dtype=dtype),
            memory=torch.zeros(batch, self.G, self.K, self.V + self.normalise, device=device),
            seen=torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence keeps, however long it is."""
        kept = 0 if self.conv is None else (self.conv.width - 1) * sum(self.sizes)
        return kept * dtype.itemsize + 4 * self.G * self.K * (self.V + self.normalise) + 8

    def flops(self, context: int) -> int:
        """Forward, per token, of the recurrence and the matrices; a multiply-add is 2. `context` does not matter."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        passes = self.H + self.G * (1 if self.decay == "none" else 2)  # read; added to, and faded
        return 2 * matrices + 2 * passes * self.K * (self.V + self.normalise)

    def forward(
        self, x: Tensor, span: Span | None = None, state: LinearAttentionState | None = None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        """x [B, T, D] -> y [B, T, D] and, if a state came in, the next one."""
        past, memory, seen = (None, None, 0) if state is None else state
        span = Span.whole(x, seen if state is None else seen[:, None]) if span is None else span
        q, k, v, past = self._projected(x, span, past)
        g = self._log_decay(x, k)
        q, k = (FEATURES[self.feature](y) for y in (q, k))
        if self.rotary_width:
            turn = turns(span.positions, self.rotary_width, self.theta, x.dtype)
            q, k = rotate(q, *turn), rotate(k, *turn)
        if self.normalise or v.dtype == torch.float16:  # sums over all tokens: beyond fp16's range, and so is d(1 / z)
            v = wide(v)
        if self.normalise:
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
        if span.valid is not None:  # nothing is written by v = 0, so that decays of padding do not matter either
            v = v * span.valid[..., None, None]
        o, memory = linear_attention(q * self.K**-0.5, k, v, g, state=memory, starts=span.starts)
        if self.normalise:
            o = o[..., :-1] / o[..., -1:].clamp(min=LEAST)
        y = self.out_proj(self._output(o, x).to(x.dtype).flatten(-2))
        return y, None if state is None else LinearAttentionState(past, memory, seen + x.shape[1])

    def _projected(self, x: Tensor, span: Span, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [B, T, H, K], k [B, T, G, K] and v [B, T, G, V] before features, and the convolution's next past."""
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is not None:
            qkv = torch.cat(parts, dim=-1)
            if span.valid is not None:  # a bias would reach the first real tokens
                qkv = qkv * span.valid[..., None]
            qkv, past = self.conv(qkv, past, span.starts)
            parts = qkv.split(self.sizes, dim=-1)
        q, k, v = (y.unflatten(-1, (heads, -1)) for y, heads in zip(parts, (self.H, self.G, self.G), strict=True))
        return self.q_norm(q), self.k_norm(k), v, past

    def _log_decay(self, x: Tensor, k: Tensor) -> Tensor | None:
        """None, [B, T, G] or [B, T, G, K]; k before its feature."""
        if self.decay == "none":
            return None
        if self.decay in ("fixed", "lightning"):
            head = self.first_head + torch.arange(self.G, device=x.device, dtype=torch.float32)
            g = torch.log1p(-torch.exp2(-5.0 - head))
            g = g if self.decay == "fixed" else head * (-8.0 / self.all_heads * (1.0 - self.decay_depth))
            return g.expand(*x.shape[:2], -1)
        if self.decay == "key":
            return F.logsigmoid(-wide(k))
        if self.decay == "head":
            return F.logsigmoid(wide(self.decay_proj(x))) / self.decay_scale
        g = self.decay_up(self.decay_down(x)).unflatten(-1, (self.G, self.K))
        return F.logsigmoid(wide(g)) / self.decay_scale

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, T, H, V], normed and gated."""
        if self.gate_proj is None:
            return o if self.norm is None else self.norm(o)
        z = self.gate_proj(x).unflatten(-1, (self.H, -1))
        return o * F.silu(z) if self.norm is None else self.norm(o, z)


def _expect(fits: bool, name: str, expected: str, got: object) -> None:
    if not fits:
        raise ValueError(f"linear_attention: {name}: expected {expected}, got {got}")
