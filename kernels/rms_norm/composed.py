"""The norms as torch composes them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_composed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Same as `rms_norm_reference`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype) + offset, eps).to(x.dtype)


def gated_rms_norm_composed(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as `gated_rms_norm_reference`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps).to(x.dtype) * weight
    return (y * F.silu(gate.to(dtype))).to(x.dtype)
