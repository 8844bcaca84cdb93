"""One run on many processes: which of them has what, and how they meet. Models know nothing of it.

The processes that torchrun starts are a mesh of replicate x shard x sequence x tensor. A row of a batch is read by the
processes of one (replicate, shard), a stretch of its tokens by each of their sequence x tensor ranks. Heads are dealt
over tensor (`training/tensor.py`); weights are cut over shard and sequence together (PyTorch's fully_shard, block by
block), and copied over replicate. A micro-batch is the same rows, its loss the same sum over the same tokens, on any
number of processes; so are the gradients, but for rounding.
"""

import faulthandler
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from seqzoo.data.packing import IGNORED, Batch
from seqzoo.kernels.across import pool_counts, split_sequence
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.training.layout import Layout
from seqzoo.training.sharded import blocks_of, cut_dim, cuts_of
from seqzoo.training.tensor import Over, Tensors, share_gradients

log = logging.getLogger(__name__)


class Ranks:
    """This process among the others. Alone where torchrun has started none and the layout wants none.

    Args:
        layout: see there.
        device: of this process, "cpu" or "cuda".

    Raises:
        ValueError: a layout that does not fit the number of processes.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.sizes = layout.sizes(self.size)
        self.sharded = layout.shard is None or self.size > 1
        self.mesh: DeviceMesh | None = None
        self.stretches = layout.sequence * layout.tensor  # of a row's tokens
        self.world = self.line = None
        if not self.sharded:
            return
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            timeout = timedelta(seconds=layout.timeout_seconds)
            store = next(dist.rendezvous("env://", timeout=timeout))[0] if "RANK" in os.environ else dist.HashStore()
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # addresses of those before it are of the dead
            store = dist.PrefixStore(f"attempt {attempt}", store)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timeout, store=store, rank=self.rank, world_size=self.size)
        names = ("replicate", "shard", "sequence", "tensor")
        self.mesh = init_device_mesh(device.type, self.sizes, mesh_dim_names=names)
        self.world = dist.group.WORLD
        self.line = self.mesh["sequence", "tensor"]._flatten("line").get_group() if self.stretches > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def finish_gradients(self, model: nn.Module) -> None:
        """After a step's last backward pass: what weights that are not cut over all processes do not know yet."""
        if self.layout.tensor > 1:
            some = [p for p in model.parameters() if p.grad is not None and cuts_of(p) < self.writers]
            share_gradients(some, self.mesh.get_group("tensor"))
        for module in model.modules() if self.layout.expert_parallel and self.size > 1 else ():
            for name in getattr(module, "BY_EXPERT", ()):
                grad = getattr(module, name).grad
                if grad is not None:
                    here = grad.to_local()
                    here /= self.size  # the others' are means over all processes
                    if self.sizes[0] > 1:
                        dist.all_reduce(here, group=self.mesh.get_group("replicate"))

    @property
    def writers(self) -> int:
        """The first so many processes have all weights together."""
        return self.sizes[1] * self.stretches

    @property
    def readers(self) -> int:
        """Parts that the rows of a batch are dealt into."""
        return self.sizes[0] * self.sizes[1]

    def check(self, *, rows: int, length: int) -> None:
        """Raises ValueError: rows or tokens that cannot be dealt evenly; the message names the number to change."""
        if rows % self.readers:
            raise ValueError(f"trainer.batch_size: expected a multiple of replicate x shard={self.readers}, got {rows}")
        if length % self.stretches:
            cuts = f"sequence={self.layout.sequence}" + (f" x tensor={self.layout.tensor}" * (self.layout.tensor > 1))
            raise ValueError(f"trainer.sequence_length: expected a multiple of {cuts}, got {length}")

    def agree(self, config: dict[str, Any]) -> None:
        """Raises ValueError on every process: their configurations differ."""
        if not self.sharded:
            return
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (digest, config))
        others = [rank for rank, (other, _) in enumerate(found) if other != found[0][0]]
        if others:
            theirs = found[others[0]][1]
            keys = sorted(key for key in theirs.keys() | found[0][1].keys() if theirs.get(key) != found[0][1].get(key))
            raise ValueError(f"expected one configuration on all processes, got another on {others}, in {keys}")

    def cut(self, model: SeqZooForCausalLM) -> SeqZooForCausalLM:
        """Weights block by block over the mesh; where they are on the meta device, without values."""
        if not self.sharded:
            return model
        tensor, over_all = self.layout.tensor, self._mesh("shard", "sequence", "tensor")
        apart = self._cut_experts(model, over_all) if self.layout.expert_parallel else set()
        if tensor > 1:
            self._deal_heads(model)
        over_some = over_all if tensor == 1 else self._mesh("shard", "sequence")  # the others have other heads
        parts = over_some.size(over_some.ndim - 1)
        place = lambda p: Shard(cut_dim(p.shape, parts))
        for block in blocks_of(model):
            fully_shard(block, mesh=over_some, ignored_params=apart, shard_placement_fn=place)
        fully_shard(model, mesh=over_all, ignored_params=apart)
        return model

    def _mesh(self, *names: str) -> DeviceMesh:
        """Those whose weights are put together, and before them, if there are any, those that have copies."""
        weights = self.mesh[names]._flatten("_".join(names))
        if self.sizes[0] == 1:
            return weights
        ranks = self.mesh.mesh.movedim(3, 0)[self.mesh.get_local_rank("tensor")].flatten(1)
        ranks = self.mesh.mesh.flatten(1) if "tensor" in names else ranks
        groups = [self.mesh.get_group("replicate"), weights.get_group()]
        return DeviceMesh.from_group(groups, self.device.type, mesh=ranks, mesh_dim_names=("replicate", "weights"))

    def _deal_heads(self, model: SeqZooForCausalLM) -> None:
        """Raises ValueError: heads that cannot be dealt, or matrices whose inputs are spiked."""
        if model.config.spikes is not None or model.config.quantisation is not None:
            raise ValueError(
                "parallel.tensor: expected 1 for a model with spikes or int8 weights, which look at all channels"
            )
        group = lambda name: self.mesh.get_group(name)
        over = Over(group("tensor"), self.mesh.get_local_rank("tensor"), self.layout.tensor)
        inside = partial(split_sequence, group("sequence") if self.layout.sequence > 1 else None)
        Tensors(over, self.line, inside).deal(model, leave_out=("BY_EXPERT",) if self.layout.expert_parallel else ())

    def _cut_experts(self, model: SeqZooForCausalLM, mesh: DeviceMesh) -> set[nn.Parameter]:
        """Stacks of experts, of which this process keeps some. Raises ValueError: a number that cannot be dealt."""
        placements, apart = [*[Replicate()] * (mesh.ndim - 1), Shard(0)], set()
        for module in model.modules():
            for name in getattr(module, "BY_EXPERT", ()):
                x = getattr(module, name)
                if x is None:  # whole numbers, which stay together
                    continue
                if len(x) % self.writers:
                    who = "shard x sequence" + " x tensor" * (self.layout.tensor > 1)
                    raise ValueError(
                        f"parallel.expert_parallel: expected a multiple of {who}={self.writers} experts, got {len(x)}"
                    )
                here = x.detach().chunk(self.writers)[self.rank % self.writers].clone()
                cut = DTensor.from_local(here, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
                setattr(module, name, nn.Parameter(cut, requires_grad=x.requires_grad))
                apart.add(getattr(module, name))
        return apart

    def rows_here(self, rows: int) -> slice:
        """Of so many rows, a multiple of `readers`, those that this process reads."""
        part, reader = rows // self.readers, self.rank // self.stretches
        return slice(reader * part, (reader + 1) * part)

    def mine(self, batch: Batch) -> Batch:
        """Of a batch of all processes, this one's rows and stretch of tokens; rows that are missing are empty."""
        if self.size == 1:
            return batch
        empty = batch.input_ids.new_zeros(-len(batch.input_ids) % self.readers, batch.input_ids.shape[1])
        positions = torch.cat([batch.position_ids, empty + torch.arange(empty.shape[1])])
        ids, labels = torch.cat([batch.input_ids, empty]), torch.cat([batch.shift_labels, empty + IGNORED])
        here = self.rows_here(len(ids))
        return self.stretch(Batch(ids[here], positions[here], labels[here], batch.num_targets, batch.num_bytes))

    def stretch(self, batch: Batch) -> Batch:
        """Of a batch of this process's rows, its stretch of tokens."""
        if self.size == 1:
            return batch
        at, T = self.rank % self.stretches, batch.input_ids.shape[1]
        here = slice(at * T // self.stretches, (at + 1) * T // self.stretches)
        return Batch(*(x[:, here].contiguous() for x in batch[:3]), batch.num_targets, batch.num_bytes)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a model's call and its backward pass."""
        with split_sequence(self.line), pool_counts(self.world if self.size > 1 else None):
            yield

    def sum(self, x: Tensor) -> Tensor:
        """Over all processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.sum(torch.tensor(float(here), device=self.device)).item()) if self.size > 1 else here

    def most(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each over all processes."""
        if self.size == 1:
            return numbers
        found = torch.tensor(numbers, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def say(self, find: Callable[[], Any]) -> Any:
        """What the first process finds, on all of them. Raises ValueError on all: it raised one."""
        if self.size == 1:
            return find()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = find()
            except ValueError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise ValueError(told[1])
        return told[0]

    def settle(self, model: nn.Module) -> None:
        """After a call without a backward pass, which leaves some weights whole: cut again, under their own names."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def sync_gradients(self, model: nn.Module, last: bool) -> None:
        """Before each backward pass: only the last of a step's exchanges gradients."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)

    @contextmanager
    def watched(self, folder: Path) -> Iterator[Callable[[], None]]:
        """Training, with something to call at each step: where none comes for long, this process writes down where it
        is, shortly before the others give it up. Who waited where is then in `folder`, rank-N.trace."""
        if self.size == 1:
            yield lambda: None
            return
        path, seconds = folder / f"rank-{self.rank}.trace", 0.8 * self.layout.timeout_seconds
        with path.open("w") as file:
            try:
                yield lambda: faulthandler.dump_traceback_later(seconds, file=file)
            finally:
                faulthandler.cancel_dump_traceback_later()
                if not path.stat().st_size:
                    path.unlink()

    def close(self) -> None:
        if self.sharded and dist.is_initialized():
            dist.destroy_process_group()
