"""Spikes as torch composes them, for any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.spike.reference import dequantised, spike_counts_reference, spike_reference

ROOM = 1 << 25  # elements of the groups' products that are held at once


class _Spike(torch.autograd.Function):
    """V held fixed: nothing to keep for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, k: float) -> Tensor:
        counts, threshold = spike_counts_reference(x, k)
        return counts.mul_(threshold).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def spike_composed(x: Tensor, k: float, through_threshold: bool) -> Tensor:
    """Same as `spike_reference`."""
    return spike_reference(x, k, True) if through_threshold else _Spike.apply(x, k)


class _SpikeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, k: float, group: int) -> Tensor:
        remember(ctx, (x, weight, scales, bias, k, group), None)
        counts, threshold = spike_counts_reference(x.reshape(-1, x.shape[-1]), k)
        y = threshold * _product(counts, weight, scales.to(counts.dtype), group)
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, dy)


def spike_linear_composed(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, k: float, group: int
) -> Tensor:
    """Same as `spike_linear_reference`. Whole numbers are multiplied and, up to 2^24, summed exactly in a group."""
    return _SpikeLinear.apply(x, weight, scales, bias, k, group)


def _product(counts: Tensor, weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """counts [N, in] -> [N, out] in units of the threshold."""
    (out, width), G = weight.shape, scales.shape[1]
    missing = G * group - width  # of the last group
    weight = F.pad(weight, (0, missing)).to(counts.dtype).view(out, G, group).permute(1, 2, 0)
    counts = F.pad(counts, (0, missing)).view(-1, G, group).transpose(0, 1)  # [G, N, group]
    pieces = counts.split(max(1, ROOM // max(1, G * out)), dim=1)
    return torch.cat([torch.einsum("gno,og->no", piece @ weight, scales) for piece in pieces])


def remember(ctx, inputs: tuple, output: Tensor | None) -> None:
    """For `gradients`. inputs: x, weight, scales, bias, k, group."""
    x, weight, scales, bias, _, group = inputs
    ctx.save_for_backward(weight, scales)
    ctx.group, ctx.dtypes = group, (x.dtype, None if bias is None else bias.dtype)


def gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the counts; none for what is frozen."""
    weight, scales = ctx.saved_tensors
    x_dtype, bias_dtype = ctx.dtypes
    dy = dy.to(torch.promote_types(dy.dtype, torch.float32))
    dx = (dy @ dequantised(weight, scales, ctx.group).to(dy.dtype)).to(x_dtype) if ctx.needs_input_grad[0] else None
    wanted = bias_dtype is not None and ctx.needs_input_grad[3]
    dbias = dy.reshape(-1, len(weight)).sum(0).to(bias_dtype) if wanted else None
    return dx, None, None, dbias, None, None
