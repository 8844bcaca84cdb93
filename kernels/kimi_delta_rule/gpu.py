"""The delta rule with a decay per key channel in Triton, on a GPU (or interpreted): forward and backward by hand.

Forward: `prepare` makes of every chunk, for itself, all that needs no memory; `forward` then walks through the chunks
with the memory in registers, two products that wait for each other a chunk. Backward keeps of it the inputs and A: it
prepares again, walks with the memory and against time with its gradient in one launch (`both_ways`), and makes the
gradients of all chunks at once (`squares`, `gradients`). A sequence has the same bits alone and in a batch: no sum's
order is left open. A few tokens without gradients go one by one, in one launch (`gpu_step`).

bfloat16 is multiplied as such, with sums, decays, the memory and the inverse's doubling in fp32 (tf32 products); what
kernels hand each other is rounded to bfloat16 as operands. float32 and float16 are multiplied as tf32. q and k may be
of a wider dtype than v, whose products they take part in.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from seqzoo.kernels.gpu import needs_gpu, takes
from seqzoo.kernels.gpu.operands import even_rows
from seqzoo.kernels.gpu.pool import MOST
from seqzoo.kernels.kimi_delta_rule.gpu_call import Call, kimi_delta_rule_step_triton

WIDEST = 256  # K and V


def able(q: Tensor, v: Tensor) -> bool:
    """Whether it is to be chosen for these, where nothing is forced."""
    return takes(v) and max(q.shape[3], v.shape[3]) <= WIDEST


def kimi_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `kimi_delta_rule_reference`.

    Raises:
        ValueError: float64, tensors that are not on a GPU, or K or V above 256.
    """
    for x in (q, k, v):
        needs_gpu(x)
    if max(q.shape[3], v.shape[3]) > WIDEST:
        raise ValueError(f"backend triton: expected K and V of at most {WIDEST}, got {q.shape[3]} and {v.shape[3]}")
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, state))
    o, last, _ = _op(q, k, v, g.float(), beta.float(), None if state is None else state.float(), starts, learns)
    return o, last


def _call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, starts: Tensor | None) -> Call:
    starts = None if starts is None else starts.contiguous()
    return Call(even_rows(q), even_rows(k), even_rows(v), g.contiguous(), beta.contiguous(), starts)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last memory, and for backward A."""
    call = _call(q, k, v, g, beta, starts)
    chunks = call.prepared()
    return *call.outputs(chunks, None if state is None else state.contiguous()), chunks.A


def backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    starts: Tensor | None, A: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, beta and the first memory, from what `forward` was given and kept."""
    call, d_o = _call(q, k, v, g, beta, starts), d_o.contiguous()
    *walked, d_state = call.memories(
        call.prepared(A), d_o, d_last.contiguous(), None if state is None else state.contiguous()
    )
    return *call.gradients(A, d_o, *walked), d_state


@torch.library.custom_op("seqzoo::kimi_delta_rule_triton", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not keep and q.shape[1] <= MOST:
        last = v.new_zeros(*v.shape[::2], k.shape[3], v.shape[3], dtype=torch.float32)
        if state is not None:
            last.copy_(state)
        return kimi_delta_rule_step_triton(q, k, v, g, beta, last, None, starts), last, last.new_empty(0)
    o, last, A = forward(q, k, v, g, beta, state, starts)
    return o, last, A if keep else last.new_empty(0)


@_op.register_fake
def _(q, k, v, g, beta, state, starts, keep):
    call = Call(q, k, v, g, beta, starts)
    last = call.empty(call.B, call.H, call.K, call.V, small=False)
    return v.new_empty(v.shape), last, call.chunked(call.C, call.C) if keep else last.new_empty(0)


@torch.library.custom_op("seqzoo::kimi_delta_rule_triton_backward", mutates_args=())
def _op_backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    starts: Tensor | None, A: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(d_o, d_last, q, k, v, g, beta, state, starts, A)


@_op_backward.register_fake
def _(d_o, d_last, q, k, v, g, beta, state, starts, A):
    return (*(x.new_empty(x.shape) for x in (q, k, v, g, beta, d_last)),)


def _remember(ctx, inputs, output):
    *inputs, _ = inputs
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, d_o, d_last, _):
    saved = ctx.saved_tensors  # once: under checkpointing what is saved can be had once
    *grads, d_state = _op_backward(d_o, d_last, *saved)
    return *grads, None if saved[5] is None else d_state, None, None


_op.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable[[Sequence[int], torch.dtype], Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start every kernel in every shape class."""

    def call(T: int, H: int, width: int, dtype: torch.dtype, wide: bool, begun: bool) -> Callable[[], object]:
        q, k = (make((1, T, H, width), torch.float32 if wide else dtype) for _ in range(2))
        v, g = make((1, T, H, width), dtype), make((1, T, H, width), torch.float32).abs().neg()
        beta = make((1, T, H), torch.float32)
        state = make((1, H, width, width), torch.float32) if begun else None
        starts = make((1, T), torch.bool) if begun else None

        def run() -> object:
            o, last, A = forward(q, k, v, g, beta, state, starts)
            return o, last, *backward(o, last, q, k, v, g, beta, state, starts, A)

        return run

    for width in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{width} wide, {str(dtype).removeprefix('torch.')}", call(4096, 16, width, dtype, False, False)
    yield "packed, from a state, q and k wider", call(4096, 32, 128, torch.bfloat16, True, True)
