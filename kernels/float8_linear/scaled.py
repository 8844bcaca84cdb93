"""The same in torch's own eight-bit dtypes: on devices that multiply them, and emulated.

Numbers are cast by torch, and multiplied by torch._scaled_mm, which a CPU has, too, without being any faster; where
only the casts are wanted, they are cast back and multiplied as ever.
"""

import torch
from torch import Tensor

from seqzoo.kernels.float8_linear.reference import scales_of_rows

KINDS = {"q43": torch.float8_e4m3fn, "q52": torch.float8_e5m2}
UNIT = 16  # sizes that a device takes


def cast(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """x [M, N] -> its numbers in eight bits, and the scales of its rows [M, 1] in fp32."""
    kind = KINDS[form]
    largest = torch.finfo(kind).max
    scale = scales_of_rows(x, largest).float()
    rows = torch.contiguous_format  # are what a device wants to read
    return (x / scale).clamp(-largest, largest).to(kind, memory_format=rows), scale


def multiplied(a: Tensor, b: Tensor, forms: tuple[str, str], dtype: torch.dtype, *, really: bool) -> Tensor:
    """a [M, K] times b [N, K] transposed, rows of both rounded -> [M, N]. `really`: by the device's own product."""
    (a, scale_a), (b, scale_b) = cast(a, forms[0]), cast(b, forms[1])
    if not really:
        wide = torch.promote_types(dtype, torch.float32)
        return ((a.to(wide) * scale_a) @ (b.to(wide) * scale_b).mT).to(dtype)
    pad = -a.shape[1] % UNIT  # of tokens, where these are summed over
    if pad:
        a, b = (torch.cat([x, x.new_zeros(x.shape[0], pad)], 1) for x in (a, b))
    out = torch.bfloat16 if a.device.type == "cuda" else dtype  # the only one that a GPU gives with scales of rows
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=out).to(dtype)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, really: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.really = really
        return multiplied(x, weight, ("q43", "q43"), x.dtype, really=really)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), really = ctx.saved_tensors, ctx.really
        dx = multiplied(d, weight.t(), ("q52", "q43"), x.dtype, really=really)
        return dx, multiplied(d.t(), x.t(), ("q52", "q43"), weight.dtype, really=really), None


def float8_linear_scaled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, I], weight [O, I], bias [O] -> y [N, O]; I and O multiples of 16."""
    y = _Scaled.apply(x, weight, True)
    return y if bias is None else y + bias.to(y.dtype)


def float8_linear_emulated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, I], weight [O, I], bias [O] -> y [N, O]."""
    y = _Scaled.apply(x, weight, False)
    return y if bias is None else y + bias.to(y.dtype)
