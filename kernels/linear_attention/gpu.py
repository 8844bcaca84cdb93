"""Linear attention on a GPU: Triton kernels, forward and backward, started from here.

bfloat16, float16 or float32 in and out, sums and memory in float32. Forward is one pass over a row's chunks; with one
decay per key channel another kernel makes the chunks' scores first. Where a row's heads are too few for the chip, it is
cut into segments: what each makes of nothing, then the memories they start with, then all at once. Backward makes the
memories before each chunk again, and the gradients of those after each, and then all chunks' gradients at once.
A row gets the same bits alone and in a batch: nothing depends on the batch, and no order of sums is left open.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from seqzoo.kernels.gpu import needs_gpu, takes
from seqzoo.kernels.gpu.operands import even_rows
from seqzoo.kernels.linear_attention.gpu_call import CHANNEL, Call

WIDEST = 256  # key and value channels


def able(q: Tensor, v: Tensor) -> bool:
    """Whether this backend is to be chosen for such a call on a GPU."""
    return takes(v) and max(q.shape[3], v.shape[3]) <= WIDEST


def linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `linear_attention_reference`.

    Raises:
        ValueError: float64, tensors that are not on a GPU, or heads of more than 256 channels.
    """
    needs_gpu(v)
    if max(q.shape[3], v.shape[3]) > WIDEST:
        raise ValueError(f"backend triton: expected K and V up to {WIDEST}, got {q.shape[3]} and {v.shape[3]}")
    dtype = v.dtype
    common = dtype if q.dtype == k.dtype == dtype else torch.float32
    q, k, v = (x.to(common) for x in (q, k, v))
    g = None if g is None else g.float().contiguous()
    state = None if state is None else state.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, state))
    if learns and v.is_cuda and g is not None and g.ndim == 4 and q.shape[2] > k.shape[2]:
        return _ungrouped(q, k, v, g, state, starts, dtype)
    run = _differentiable if learns or torch.compiler.is_compiling() else forward
    o, state = run(q, k, v, g, state, starts)
    return o.to(dtype), state


def _ungrouped(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, starts: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A memory for every query head: the loop over a group in `channel_gradients` is right when interpreted, but not as
    Triton 3.6 compiles it for an H200, where d_q was wrong. To be taken out once that is understood.
    """
    R = q.shape[2] // k.shape[2]
    k, v, g = (x.repeat_interleave(R, dim=2) for x in (k, v, g))
    state = None if state is None else state.repeat_interleave(R, dim=1)
    o, last = _differentiable(q, k, v, g, state, starts)
    return o.to(dtype), last[:, ::R]


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, starts: Tensor | None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, V] and the last memory [B, G, K, V] fp32, without gradients.

    Args:
        q, k, v: of one dtype.
        g, state: fp32 and contiguous, or None.
        segments: what a row is cut into; None leaves it to sizes and chip.
    """
    q, k, v = (even_rows(x) for x in (q, k, v))
    call, scores, keep = Call(q, v, g, starts, segments), None, None
    if call.decay == CHANNEL:
        q, k, scores, keep = call.prepared(k)
    return call.outputs(q, k, scores, keep, state)


def backward(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None,
    starts: Tensor | None, segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, g and state, None of what is None; arguments as of `forward`."""
    q, k, v, d_o = (even_rows(x) for x in (q, k, v, d_o))
    call, reads, writes, scores, keep = Call(q, v, g, starts, segments), q, k, None, None
    if call.decay == CHANNEL:
        reads, writes, scores, keep = call.prepared(k)
    memories, d_memories = call.memories(), call.memories()
    call.states(writes, v, keep, call.begun(writes, v, keep, state), False, memories)
    d_state, d_begun = None, call.begun(reads, d_o, keep, d_last.contiguous(), True)
    if state is not None:
        d_state = torch.empty_like(state)
    call.states(reads, d_o, keep, d_begun, True, d_memories, d_state)
    dv = call.value_gradients(reads, writes, scores, d_o, d_memories)
    return *_in_order(call.gradients(k, d_o, memories, d_memories), dv), d_state


def _in_order(others: tuple[Tensor, Tensor, Tensor | None], dv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dq, dk, dg = others
    return dq, dk, dv, dg


@torch.library.custom_op("seqzoo::linear_attention_triton", mutates_args=())
def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, g, state, starts)


@_differentiable.register_fake
def _(q, k, v, g, state, starts):
    last = v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(*q.shape[:3], v.shape[3]), last


@torch.library.custom_op("seqzoo::linear_attention_triton_backward", mutates_args=())
def _gradients(
    d_o: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None,
    starts: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Of those of q, k, v, g and state that there are."""
    return [x for x in backward(d_o, d_last, q, k, v, g, state, starts) if x is not None]


@_gradients.register_fake
def _(d_o, d_last, q, k, v, g, state, starts):
    return [x.new_empty(x.shape) for x in (q, k, v, g, state) if x is not None]


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_o, d_last):
    saved = ctx.saved_tensors  # once: under checkpointing what is saved can be had once
    grads = iter(_gradients(d_o, d_last, *saved))
    return *(None if x is None else next(grads) for x in saved[:5]), None


_differentiable.register_autograd(_backward, setup_context=_remember)


EXAMPLES = {  # B, T, H, G, K, V, decay, packed
    "none": (2, 2048, 16, 16, 128, 128, "none", False),
    "head": (2, 2048, 16, 16, 128, 128, "head", False),
    "channel": (2, 2048, 16, 16, 128, 128, "channel", False),
    "grouped": (1, 8192, 16, 4, 128, 128, "head", True),
    "grouped channel": (1, 8192, 16, 4, 128, 128, "channel", True),
    "wide": (1, 2048, 8, 8, 256, 256, "head", False),
    "wide channel": (1, 2048, 8, 8, 256, 256, "channel", False),
}


def examples(make: Callable[[Sequence[int], torch.dtype], Tensor]) -> Iterator[tuple[str, Callable]]:
    """Forward, and backward with a memory before; the grouped ones cut into segments."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, (B, T, H, G, K, V, decay, packed) in EXAMPLES.items():
            q, k, v, d_o = (make((B, T, *size), dtype) for size in ((H, K), (G, K), (G, V), (H, V)))
            state, starts = make((B, G, K, V), torch.float32), make((B, T), torch.bool) if packed else None
            g = None
            if decay != "none":
                g = make((B, T, G, K) if decay == "channel" else (B, T, G), torch.float32).abs().neg()
            inputs, label = (q, k, v, g, state, starts), f"{name} {str(dtype).removeprefix('torch.')}"
            yield f"{label} forward", partial(forward, *inputs)
            yield f"{label} backward", partial(backward, d_o, state, *inputs)
