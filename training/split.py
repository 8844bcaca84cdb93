"""Parameters of which the heads here need a part, of several sections (`training/tensor.py`)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqzoo.kernels.exchanges import Ranks as Over


@dataclass(frozen=True)
class Split:
    """Which part of a parameter the heads here need: of each of its sections the same share, beside each other.

    Attributes:
        dim: the dimension over heads.
        sections: their sizes in the whole parameter.
        over: the processes.
    """

    dim: int
    sections: tuple[int, ...]
    over: Over

    def whole_shape(self, part: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        return *part[: self.dim], part[self.dim] * self.over.size, *part[self.dim + 1 :]

    def take(self, whole: Tensor) -> Tensor:
        pieces = whole.split(self.sections, self.dim)
        return torch.cat([x.chunk(self.over.size, self.dim)[self.over.rank] for x in pieces], self.dim)

    def give(self, part: Tensor) -> Tensor:
        """The whole, of the parts of all processes."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.over.size)]
        dist.all_gather(parts, part.contiguous(), group=self.over.group)
        sizes = [n // self.over.size for n in self.sections]
        pieces = zip(*(x.split(sizes, self.dim) for x in parts), strict=True)  # of each section, every process's
        return torch.cat([x for section in pieces for x in section], self.dim)

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Where places start .. start + length of the part lie: first among them, first in the whole, how many."""
        here = there = 0
        for n in self.sections:
            share = n // self.over.size
            low, high = max(start, here), min(start + length, here + share)
            if low < high:
                yield low - start, there + self.over.rank * share + low - here, high - low
            here, there = here + share, there + n


def splits_of(model: nn.Module) -> dict[str, Split]:
    """By the names of its parameters."""
    found = {}
    for name, part in model.named_modules():
        for own, split in getattr(part, "splits", {}).items():
            found[f"{name}.{own}" if name else own] = split
    return found


def split_of(p: Tensor) -> Split | None:
    """Of a parameter, once they are marked."""
    return getattr(p, "over_heads", None)


def mark_splits(model: nn.Module) -> None:
    """Parameters that have one get an attribute `over_heads`."""
    splits = splits_of(model)
    for name, p in model.named_parameters():
        if name in splits:
            p.over_heads = splits[name]
