"""Activations as spike counts under a threshold that adapts to each row, and their product with int8 weights: the
definitions.

    V = clamp(mean_i |x_i| / k, 1e-5, 1e4)     s_i = round(x_i / V)     x^_i = V s_i

x a row of n channels   V its threshold   s signed whole counts, ties to even   x^ what the counts stand for
An integrate-and-fire neuron without leak, with a soft reset, fed x at once and read when it has fallen silent. A larger
k fires more and errs less. Unless V is clamped, |s| <= k n.

Gradients are straight through the rounding, ds/du = 1 at u = x / V. With V held fixed that is dx = dx^. With
`through_threshold` V moves too: dx_i = dx^_i + sign(x_i) / (k n) sum_j (s_j - x_j / V) dx^_j, where V is not clamped.

    y_o = V sum_g scale_og sum_{i in g} w_oi s_i + b_o = sum_i W^_oi x^_i + b_o,     W^_oi = scale_og w_oi

w int8   g a group of neighbouring channels, the last may be short   scale one per output channel and group
The weights are frozen: dx = W^T dy, and b learns.

Source: SpikingBrain, arXiv 2509.05276. The paper does not say over what the mean goes; its code has each token's
channels, in fp32, and so have we. Sums are taken in fp64: backends that add in another order count the same.
"""

import torch
from torch import Tensor

LOWEST, HIGHEST = 1e-5, 1e4  # of a threshold


def spike_counts_reference(x: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """Shapes and units: `op.spike_counts`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    total = x.abs().sum(-1, keepdim=True, dtype=torch.float64)
    threshold = (total / (k * x.shape[-1])).to(x.dtype).clamp(LOWEST, HIGHEST)
    return (x / threshold).round(), threshold


def spike_reference(x: Tensor, k: float, through_threshold: bool) -> Tensor:
    """Shapes and units: `op.spike`."""
    counts, threshold = spike_counts_reference(x, k)
    u = x / (threshold if through_threshold else threshold.detach())
    straight = u + (counts - u).detach()  # exactly the counts: the difference is no longer than either
    return ((threshold if through_threshold else threshold.detach()) * straight).to(x.dtype)


def spike_linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, k: float, group: int
) -> Tensor:
    """Shapes and units: `op.spike_linear`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = spike_reference(wide, k, False) @ dequantised(weight, scales, group).to(wide.dtype).mT
    return (y if bias is None else y + bias).to(x.dtype)


def dequantised(weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """W^ [..., out, in], in the scales' dtype, fp32 at least.

    By index: of repeat_interleave that is cut after a short group torch.compile (2.13, on a CPU) makes noise.
    """
    scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
    return scales[..., torch.arange(weight.shape[-1], device=weight.device) // group] * weight
