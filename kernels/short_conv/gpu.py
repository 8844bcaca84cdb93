"""The short convolution on a GPU, in Triton: forward, backward, and a few tokens from states in a pool.

For backward the inputs alone are kept. Bits depend neither on the batch nor, but for the filters' gradient, on other
rows; that gradient is summed over segments of time in a fixed order.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu, tuned
from seqzoo.kernels.native.rows import rows

MOST = 8  # taps


def short_conv_triton(x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Same as `short_conv_reference`.

    Raises:
        ValueError: no GPU, a dtype that it has no kernels for, or a filter wider than 8.
    """
    needs_gpu(x)
    inputs = (x, weight) if past is None else (x, weight, past)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _differentiable(x, weight, past, starts)
    return forward(x, weight, past, starts)


def _config(kernel: str, x: Tensor, W: int) -> tuple[dict[str, int], int]:
    """The kernel's configuration, and how many programs there are."""
    B, T, C = x.shape
    config = tuned("short_conv", kernel, x.device, x.dtype, W=W, T=T)
    return config | dict(W=W), B * -(-T // config["S"]) * -(-C // config["BC"])


def forward(x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the next past."""
    (B, _, C), W = x.shape, weight.shape[1]
    following = x.new_empty((B, W - 1, C), dtype=x.dtype if past is None else past.dtype)
    return start(x, weight, None if past is None else rows(past), starts, None, following), following


def start(
    x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None, index: Tensor | None, following: Tensor
) -> Tensor:
    """y; `following` is filled, which may be `past` where one segment is all of time.

    Args:
        index: the slot in `past` and in `following` of each row; None: its own.
    """
    from seqzoo.kernels.short_conv.gpu_kernels import short_conv_forward

    (_, T, C), x = x.shape, rows(x)
    y = x.new_empty(x.shape)
    config, programs = _config("forward", x, weight.shape[1])
    launch(
        short_conv_forward,
        (programs,),
        *(x, weight.contiguous(), past, None if starts is None else starts.contiguous(), index, y, following),
        *(T, C, following.shape[0], *x.stride()[:2]),
        *((0, 0) if past is None else past.stride()[:2]),
        *following.stride()[:2],
        **config,
    )
    return y


def backward(
    x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None, dy: Tensor, dnext: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, and dpast, which is empty where there is no past."""
    from seqzoo.kernels.short_conv.gpu_kernels import short_conv_backward

    (B, T, C), W = x.shape, weight.shape[1]
    x, past = rows(x), None if past is None else rows(past)
    config, programs = _config("backward", x, W)
    dx = x.new_empty(x.shape)
    dpast = x.new_empty(0) if past is None else past.new_empty(past.shape)
    dtaps = x.new_empty((B * -(-T // config["S"]), W, C), dtype=torch.float32)
    launch(
        short_conv_backward,
        (programs,),
        *(x, weight.contiguous(), past, None if starts is None else starts.contiguous()),
        *(dy.contiguous(), dnext.contiguous(), dx, None if past is None else dpast, dtaps),
        *(T, C, *x.stride()[:2]),
        *((0, 0) if past is None else past.stride()[:2]),
        **config,
    )
    return dx, dtaps.sum(0).mT.contiguous().to(weight.dtype), dpast


@torch.library.custom_op("seqzoo::short_conv_triton", mutates_args=())
def _differentiable(x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    return forward(x, weight, past, starts)


@_differentiable.register_fake
def _(x, weight, past, starts):
    kept = x.dtype if past is None else past.dtype
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=kept)


@torch.library.custom_op("seqzoo::short_conv_triton_backward", mutates_args=())
def _gradients(
    x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None, dy: Tensor, dnext: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(x, weight, past, starts, dy, dnext)


@_gradients.register_fake
def _(x, weight, past, starts, dy, dnext):
    dpast = x.new_empty(0) if past is None else past.new_empty(past.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dpast


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy, dnext):
    x, weight, past, starts = ctx.saved_tensors  # once: under checkpointing what is saved can be had once
    dx, dweight, dpast = _gradients(x, weight, past, starts, dy, dnext)
    return dx, dweight, None if past is None else dpast, None


_differentiable.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    half, full = torch.bfloat16, torch.float32
    for B, T, C, W, dtype, kept, packed in (
        (2, 4096, 8192, 4, half, False, False),
        (2, 4096, 8192, 4, half, False, True),
        (2, 4096, 8192, 4, full, True, True),
        (1, 32768, 8192, 4, half, False, False),  # longer segments, so that their shares of dweight are few
        (2, 512, 2048, 8, half, True, True),
        (64, 1, 8192, 4, half, True, False),
        (64, 5, 8192, 4, half, True, False),
    ):
        x, weight = make((B, T, C), dtype), make((C, W), dtype)
        past = make((B, W - 1, C), dtype) if kept else None
        starts = make((B, T), torch.bool) if packed else None
        name = f"{T} tokens, {W} taps, {dtype}{', past' if kept else ''}{', starts' if packed else ''}"
        yield f"forward {name}", lambda x=(x, weight, past, starts): forward(*x)
        if T > 16:
            given = make((B, T, C), dtype), make((B, W - 1, C), dtype)
            yield f"backward {name}", lambda x=(x, weight, past, starts, *given): backward(*x)
