"""Exchanges among processes that have gradients: what each of them does backward, all of them do."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Sent(NamedTuple):
    """One exchange, as one rank has part in it."""

    what: str  # all_gather, all_to_all, shift
    bytes: int  # of the tensor that this rank gives


class Ranks(NamedTuple):
    group: "dist.ProcessGroup | None"
    rank: int
    size: int
    sent: list[Sent] | None = None  # where exchanges are written down instead of done


class Sum(torch.autograd.Function):
    """Every rank's copy of the sum is one of several summands of what is learned: gradients are summed, too."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _summed(x, ranks)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return _summed(d, ctx.ranks), None


class Gather(torch.autograd.Function):
    """x -> every rank's, [ranks, *x.shape]."""

    @staticmethod
    def forward(ctx, x: Tensor, split: Ranks) -> Tensor:
        ctx.split = split
        return _gathered(x, split)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        """Each rank gets what all others owe to its x."""
        return _owed(d, ctx.split), None


class Scatter(torch.autograd.Function):
    """x [ranks, ...], one for each -> the sum of all ranks' for this one."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _owed(x, ranks)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return _gathered(d, ctx.ranks), None


class Tied(torch.autograd.Function):
    """x, with parts in its history: backward, where all ranks must meet, comes by though nothing of them is used."""

    @staticmethod
    def forward(ctx, x: Tensor, parts: Tensor) -> Tensor:
        ctx.shape = parts.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        return d, d.new_zeros(()).expand(ctx.shape)


class FromBefore(torch.autograd.Function):
    """x -> that of the rank before, zeros for the first."""

    @staticmethod
    def forward(ctx, x: Tensor, split: Ranks) -> Tensor:
        ctx.split = split
        return _shifted(x, split, by=1)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        return _shifted(d, ctx.split, by=-1), None


def _shifted(x: Tensor, split: Ranks, *, by: int) -> Tensor:
    """x of rank - by; zeros where there is none."""
    x, found, pending = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format), []
    if split.sent is not None:
        split.sent.append(Sent("shift", x.nbytes))
        return found
    for way, tensor, peer in ((dist.isend, x, split.rank + by), (dist.irecv, found, split.rank - by)):
        if 0 <= peer < split.size:
            pending.append(dist.P2POp(way, tensor, dist.get_global_rank(split.group, peer), split.group))
    for request in dist.batch_isend_irecv(pending):
        request.wait()
    return found


def _summed(x: Tensor, ranks: Ranks) -> Tensor:
    x = x.clone()
    if ranks.sent is None:
        dist.all_reduce(x, group=ranks.group)
    else:
        ranks.sent.append(Sent("all_reduce", x.nbytes))
    return x


def _gathered(x: Tensor, ranks: Ranks) -> Tensor:
    """[ranks, *x.shape]."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
    if ranks.sent is None:
        dist.all_gather(parts, x.contiguous(), group=ranks.group)
    else:
        ranks.sent.append(Sent("all_gather", x.nbytes))
    return torch.stack(parts)


def _owed(x: Tensor, ranks: Ranks) -> Tensor:
    """x [ranks, ...], one for each -> the sum, in the order of ranks, of what all have for this one."""
    owed = torch.empty_like(x, memory_format=torch.contiguous_format)
    if ranks.sent is None:
        dist.all_to_all_single(owed, x.contiguous(), group=ranks.group)
    else:
        ranks.sent.append(Sent("all_to_all", x.nbytes))
    return owed.sum(0)
