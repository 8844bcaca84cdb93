"""The short convolution as torch composes it: one grouped convolution, or a sum over taps where documents begin."""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv_composed(x: Tensor, weight: Tensor, past: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Same as `short_conv_reference`, in x's dtype throughout."""
    (B, T, C), W = x.shape, weight.shape[1]
    weight, kept = weight.to(x.dtype), x.dtype if past is None else past.dtype
    past = x.new_zeros(B, W - 1, C) if past is None else past.to(x.dtype)
    long = torch.cat([past, x], dim=1)  # [B, W-1+T, C]
    if starts is None:
        return F.silu(F.conv1d(long.mT, weight[:, None], groups=C).mT), long[:, T:].to(kept)
    document = F.pad(starts.cumsum(1), (W - 1, 0))  # [B, W-1+T] how many starts so far
    y = torch.zeros_like(x)
    for w in range(W):
        same = document[:, w : w + T] == document[:, W - 1 :]
        y = y + long[:, w : w + T] * same[..., None] * weight[:, w]
    inside = document[:, T:] == document[:, -1:]
    return F.silu(y), (long[:, T:] * inside[..., None]).to(kept)
