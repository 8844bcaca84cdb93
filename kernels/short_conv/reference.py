"""A short causal convolution, one filter per channel, with silu: its definition.

    y_t = silu(sum_i weight_{W-1-i} x_{t-i}),  i = 0 .. W-1, as far back as the document goes

B batch   T time   C channels   W width of the filters [tokens]   past: the W-1 inputs before x_0
In fp32 (fp64 where x is). Source: as in Gated DeltaNet, arXiv 2412.06464; Mamba, arXiv 2312.00752.
"""

import torch
from torch import Tensor, einsum


def short_conv_step(x: Tensor, weight: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x [B,C], weight [C,W], past [B,W-1,C] -> y [B,C], the next past [B,W-1,C]."""
    window = torch.cat([past, x[:, None]], dim=1)
    y = einsum("bwc,cw->bc", window, weight)
    return y * y.sigmoid(), window[:, 1:]


def short_conv_reference(
    x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens, one after the other. Shapes and units: `op.short_conv`."""
    dtype, kept = torch.promote_types(x.dtype, torch.float32), x.dtype if past is None else past.dtype
    past = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if past is None else past
    wide, weight, past = x.to(dtype), weight.to(dtype), past.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            past = torch.where(starts[:, t, None, None], 0, past)
        y, past = short_conv_step(wide[:, t], weight, past)
        outputs.append(y)
    return torch.stack(outputs, dim=1).to(x.dtype), past.to(kept)
