"""The experts' MLPs as two grouped matrix products over the slots sorted by expert; no step waits for the device.

Where the grouped product of torch does not serve (float64, rows that are no multiple of 16 bytes, GPUs before sm_80),
the same rows go through the experts that were hit one after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.expert_mlp.reference import Hidden

ALIGNED = 16  # bytes: what a row of a grouped product's operands must be a multiple of


class _Spread(torch.autograd.Function):
    """x [N, D] -> [N k, D]: each token once per slot, sorted by expert. `_Collect` is its adjoint, and the reverse."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order, place)
        return x[order // place.shape[1]]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Collect.apply(grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """rows [N k, D] -> [N, D]: the sum of each token's slots, always in their order, so that no two runs differ."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order, place)
        return rows[place].sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None


def expert_mlp_grouped(
    x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, hidden: Hidden | None = None
) -> Tensor:
    """Same as `expert_mlp_reference`."""
    expert, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(gate_up.shape[0], device=x.device), right=True, out_int32=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device)).view_as(chosen)
    product = _grouped if _can_group(x, down) else _one_by_one
    gate, up = product(_Spread.apply(x, order, place), gate_up, ends).chunk(2, dim=-1)
    between = F.silu(gate) * up
    between = (between if hidden is None else hidden(between)) * weight.flatten()[order, None]
    return _Collect.apply(product(between.to(x.dtype), down, ends), order, place)


def _can_group(x: Tensor, down: Tensor) -> bool:
    if any(width * x.element_size() % ALIGNED for width in down.shape[1:]):
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    if torch.compiler.is_compiling():
        return x.dtype == torch.bfloat16  # all that tracing lets through (2.13)
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, matrices.mT, offs=ends)


def _one_by_one(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The same product, by a loop on the host over the experts that have rows."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    pieces = [F.linear(part, matrices[e]) for e, part in enumerate(rows.split(sizes)) if part.shape[0]]
    return torch.cat(pieces) if pieces else rows.new_zeros(0, matrices.shape[1])
