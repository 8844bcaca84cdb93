"""Checkpoints of a run on many processes: each writes the parts it has, any number of them reads what it needs.

    step-00000123/
        config.json, tokenizer...                what the model is; its weights are in the shards
        shards/rank-00000.safetensors            the parts that one process had, of weights and optimizer states
        shards.json                              of each tensor its dtype and shape, and of each part where it begins in
                                                 the tensor (`offset`), and in what the file has (`at`, if not at 0)
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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from seqzoo.training.checkpoint import Checkpoints, seal, sha256
from seqzoo.training.sharded import cuts_of, local, place_of, shape_of
from seqzoo.training.shards import INDEX, SHARDS, WEIGHTS, Shards, pieces
from seqzoo.training.split import Split, split_of, splits_of
from seqzoo.training.state import OPTIMIZER, optimizer_kinds


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
        splits: by the names of `tensors`, as `run_splits` gives them.
        facts: plain JSON.
        write_config: writes what is beside the weights into a folder; called by the first process.
        rank, writers: this process, and how many, the first ones, hold a whole copy of everything together.

    All processes call everything here together, but for `is_done`.
    """

    def __init__(
        self, checkpoints: Checkpoints, step: int, tensors: dict[str, Tensor], splits: dict[str, Split],
        facts: dict[str, Any], write_config: Callable[[str], None], *, rank: int, writers: int,
    ) -> None:  # fmt: skip
        self.checkpoints, self.step, self.rank, self.writers = checkpoints, step, rank, writers
        self.facts, self.write_config = facts, write_config
        self.partial, self.final = checkpoints.places(step)
        self.error = self._try(lambda: checkpoints.open(self.partial)) if rank == 0 else None
        if rank == 0 and self.error is None:
            self.error = self._try(lambda: (self.partial / SHARDS).mkdir())
        dist.barrier()
        self.entries: dict[str, dict[str, Any]] = {}
        self.digest: dict[str, Any] = {}
        self.parts = dict(self._parts(tensors, splits)) if rank < writers else {}
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

    def _parts(self, tensors: dict[str, Tensor], splits: dict[str, Split]) -> Iterator[tuple[str, Tensor]]:
        """Copies on the CPU of what this process is to write, each named in `entries`."""
        file = f"{SHARDS}/rank-{self.rank:05d}.safetensors"
        for name, x in tensors.items():
            cut, split = isinstance(x, DTensor), splits.get(name)
            others = self.writers // cuts_of(x) if split is None else 1  # processes side by side that have the same
            if self.rank % others:
                continue
            shape, offset = place_of(x) if cut else (tuple(x.shape), (0,) * x.ndim)
            if 0 in shape and 0 not in x.shape:
                continue
            parts = [dict(file=file, **part) for part in pieces(shape, offset, split)]
            whole = list(shape_of(x, split))
            self.entries[name] = dict(dtype=str(x.dtype).removeprefix("torch."), shape=whole, parts=parts)
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
        written = {part["file"] for entry in index.values() for part in entry["parts"]}
        if written - known.keys():
            raise OSError(f"expected a checksum of {sorted(written - known.keys())}, got none")
        seal(self.partial, self.facts, known)
        self.checkpoints.commit(self.partial, self.final)

    def _try(self, work: Callable[[], Any]) -> str | None:
        try:
            work()
        except Exception as error:  # whatever it was, there is no checkpoint, and the others must know
            return f"rank {self.rank}: {str(error) or type(error).__name__}"
        return None


def run_splits(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Split]:
    """Of what `run_tensors` gives: as the parameter is split, so is what an optimizer remembers of all its places."""
    shapes, splits = {name: x.shape for name, x in model.named_parameters()}, splits_of(model)
    found = {f"{WEIGHTS}{name}": split for name, split in splits.items()}
    for key, x in tensors.items():
        if key.startswith(OPTIMIZER):
            name = key.removeprefix(OPTIMIZER).rpartition("/")[0]
            if name in splits and x.shape == shapes[name]:
                found[key] = splits[name]
    return found


@torch.no_grad()
def load_weights(path: Path, model: nn.Module) -> None:
    """Into a model of the same configuration, cut or whole. Raises ValueError: tensors that do not fit."""
    shards, splits = Shards(path), splits_of(model)
    for name, x in model.state_dict().items():
        local(x).copy_(shards.like(f"{WEIGHTS}{name}", x, splits.get(name)))


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
    split = split_of(p)
    if tuple(shards.index[key]["shape"]) != shape_of(p, split) or not p.ndim:
        return shards.read(key)
    made = torch.zeros_like(p)
    local(made).copy_(shards.like(key, p, split))
    return made
