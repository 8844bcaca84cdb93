"""One sequence over several processes: each has a stretch of its tokens, in the order of their ranks.

    with split_sequence(group):
        y, _ = layer(x[:, mine], span_of_mine)        every rank calls the same; backward inside, too
        y.sum().backward()                            of x's stretch; of parameters a rank's share of a sum

Layers and models know nothing of it: what they call is one op, wherever the tokens are. A recurrence is run from an
empty memory, beside it what the stretch does to any memory (its transition) and how its tokens read the first one; one
gathering of (memory, transition) tells each rank the memory that its stretch begins with. A convolution or a window
takes what it needs from the rank before, full attention gathers keys and values.

No state goes in while the sequence is split, and what comes out beside the outputs is of the end of the stretch.
torch.compile compiles what lies between exchanges: ranks compile at their own pace, and exchanges meet in order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, which is imported with all that compiles

from seqzoo.kernels.exchanges import FromBefore, Gather, Ranks, Scatter, Sent, Sum, Tied

WIDEST = 256  # channels of a value that every kernel takes


_split: Ranks | None = None  # plain globals, of the whole process
_pool: "dist.ProcessGroup | None" = None


@contextmanager
def split_sequence(group: "dist.ProcessGroup | None") -> Iterator[None]:
    """Inside, the ops' tokens are a stretch of a sequence over the group's processes; None, or one alone: all of it."""
    global _split
    before = _split
    alone = group is None or dist.get_world_size(group) == 1
    _split = None if alone else Ranks(group, dist.get_rank(group), dist.get_world_size(group))
    try:
        yield
    finally:
        _split = before


@contextmanager
def imagined(size: int, sent: list[Sent] | None = None) -> Iterator[list[Sent]]:
    """Inside, tokens are the last stretch of a sequence over so many ranks that are not there: what this one would
    exchange is gathered in a list, a new one or `sent`, and what it would get holds nothing. For shapes alone."""
    global _split
    before, sent = _split, [] if sent is None else sent
    _split = Ranks(None, size - 1, size, sent) if size > 1 else None
    try:
        yield sent
    finally:
        _split = before


def ranks() -> Ranks | None:
    """Over whom the sequence is split; None where it is whole."""
    return _split


def check_whole(op: str, state: object) -> None:
    """Raises ValueError: a state, while the sequence is split."""
    if state is not None:
        raise ValueError(f"{op}: state: expected None while the sequence is split over ranks, got one")


@_disable_dynamo
def gathered(x: Tensor, over: Ranks | None = None) -> Tensor:
    """x of every rank, [ranks, *x.shape], with gradients. `over`: other ranks than those the sequence is split over."""
    return Gather.apply(x, over or _split)


def joined(x: Tensor, over: Ranks | None = None) -> Tensor:
    """x [B, T, ...] of every rank, one after the other, [B, ranks T, ...], with gradients."""
    return gathered(x, over).movedim(0, 1).flatten(1, 2)


@_disable_dynamo
def summed(x: Tensor, over: Ranks) -> Tensor:
    """The sum of all ranks' x, with gradients: what is learned is the sum of what is made of each one's copy."""
    return Sum.apply(x, over)


@_disable_dynamo
def summed_stretch(x: Tensor, over: Ranks) -> Tensor:
    """x [B, ranks T, ...], a summand on every rank -> this rank's stretch [B, T, ...] of the sum, with gradients."""
    return Scatter.apply(x.unflatten(1, (over.size, -1)).movedim(1, 0), over)


@_disable_dynamo
def from_before(x: Tensor) -> Tensor:
    """x of the rank before, zeros for the first, with gradients."""
    return FromBefore.apply(x, _split)


def open_until_end(starts: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """[B, T] bool: tokens after which no document starts in the stretch."""
    if starts is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return starts.flip(1).cumsum(1).flip(1) - starts.int() == 0


def open_from_begin(starts: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """[B, T] bool: tokens of the document that the stretch begins in the middle of."""
    if starts is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return starts.cumsum(1) == 0


@_disable_dynamo
def memory_before(end: Tensor, moves: Callable[[Tensor, Tensor], Tensor], transition: Tensor) -> Tensor:
    """The memory with which this rank's stretch begins.

    Args:
        end: [.., R, V] the memory after the stretch, begun empty.
        transition: [.., R, X] what the stretch does to a memory.
        moves: transition, memory -> the memory moved.
    """
    V, parts = end.shape[-1], gathered(torch.cat([end, transition.to(end.dtype)], dim=-1))
    memory = Tied.apply(torch.zeros_like(end), parts)
    for part in parts[: _split.rank]:
        memory = part[..., :V] + moves(part[..., V:], memory)
    return memory


def recurrence(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], v: Tensor, rows: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """A recurrence that is linear in its memory [B, H, *rows, V], of values v [B, T, H, V].

    run(values, memory) -> (what is read, the next memory) takes values of any width: each column is by itself. So the
    columns of the identity, with values of 0, come out as the transition, and as how each token reads what was there.
    """
    (B, T, H, V), R = v.shape, 1
    for n in rows:
        R *= n
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        identity = torch.eye(R, dtype=dtype, device=v.device).view(*rows, R).expand(B, H, *rows, R)
        empty, nothing = v.new_zeros(B, H, *rows, V, dtype=dtype), v.new_zeros(B, T, H, R)
        if V + R <= WIDEST:
            o, end = run(torch.cat([v, nothing], -1), torch.cat([empty, identity], -1))
            (o, reads), (end, transition) = o.split([V, R], -1), end.split([V, R], -1)
        else:
            (o, end), (reads, transition) = run(v, empty), run(nothing, identity.contiguous())
        end, transition = end.reshape(B, H, R, V), transition.reshape(B, H, R, R)
        before = memory_before(end, torch.matmul, transition)
        o = o + torch.einsum("bthr,bhrv->bthv", reads.to(dtype), before).to(o.dtype)
        return o, (end + transition @ before).view(B, H, *rows, V)


@_disable_dynamo
def anywhere(here: bool, device: torch.device) -> bool:
    """Whether it is so on any of the processes of `pool_counts`; outside of that, here."""
    if _pool is None:
        return here
    found = torch.tensor(float(here), device=device)
    dist.all_reduce(found, group=_pool)
    return bool(found.item())


@contextmanager
def pool_counts(group: "dist.ProcessGroup | None") -> Iterator[None]:
    """Inside, what a model counts over its tokens is counted over those of all the group's processes; None: its own."""
    global _pool
    before, _pool = _pool, group
    try:
        yield
    finally:
        _pool = before


def pooled(counts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Sums over all ranks inside `pool_counts`, with gradients; else the very counts."""
    return counts if _pool is None or not any(counts) else _pooled(counts)


@_disable_dynamo
def _pooled(counts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    flat = [x for block in counts for x in block.values()]
    sizes = [x.numel() for x in flat]
    sums = iter(Sum.apply(torch.cat([x.flatten() for x in flat]), Ranks(_pool, 0, 0)).split(sizes))
    return [{name: next(sums).view_as(x).clone() for name, x in block.items()} for block in counts]
