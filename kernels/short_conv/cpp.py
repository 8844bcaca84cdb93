"""The short convolution in C++ on a CPU, float32 and bfloat16, forward and backward: see `short_conv.cpp`.

For backward the inputs alone are kept. Bits do not depend on the number of threads.
"""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native.rows import RowOp, address, rows

NATIVE = RowOp("short_conv", Path(__file__).with_name("short_conv.cpp"), "10q11P")


def short_conv_cpp(x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Same as `short_conv_reference`.

    Raises:
        ValueError: another dtype or device.
        BuildError: no compiler that works.
    """
    run = _ShortConv.apply if NATIVE.learns(x, weight, past) else _forward
    if past is None or past.dtype == x.dtype:
        return run(x, weight, past, starts)
    y, following = run(x, weight, past.to(x.dtype), starts)
    return y, following.to(past.dtype)


def _run(
    way: str, x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None, *results: Tensor | None
) -> None:
    """`results`: y, next, dy, dnext, dx, dpast, dweight, or the first of them."""
    x, weight, past_steps = rows(x), weight.contiguous(), (0, 0)
    if past is not None:
        past = rows(past)
        past_steps = past.stride()[:2]
    if starts is not None:
        starts = starts.contiguous()
    kinds = x.dtype == torch.bfloat16, weight.dtype == torch.bfloat16
    pointers = [address(t) for t in (x, past, weight, starts, *results)]
    pointers += [0] * (11 - len(pointers))
    NATIVE.run(way, *x.shape, weight.shape[1], *kinds, *x.stride()[:2], *past_steps, *pointers)


def _forward(x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if past is None:
        following = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))
    else:
        following = torch.empty_like(past, memory_format=torch.contiguous_format)
    _run("forward", x, weight, past, starts, y, following)
    return y, following


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, past, starts)
        return _forward(x, weight, past, starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor, dnext: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, past, starts = ctx.saved_tensors
        dy, dnext = dy.contiguous(), dnext.contiguous()
        dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape, dtype=torch.float32)
        dpast = None if past is None else torch.empty(past.shape, dtype=x.dtype)
        _run("backward", x, weight, past, starts, None, None, dy, dnext, dx, dpast, dweight)
        return dx, dweight.to(weight.dtype), dpast, None
