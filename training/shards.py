"""Reading a sharded checkpoint (`sharded_checkpoint.py`): an index, which may lie, and parts of tensors in files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqzoo.training.sharded import local, place_of, shape_of
from seqzoo.training.split import Split

INDEX, SHARDS, WEIGHTS = "shards.json", "shards", "weights/"


def is_sharded(path: Path) -> bool:
    return (path / INDEX).is_file()


def pieces(shape: tuple[int, ...], offset: tuple[int, ...], split: Split | None) -> Iterator[dict[str, list[int]]]:
    """Where a part of so many places from `offset` on lies in the whole, piece by piece, and each piece in the part."""
    if split is None:
        yield dict(offset=list(offset), shape=list(shape))
        return
    dim, none = split.dim, [0] * len(shape)
    put = lambda places, value: [*places[:dim], value, *places[dim + 1 :]]
    for here, there, n in split.runs(offset[dim], shape[dim]):
        yield dict(offset=put(offset, there), shape=put(shape, n), at=put(none, here))


def _is_entry(entry: Any) -> bool:
    """Whether an index may say this of a tensor: parts inside it, in files of the checkpoint's own."""
    sizes = lambda x, n: isinstance(x, list) and len(x) == n and all(type(i) is int and i >= 0 for i in x)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "parts"}:
        return False
    whole, dims = entry["shape"], len(entry["shape"]) if isinstance(entry["shape"], list) else -1
    if dims < 0 or not sizes(whole, dims) or not isinstance(entry["parts"], list):
        return False
    if not isinstance(entry["dtype"], str) or not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
        return False
    return all(
        isinstance(part, dict)
        and {"file", "offset", "shape"} <= part.keys() <= {"file", "offset", "shape", "at"}
        and isinstance(part["file"], str)
        and re.fullmatch(rf"{SHARDS}/rank-\d+\.safetensors", part["file"]) is not None
        and all(sizes(part[name], dims) for name in part.keys() - {"file"})
        and all(a + n <= size for a, n, size in zip(part["offset"], part["shape"], whole, strict=True))
        for part in entry["parts"]
    )


class Shards:
    """The tensors of a sharded checkpoint, read as they are needed. Raises ValueError: an index that is no index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.index = json.loads((path / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path / INDEX}: expected an index of tensors: {error}") from error
        if not isinstance(self.index, dict):
            raise ValueError(f"{path / INDEX}: expected an index of tensors, got {type(self.index).__name__}")
        for name, entry in self.index.items():
            if not _is_entry(entry):
                raise ValueError(f"{path / INDEX}: {name}: expected parts of a tensor in {SHARDS}, got {entry!r:.300}")

    def read(self, name: str, shape: tuple[int, ...] | None = None, offset: tuple[int, ...] | None = None) -> Tensor:
        """A tensor, or the part of it that has this shape and begins there.

        Raises:
            ValueError: there is no such tensor, or its parts do not make it up.
        """
        entry = self.index.get(name)
        if entry is None:
            raise ValueError(f"{self.path}: expected a tensor {name!r}, got none of that name")
        shape = tuple(entry["shape"]) if shape is None else shape
        offset = (0,) * len(shape) if offset is None else offset
        found, filled = torch.empty(shape, dtype=getattr(torch, entry["dtype"])), torch.zeros(shape, dtype=torch.bool)
        for part in entry["parts"]:
            low = [max(a, b) for a, b in zip(offset, part["offset"], strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, part["offset"], part["shape"], strict=True)]
            if any(h <= at for h, at in zip(high, low, strict=True)):
                continue
            begins = [b - at for b, at in zip(part["offset"], part.get("at", [0] * len(shape)), strict=True)]
            there = tuple(slice(a - b, h - b) for a, h, b in zip(low, high, begins, strict=True))
            here = tuple(slice(a - b, h - b) for a, h, b in zip(low, high, offset, strict=True))
            try:
                with safe_open(self.path / part["file"], "pt") as file:
                    x = file.get_slice(name)[there] if there else file.get_tensor(name)
            except (OSError, SafetensorError, IndexError) as error:
                raise ValueError(f"{self.path}: {name}: expected a part of it in {part['file']}: {error}") from error
            if x.shape != found[here].shape or x.dtype != found.dtype or filled[here].any():
                raise ValueError(f"{self.path}: {name}: expected {part}, once, got {list(x.shape)} of {x.dtype}")
            found[here], filled[here] = x, True
        if not filled.all():
            missing = int((~filled).sum())
            raise ValueError(f"{self.path}: {name}: expected parts of {found.numel()} numbers, {missing} are missing")
        return found

    def like(self, name: str, x: Tensor, split: Split | None = None) -> Tensor:
        """What this process needs, where x is cut. Raises ValueError: as `read`, or a tensor of another shape."""
        wanted = shape_of(x, split)
        if name in self.index and tuple(self.index[name]["shape"]) != wanted:
            raise ValueError(f"{name}: expected shape {wanted}, got {self.index[name]['shape']}")
        shape, offset = place_of(x) if isinstance(x, DTensor) else (tuple(x.shape), (0,) * x.ndim)
        found = [self.read(name, piece["shape"], piece["offset"]) for piece in pieces(shape, offset, split)]
        return torch.cat(found, split.dim) if len(found) > 1 else found[0] if found else local(x).new_empty(shape)


def whole_state(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights by name, one after the other."""
    shards = Shards(path)
    for name in shards.index:
        if name.startswith(WEIGHTS):
            yield name.removeprefix(WEIGHTS), shards.read(name)
