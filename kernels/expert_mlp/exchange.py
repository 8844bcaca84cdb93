"""Experts that are cut over processes: tokens go to the experts that they chose, and what these say comes back.

Every process has whole experts, E / ranks of them in the order of ranks, and tokens of its own; none is dropped,
whatever the load. One exchange there, one back, and the same two in reverse for gradients.
Source: Lepikhin et al. 2020, arXiv 2006.16668, without its capacity.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from seqzoo.kernels.across import Sent
from seqzoo.kernels.expert_mlp.reference import Hidden

_imagined: tuple[int, list[Sent]] | None = None  # how many processes that are not there, and what would go to them


@contextmanager
def imagined_owners(ranks: int) -> Iterator[list[Sent]]:
    """Inside, experts are those of one of so many processes that are not there: what it would exchange, where all are
    chosen equally often, is gathered in the list, and what it would get holds nothing. For shapes alone."""
    global _imagined
    before, sent = _imagined, []
    _imagined = (ranks, sent) if ranks > 1 else None
    try:
        yield sent
    finally:
        _imagined = before


def are_elsewhere(experts: Tensor) -> bool:
    """Whether tokens must go to them."""
    return isinstance(experts, DTensor) or _imagined is not None


@_disable_dynamo
def expert_mlp_exchanged(
    run: Callable[..., Tensor], x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor,
    hidden: Hidden | None,
) -> Tensor:  # fmt: skip
    """Same as `expert_mlp`; `run` is that op, for whole experts.

    Raises:
        ValueError: experts that the processes cannot share evenly.
    """
    (N, k), group = chosen.shape, None  # no group: nobody is there
    if _imagined is None:
        group = gate_up.device_mesh.get_group(gate_up.device_mesh.ndim - 1)
        ranks, E = dist.get_world_size(group), gate_up.shape[0]
        gate_up, down = gate_up.to_local(), down.to_local()
    else:
        ranks, E = _imagined[0], gate_up.shape[0] * _imagined[0]
    if E % ranks:
        raise ValueError(f"expert_mlp: gate_up: expected a multiple of {ranks} experts, for so many processes, got {E}")
    owner = (chosen // (E // ranks)).flatten()
    order = owner.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    out, back = _counts(owner, ranks, group)
    local = (chosen % (E // ranks)).flatten()[order]
    which = _exchanged(local, out, back, group)
    rows = _Exchange.apply(x[order // k], out, back, group)
    with imagined_owners(1):
        said = run(rows, which[:, None], rows.new_ones(len(rows), 1), gate_up, down, hidden)
    said = _Exchange.apply(said, back, out, group)[place].view(N, k, -1)
    return (said * weight[..., None]).sum(1).to(x.dtype)


class _Exchange(torch.autograd.Function):
    """rows, so many of them for each process -> those that each process has for this one."""

    @staticmethod
    def forward(ctx, rows: Tensor, out: list[int], back: list[int], group: "dist.ProcessGroup | None") -> Tensor:
        ctx.how = out, back, group
        return _exchanged(rows, out, back, group)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        out, back, group = ctx.how
        return _exchanged(d, back, out, group), None, None, None


def _counts(owner: Tensor, ranks: int, group: "dist.ProcessGroup | None") -> tuple[list[int], list[int]]:
    """How many rows go to each process, and how many come."""
    if group is None:
        even = [len(part) for part in owner.chunk(ranks)]
        even += [0] * (ranks - len(even))
        return even, even
    sent = torch.bincount(owner, minlength=ranks)
    due = torch.empty_like(sent)
    dist.all_to_all_single(due, sent, group=group)
    return sent.tolist(), due.tolist()


def _exchanged(rows: Tensor, out: list[int], back: list[int], group: "dist.ProcessGroup | None") -> Tensor:
    found = rows.new_empty(sum(back), *rows.shape[1:])
    if group is None:
        _imagined[1].append(Sent("all_to_all", rows.nbytes))
    else:
        dist.all_to_all_single(found, rows.contiguous(), back, out, group=group)
    return found
