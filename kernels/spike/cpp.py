"""Spikes in C++ on a CPU, float32 and bfloat16: `spike.cpp`, and `spike_linear.cpp`, the product with int8 weights.

What is straight through needs no C++ for its gradient.
"""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native.rows import RowOp, address
from seqzoo.kernels.spike.composed import gradients, remember

SPIKE = RowOp("spike", Path(__file__).with_name("spike.cpp"), "3qd2P")
PRODUCT = RowOp("spike_linear", Path(__file__).with_name("spike_linear.cpp"), "5qd5P")


def spike_cpp(x: Tensor, k: float, through_threshold: bool) -> Tensor:
    """Same as `spike_reference`, with the threshold held fixed.

    Raises:
        ValueError: another dtype or device, or a gradient that is asked for through the threshold.
        BuildError: no compiler that works.
    """
    if not SPIKE.learns(x):
        return _spike(x, k)
    if through_threshold:
        raise ValueError("spike: backend cpp: expected through_threshold=False where a gradient is needed, got True")
    return _Spike.apply(x, k)


def _spike(x: Tensor, k: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    SPIKE.run(
        "forward", x.numel() // x.shape[-1], x.shape[-1], x.dtype == torch.bfloat16, k, x.data_ptr(), y.data_ptr()
    )
    return y


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, k: float) -> Tensor:
        return _spike(x, k)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def spike_linear_cpp(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, k: float, group: int) -> Tensor:
    """Same as `spike_linear_reference`; sums of whole numbers are whole numbers, however large a count.

    Raises:
        ValueError: an x of another dtype or device.
        BuildError: no compiler that works.
    """
    learns = PRODUCT.learns(x) or bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if learns or torch.compiler.is_compiling():
        return _differentiable(x, weight, scales, bias, k, group)
    return _product(x, weight, scales, bias, k, group)


def _product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, k: float, group: int) -> Tensor:
    (out, width), shape = weight.shape, x.shape[:-1]
    x, weight, scales = x.contiguous(), weight.contiguous(), scales.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty(*shape, out)
    PRODUCT.run(
        "forward", x.numel() // width, width, out, group, x.dtype == torch.bfloat16, k,
        x.data_ptr(), weight.data_ptr(), scales.data_ptr(), address(bias), y.data_ptr(),
    )  # fmt: skip
    return y


@torch.library.custom_op("seqzoo::spike_linear_cpp", mutates_args=())
def _differentiable(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, k: float, group: int) -> Tensor:
    return _product(x, weight, scales, bias, k, group)


@_differentiable.register_fake
def _(x, weight, scales, bias, k, group):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_differentiable.register_autograd(gradients, setup_context=remember)
