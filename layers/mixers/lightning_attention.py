"""Lightning attention as MiniMax has it: linear attention in which every head fades at a rate of its own, for good.

    q, k, v = silu(W_qkv x)
    S_t     = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t         s_h = slope 2^(-8 h / H), heads h from 1 to H
    y       = W_o [ sigmoid(W_g x) * norm(o) ]                         the norm is of all heads as one

Source: Qin et al. 2024, arXiv 2401.04658; MiniMax-01, arXiv 2501.08313, whose layers have slopes falling with depth.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.layers.linear import Linear
from seqzoo.layers.norm import RMSNorm, check_eps
from seqzoo.layers.span import Span


class LightningAttentionState(NamedTuple):
    memory: Tensor  # [B, H, K, K] fp32


class LightningAttention(nn.Module):
    """Args:
    num_heads, head_width: heads, and channels of q, k and v in each.
    slope: of all rates; MiniMax's layer l of L has 1 - l / (L - 1).
    bias: of the projections of q, k and v.
    out_bias: of the projection of the output.

    Raises:
        ValueError: sizes below 1, or a slope below 0.
    """

    def __init__(
        self, hidden_size: int, *, num_heads: int, head_width: int, slope: float = 1.0, bias: bool = False,
        out_bias: bool = False, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in dict(num_heads=num_heads, head_width=head_width).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"lightning_attention: {name}: expected a whole number, at least 1, got {size!r}")
        if not slope >= 0:
            raise ValueError(f"lightning_attention: slope: expected 0 or more, or memories grow, got {slope!r}")
        check_eps(norm_eps)
        self.H, self.K, self.slope = num_heads, head_width, slope
        width = num_heads * head_width
        self.q_proj, self.k_proj, self.v_proj = (Linear(hidden_size, width, bias=bias) for _ in range(3))
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.norm = RMSNorm(width, norm_eps, zero_centred=False)
        self.out_proj = Linear(width, hidden_size, bias=out_bias)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> LightningAttentionState:
        return LightningAttentionState(torch.zeros(batch, self.H, self.K, self.K, device=device))

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence keeps, however long it is."""
        return 4 * self.H * self.K * self.K

    def flops(self, context: int) -> int:
        """Forward, per token, of the recurrence and the matrices; a multiply-add is 2. `context` does not matter."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 2 * matrices + 6 * self.H * self.K * self.K  # the memory fades, is added to, and read

    def forward(
        self, x: Tensor, span: Span | None = None, state: LightningAttentionState | None = None
    ) -> tuple[Tensor, LightningAttentionState | None]:
        """x [B, T, D] -> y [B, T, D] and, if a state came in, the next one."""
        q, k, v = (F.silu(proj(x)).unflatten(-1, (self.H, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if span is not None and span.valid is not None:  # nothing is written by v = 0
            v = v * span.valid[..., None, None]
        head = torch.arange(1, self.H + 1, device=x.device, dtype=torch.float32)
        g = (-self.slope * torch.exp2(-8.0 / self.H * head)).expand(*x.shape[:2], -1)
        memory, starts = None if state is None else state.memory, None if span is None else span.starts
        o, memory = linear_attention(q, k, v, g, state=memory, starts=starts)
        y = self.out_proj(self.norm(o.to(x.dtype).flatten(-2)) * self.gate_proj(x).sigmoid())
        return y, None if state is None else LightningAttentionState(memory)
