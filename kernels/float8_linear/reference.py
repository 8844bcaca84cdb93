"""A linear layer whose three products have operands of eight bits, in plain arithmetic: the definition.

    y  = q43(x) q43(W)^T + b        rows of x and of W scaled       d bits of a number: sign, exponent, mantissa
    dx = q52(dy) q43(W)             rows of dy, columns of W        q43: 1, 4, 3, largest 448
    dW = q52(dy)^T q43(x)           columns of dy and of x          q52: 1, 5, 2, largest 57344

A vector is scaled by its largest magnitude, so that this becomes the format's largest number (but by no number that is
too small to divide by), and rounded to the nearest, ties to even; a vector of zeros stays so. Gradients are those of
the rounded product, straight through the rounding. Sums are of the dtype that comes in, fp32 at least; a number that is
not finite makes its vector so.

Source: the formats, Micikevicius et al. 2022, arXiv 2209.05433. A scale for each row or column, found anew in each
call: that is the row-wise recipe; one for each tile of 128, as in DeepSeek-V3 (arXiv 2412.19437), is finer.
"""

import torch
from torch import Tensor

FORMATS = {"q43": (3, -6, 448.0), "q52": (2, -14, 57344.0)}  # mantissa bits, least exponent, largest number


def rounded(x: Tensor, form: str) -> Tensor:
    """x [..., N], each of its vectors scaled, rounded and scaled back."""
    bits, least, largest = FORMATS[form]
    scale = scales_of_rows(x, largest)
    number = x / scale
    step = torch.exp2(torch.frexp(number)[1].clamp(min=least + 1) - 1.0 - bits)  # frexp: number = m 2^e, 0.5 <= m < 1
    return (torch.round(number / step) * step).clamp(-largest, largest) * scale


def scales_of_rows(x: Tensor, largest: float) -> Tensor:
    """[..., N] -> [..., 1] in fp32 at least: largest magnitudes over the format's, and never 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    top = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    return (top.to(wide) / largest).clamp(min=torch.finfo(wide).tiny)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rounded(x, "q43") @ rounded(weight, "q43").mT

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        columns = lambda x, form: rounded(x.mT, form).mT
        dx = rounded(d, "q52") @ columns(weight, "q43")
        return dx, columns(d, "q52").mT @ columns(x, "q43")


def float8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, I], weight [O, I], bias [O] -> y [N, O]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = _Reference.apply(x.to(wide), weight.to(wide)).to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)
