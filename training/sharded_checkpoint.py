"""Checkpoints of a run on many processes: each writes the parts it has, any number of them reads what it needs.

    step-00000123/
        config.json, tokenizer...                what the model is; its weights are in the shards
        shards/rank-00000.safetensors            the parts that one process had, of weights and optimizer states
        shards.json                              of each tensor its dtype and shape, and where which part of it lies
        training.json, manifest.json             as in a checkpoint of one process

Parts are taken to the CPU at once, and written while training goes on; the folder gets its name when all are there.
Not PyTorch's own distributed format, whose index is a pickle: these folders are sent around, and a checkpoint is data.
`seqzoo-export` makes of one a folder that `from_pretrained` opens.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from seqzoo.training.checkpoint import Checkpoints, seal, sha256
from seqzoo.training.sharded import local, place_of
from seqzoo.training.state import OPTIMIZER, optimizer_kinds

INDEX, SHARDS, WEIGHTS = "shards.json", "shards", "weights/"


def is_sharded(path: Path) -> bool:
    return (path / INDEX).is_file()


def run_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """All that a run must remember as tensors, by name, cut or whole."""
    names = {p: name for name, p in model.named_parameters()}
    found = {f"{WEIGHTS}{name}": x for name, x in model.state_dict().items()}
    for optimizer in optimizers:
        for p, memory in optimizer.state.items():
            found |= {f"{OPTIMIZER}{names[p]}/{what}": x for what, x in memory.items()}
    return found


class Saving:
    """A checkpoint on its way to the disk.

    Args:
        checkpoints: of the run.
        step: its name.
        tensors: as `run_tensors` gives them, and what else there is to keep.
        facts: plain JSON.
        write_config: writes what is beside the weights into a folder; called by the first process.
        rank, writers: this process, and how many, the first ones, hold a whole copy of everything together.

    All processes call everything here together, but for `is_done`.
    """

    def __init__(
        self, checkpoints: Checkpoints, step: int, tensors: dict[str, Tensor], facts: dict[str, Any],
        write_config: Callable[[str], None], *, rank: int, writers: int,
    ) -> None:  # fmt: skip
        self.checkpoints, self.step, self.rank = checkpoints, step, rank
        self.facts, self.write_config = facts, write_config
        self.partial, self.final = checkpoints.places(step)
        self.error = self._try(lambda: checkpoints.open(self.partial)) if rank == 0 else None
        if rank == 0 and self.error is None:
            self.error = self._try(lambda: (self.partial / SHARDS).mkdir())
        dist.barrier()
        self.entries: dict[str, dict[str, Any]] = {}
        self.digest: dict[str, Any] = {}
        self.parts = dict(self._parts(tensors)) if rank < writers else {}
        self.thread = Thread(target=self._write, daemon=True)
        self.thread.start()

    def is_done(self) -> bool:
        """Whether this process has written its parts."""
        return not self.thread.is_alive()

    def finish(self) -> Path:
        """Wait for all, and give the folder its name.

        Raises:
            OSError: a process could not write; nothing is left of this checkpoint, and the others are untouched.
        """
        self.thread.join()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self.error, self.entries, self.digest))
        errors = [error for error, _, _ in found if error]
        if self.rank == 0 and not errors:
            error = self._try(lambda: self._seal([entries for _, entries, _ in found], [x for _, _, x in found]))
            errors = [error] if error else []
        told = [errors]
        dist.broadcast_object_list(told)
        if told[0]:
            if self.rank == 0:
                self.checkpoints.drop(self.partial)
            raise OSError("; ".join(told[0]))
        return self.final

    def _parts(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Copies on the CPU of what this process is to write, each named in `entries`."""
        file = f"{SHARDS}/rank-{self.rank:05d}.safetensors"
        for name, x in tensors.items():
            cut = isinstance(x, DTensor)
            if not cut and self.rank:  # the same everywhere
                continue
            shape, offset = place_of(x) if cut else (tuple(x.shape), (0,) * x.ndim)
            if 0 in shape and 0 not in x.shape:
                continue
            part = dict(file=file, offset=list(offset), shape=list(shape))
            self.entries[name] = dict(dtype=str(x.dtype).removeprefix("torch."), shape=list(x.shape), parts=[part])
            yield name, local(x.detach()).to("cpu", copy=True).contiguous()

    def _write(self) -> None:
        if self.error is None and self.parts:
            self.error = self._try(self._write_parts)
        self.parts = {}

    def _write_parts(self) -> None:
        name = next(iter(self.entries.values()))["parts"][0]["file"]
        try:
            save_file(self.parts, self.partial / name)
        except SafetensorError as error:  # an input or output error in other clothes
            raise OSError(str(error)) from error
        self.digest[name] = sha256(self.partial / name)

    def _seal(self, entries: list[dict[str, Any]], digests: list[dict[str, str]]) -> None:
        index: dict[str, dict[str, Any]] = {}
        for found in entries:
            for name, entry in found.items():
                if name in index:
                    index[name]["parts"] += entry["parts"]
                else:
                    index[name] = entry
        (self.partial / INDEX).write_text(json.dumps(index))
        self.write_config(str(self.partial))
        known = {name: digest for found in digests for name, digest in found.items()}
        seal(self.partial, self.facts, known)
        self.checkpoints.commit(self.partial, self.final)

    def _try(self, work: Callable[[], Any]) -> str | None:
        try:
            work()
        except OSError as error:
            return f"rank {self.rank}: {error}"
        return None


class Shards:
    """The tensors of a sharded checkpoint, read as they are needed. Raises ValueError: an index that is no index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.index = json.loads((path / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path / INDEX}: expected an index of tensors: {error}") from error

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
        found, filled = torch.empty(shape, dtype=getattr(torch, entry["dtype"])), 0
        for part in entry["parts"]:
            low = [max(a, b) for a, b in zip(offset, part["offset"], strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, part["offset"], part["shape"], strict=True)]
            if any(h <= at for h, at in zip(high, low, strict=True)):
                continue
            there = tuple(slice(a - b, h - b) for a, h, b in zip(low, high, part["offset"], strict=True))
            here = tuple(slice(a - b, h - b) for a, h, b in zip(low, high, offset, strict=True))
            with safe_open(self.path / part["file"], "pt") as file:
                x = file.get_slice(name)[there] if there else file.get_tensor(name)
            found[here] = x
            filled += x.numel()
        if filled != found.numel():
            raise ValueError(f"{self.path}: {name}: expected parts of {found.numel()} numbers, got {filled}")
        return found

    def like(self, name: str, x: Tensor) -> Tensor:
        """What this process needs, where x is cut. Raises ValueError: as `read`, or a tensor of another shape."""
        if name in self.index and tuple(self.index[name]["shape"]) != tuple(x.shape):
            raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {self.index[name]['shape']}")
        return self.read(name, *place_of(x)) if isinstance(x, DTensor) else self.read(name)


@torch.no_grad()
def load_weights(path: Path, model: nn.Module) -> None:
    """Into a model of the same configuration, cut or whole. Raises ValueError: tensors that do not fit."""
    shards = Shards(path)
    for name, x in model.state_dict().items():
        local(x).copy_(shards.like(f"{WEIGHTS}{name}", x))


def load_optimizers(path: Path, model: nn.Module, optimizers: list[Optimizer], kinds: dict[str, str]) -> None:
    """The optimizers' memories, cut as their parameters are.

    Raises:
        ValueError: a parameter that is stepped by another kind of optimizer than it was, or tensors that do not fit.
    """
    now = optimizer_kinds(model, optimizers)
    for name in sorted(kinds.keys() | now.keys()):
        if kinds.get(name) != now.get(name):
            raise ValueError(f"optimizer: expected {kinds.get(name)} for {name}, got {now.get(name)}")
    shards, names = Shards(path), {p: name for name, p in model.named_parameters()}
    what: dict[str, list[str]] = {}
    for key in shards.index:
        if key.startswith(OPTIMIZER):
            name, _, one = key.removeprefix(OPTIMIZER).rpartition("/")
            what.setdefault(name, []).append(one)
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p] = {one: _memory(shards, names[p], one, p) for one in what.get(names[p], [])}


def _memory(shards: Shards, name: str, one: str, p: Tensor) -> Tensor:
    """Of the parameter's shape, and then cut as it is; or a number."""
    key = f"{OPTIMIZER}{name}/{one}"
    if tuple(shards.index[key]["shape"]) != tuple(p.shape) or not p.ndim:
        return shards.read(key)
    made = torch.zeros_like(p)
    local(made).copy_(shards.like(key, p))
    return made


def whole_state(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights by name, one after the other."""
    shards = Shards(path)
    for name in shards.index:
        if name.startswith(WEIGHTS):
            yield name.removeprefix(WEIGHTS), shards.read(name)
