"""Weights to int8: each to its nearest step, or so that their errors make up for each other on inputs that were seen.

Source of the latter: Frantar et al. 2022, GPTQ, arXiv 2210.17323, here within each group of channels that share a
scale: what must be known of a matrix's inputs is then `group` numbers per channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127  # of a weight: -128 has no counterpart
DAMPING = 0.01  # of the mean square of a group's channels that are given something, added to each
_ROWS = 64  # of a matrix at a time: what is gone over for every channel stays near


def quantised(weight: Tensor, group: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A matrix, or a stack of them, to 255 steps, symmetric about 0.

    Args:
        weight: [..., out, in].
        group: input channels that share a scale, that of the largest weight among them.
        moments: [..., G, n, n], n = min(group, in), sums of x x^T over inputs, see `moments_of`: channel after channel
            goes to its nearest step, and those after it in the group make up for the error, as far as their inputs go
            with its. A channel without inputs is left out of it. None is the nearest step for all.

    Returns:
        int8 of weight's shape, -127 to 127, and scales [..., out, G], G = ceil(in / group), in weight's dtype.

    Raises:
        ValueError: a weight or moments that are not finite.
    """
    if not weight.isfinite().all():
        raise ValueError(f"quantise: expected finite weights, got {weight[~weight.isfinite()][0].item()}")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    parts = _grouped(wide, group)
    scales = (parts.abs().amax(-1) / LARGEST).to(weight.dtype)
    scales = scales.where(scales != 0, torch.finfo(weight.dtype).tiny)  # of nothing but zeros
    if moments is None:
        steps = _nearest(parts, scales[..., None])
    else:
        passed = _passed_on(moments).to(parts)[..., None, :, :, :]
        rows = zip(parts.split(_ROWS, dim=-3), scales.to(parts).split(_ROWS, dim=-2), strict=True)
        steps = torch.cat([_in_turn(some.clone(), by, passed) for some, by in rows], dim=-3)
    return steps.flatten(-2)[..., : weight.shape[-1]].to(torch.int8).contiguous(), scales


def moments_of(x: Tensor, group: int) -> Tensor:
    """x [rows, in] -> [G, n, n], n = min(group, in), the sum of x x^T over rows in each group of channels, in fp32."""
    parts = _grouped(x.float(), group).transpose(0, 1)  # [G, rows, group]
    return parts.mT @ parts


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., in] -> [..., G, min(group, in)], zeros beyond the last channel."""
    group = min(group, x.shape[-1])
    G = -(-x.shape[-1] // group)
    return F.pad(x, (0, G * group - x.shape[-1])).unflatten(-1, (G, group))


def _nearest(x: Tensor, scales: Tensor) -> Tensor:
    return (x / scales).round().clamp(-LARGEST, LARGEST)


def _passed_on(moments: Tensor) -> Tensor:
    """[..., j, i]: how much of the error of channel j's weight is taken from channel i's, i > j."""
    if not moments.isfinite().all():
        raise ValueError("quantise: expected finite inputs of a projection, got NaN or infinity on the text")
    moments = moments.double()
    squares = moments.diagonal(dim1=-2, dim2=-1)
    given = squares > 0
    mean = squares.sum(-1, keepdim=True) / given.sum(-1, keepdim=True).clamp(min=1)
    damping = torch.where(given, DAMPING * mean, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments + damping.diag_embed()))
    upper = torch.linalg.cholesky(inverse, upper=True)
    return (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1)


def _in_turn(left: Tensor, scales: Tensor, passed: Tensor) -> Tensor:
    """left [..., rows, G, group], which is used up, scales [..., rows, G] -> steps like left."""
    steps = torch.empty_like(left)
    for j in range(left.shape[-1]):
        steps[..., j] = _nearest(left[..., j], scales)
        error = left[..., j] - steps[..., j] * scales
        left[..., j + 1 :] -= error[..., None] * passed[..., j, j + 1 :]
    return steps
