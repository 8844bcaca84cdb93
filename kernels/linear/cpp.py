"""The product in C++ for few rows on a CPU, float32 and bfloat16, where reading the weight is all the time: see
`linear.cpp`. Many rows, and what a gradient is asked for, are torch's own product, which is made for them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from seqzoo.kernels.native.rows import RowOp

FEW = {torch.float32: 8, torch.bfloat16: 4}  # rows up to which it is faster than torch's
NATIVE = RowOp("linear", Path(__file__).with_name("linear.cpp"), "4q4P")
PLAIN = (Tensor, Parameter)  # a subclass, as of a quantised weight, keeps its numbers in its own way


def few(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the C++ computes this: shapes that fit, few rows, no gradient, no other dtype under autocast, plain
    tensors, a weight as it stands. Cheap, for it is asked before every product."""
    dtype, shape = x.dtype, weight.shape
    return (
        len(shape) == 2
        and x.ndim > 0
        and 0 < x.numel() <= FEW.get(dtype, 0) * shape[1]
        and x.shape[-1] == shape[1]
        and weight.dtype == dtype
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or _fits(bias, weight))
        and not (torch.is_grad_enabled() and _learns(x, weight, bias))
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(bias: Tensor, weight: Tensor) -> bool:
    return bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.is_cpu and type(bias) in PLAIN


def _learns(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def linear_cpp(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Same as `linear_reference`.

    Raises:
        ValueError: another dtype or device.
        BuildError: no compiler that works.
    """
    if x.dtype not in FEW or not x.is_cpu:
        raise ValueError(f"linear: backend cpp: expected float32 or bfloat16 on a CPU, got {x.dtype} on {x.device}")
    return run(x, weight, bias) if few(x, weight, bias) else F.linear(x, weight, bias)


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The C++ itself, for what is `few`."""
    shape, (out, width) = [*x.shape], weight.shape
    shape[-1] = out
    x, y = x.contiguous(), x.new_empty(shape)
    bias = None if bias is None else bias.contiguous()
    NATIVE.run(
        "forward", x.numel() // width, width, out, x.dtype == torch.bfloat16,
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y
