"""Root mean square norms: their definitions.

    n = x / sqrt(mean x^2 + eps)
    rms_norm        y = (weight + offset) n
    gated_rms_norm  y = silu(gate) (weight n)          norm first, then the gate

All in fp32 (fp64 where x is); gated_rms_norm rounds n to x's dtype, and weight n to that of both, as Qwen3-Next does.
Source: Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4; the gated one: Gated DeltaNet, arXiv 2412.06464.
"""

import torch
from torch import Tensor


def _normal(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Shapes and units: `op.rms_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return ((weight.to(dtype) + offset) * _normal(x.to(dtype), eps)).to(x.dtype)


def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Shapes and units: `op.gated_rms_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate = gate.to(dtype)
    return (gate * gate.sigmoid() * (weight * _normal(x.to(dtype), eps).to(x.dtype))).to(x.dtype)
