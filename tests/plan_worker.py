"""One of two processes that torchrun has started: what training steps hold and exchange, for tests/test_plan.py.

    torchrun ... tests/plan_worker.py JOBS.json

A job: folder, overrides. The first process writes FOLDER.json: bytes of weights, gradients and optimizer states that it
has, and payloads of its collectives by their kind.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.train import plain, prepare, ranks_of
from seqzoo.training.settings import Settings
from seqzoo.training.sharded import local

KINDS = {  # what torch calls them -> how, and which argument the payload is; None is what comes out
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::send": ("shift", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional::all_reduce": ("all_reduce", None),
}
QUIET = {"c10d::recv_", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class Collectives(TorchDispatchMode):
    """Payloads of all that is exchanged inside, by how."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made, name = func(*args, **(kwargs or {})), func.name().split(".")[0]
        if name in KINDS:
            how, place = KINDS[name]
            payload = tree_leaves(made if place is None else args[place])
            self.payload[how] += sum(x.nbytes for x in payload if isinstance(x, Tensor))
        elif name.startswith(("c10d::", "_c10d_functional::")) and name not in QUIET:
            raise SystemExit(f"a collective that is not counted: {name}")
        return made


def run(job: dict) -> None:
    with initialize_config_module("seqzoo.configs", version_base=None):
        cfg = compose("train", overrides=job["overrides"])
    torch.manual_seed(0)
    trainer, _ = prepare(cfg, Settings(**plain(cfg.trainer)), Path(job["folder"]), ranks_of(cfg))
    trainer.model.train()
    held: dict[str, int] = {}

    def look(*_) -> None:
        held["gradients"] = sum(local(p.grad).nbytes for p in trainer.params if p.grad is not None)

    trainer.optimizers[0].register_step_pre_hook(look)
    trainer._step(None)  # afterwards everything is there
    with Collectives() as seen:
        trainer._step(None)
    states = [x for o in trainer.optimizers for state in o.state.values() for x in state.values()]
    held["weights"] = sum(local(p).nbytes for p in trainer.model.parameters())
    held["weights"] += sum(x.nbytes for x in trainer.model.buffers())
    held["optimizer"] = sum(local(x).nbytes for x in states if isinstance(x, Tensor))
    if dist.get_rank() == 0:
        Path(job["folder"] + ".json").write_text(json.dumps(dict(held=held, payload=seen.payload)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    dist.destroy_process_group()
