"""OVQ attention: softmax attention over the open chunk's tokens, and over running means of all before them.

    q, k    = unit(W_q x), unit(W_k x)       v = W_v x       no positions
    y       = W_o [ ovq_attention(q, k, v, beta sqrt K) * sigmoid(W_g x) ]      the gate only if `output_gate`

beta is learned, one per query head, from 1. Whether the paper's is learned, and holds sqrt K, is open: this is a
re-implementation's choice (arXiv 2605.09877); for a fixed one, `requires_grad_(False)`.

It keeps N means per key head however long the sequence is; made to stand between layers of sliding-window attention,
which know positions.

B batch   T new tokens   H query heads   G key heads   K head width   N slots
Source: Alonso, Figliolia & Millidge 2026, arXiv 2602.03922; what is taken from elsewhere: `kernels/ovq_attention`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.ovq_attention import OVQRule, OVQState, ovq_attention
from seqzoo.layers.heads import Heads
from seqzoo.layers.linear import Linear
from seqzoo.layers.precision import wide
from seqzoo.layers.span import Span


class OVQAttention(nn.Module):
    """Args:
    num_heads, num_kv_heads: query heads, and key and value heads, which divide them and have a memory each.
    head_width: channels per head.
    chunk: [tokens] seen exactly, 1 to so many, before they are merged into the means. Part of what the layer computes.
    slots: N, means per key head, at most; with schedule "min" and no fewer than tokens it is full attention.
    schedule .. detach: see `seqzoo.kernels.ovq_attention.OVQRule`.
    output_gate: the heads' outputs are multiplied by a sigmoid of the input, per channel.
    bias: all projections have one.
    norm_eps: the least length a query or key is divided by.

    Raises:
        ValueError: sizes that do not fit each other, or an option that is none.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        chunk: int,
        slots: int,
        schedule: str = "plateau",
        horizon: int | None = None,
        first_chunk: str = "farthest",
        similarity: str = "dot",
        choice: str = "novel",
        step: float | None = None,
        log_count: bool = True,
        norm_correction: bool = False,
        renormalise: bool = False,
        detach: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, size in dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_width=head_width).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"ovq_attention: {name}: expected a whole number, 1 or more, got {size!r}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"ovq_attention: num_heads: expected a multiple of num_kv_heads={num_kv_heads}, got {num_heads}"
            )
        if not (isinstance(norm_eps, int | float) and norm_eps > 0):
            raise ValueError(f"ovq_attention: norm_eps: expected more than 0, got {norm_eps!r}")
        self.rule = OVQRule(
            chunk=chunk,
            slots=slots,
            schedule=schedule,
            horizon=horizon,
            first_chunk=first_chunk,
            similarity=similarity,
            choice=choice,
            step=step,
            log_count=log_count,
            norm_correction=norm_correction,
            renormalise=renormalise,
            detach=detach,
        )
        self.H, self.G, self.K, self.eps = num_heads, num_kv_heads, head_width, norm_eps
        self.q_proj = Linear(hidden_size, num_heads * head_width, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_width, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_width, bias=bias)
        self.gate_proj = Linear(hidden_size, num_heads * head_width, bias=bias) if output_gate else None
        self.out_proj = Linear(num_heads * head_width, hidden_size, bias=bias)
        self.beta = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Own parameters only."""
        nn.init.ones_(self.beta)

    def heads(self) -> Heads:
        """How it is dealt over processes."""
        return Heads(("num_heads", "num_kv_heads"))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> OVQState:
        return OVQState.empty(batch, self.G, self.K, self.K, self.rule, device=device, dtype=dtype)

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence keeps, however long it is."""
        means, pending = self.rule.slots * (2 * self.K + 1), (self.rule.chunk - 1) * 2 * self.K
        return self.G * (torch.promote_types(dtype, torch.float32).itemsize * means + dtype.itemsize * pending) + 8

    def flops(self, context: int) -> int:
        """Forward, per token, at the mean over a sequence of `context` tokens; a multiply-add is 2."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        C, read, compared = self.rule.chunk, 0, 0
        for t in range(0, context, C):
            n, slots = min(C, context - t), self.rule.used(t)
            read += n * slots + n * (n + 1) // 2
            compared += C * (slots or C) if n == C else 0  # in the first chunk its tokens with each other
        return int(2 * matrices + (4 * read * self.H + 2 * compared * self.G) * self.K / context)

    def forward(
        self, x: Tensor, span: Span | None = None, state: OVQState | None = None
    ) -> tuple[Tensor, OVQState | None]:
        """x [B, T, D] -> y [B, T, D] and, if a state came in, the next one."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.K)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (F.normalize(wide(z), dim=-1, eps=self.eps).to(v.dtype) for z in (q, k))
        scale = wide(self.beta) * self.K**0.5
        borders, valid = (None, None) if span is None else (span.borders, span.valid)
        o, state = ovq_attention(q, k, v, scale, self.rule, state=state, starts=borders, valid=valid)
        o = o.flatten(-2)
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.out_proj(o), state
