"""One of several processes that torchrun has started: the runs that a file of JSON lists, one after the other.

    torchrun ... tests/ranks_worker.py JOBS.json

A job: folder, overrides; perhaps `config`, another than train; `fails`, the beginning of what a ValueError must say;
`alone`, overrides of the first process only; `die`, a list of [step or "save", n]: the last process kills itself in
that step, or while it writes that step's checkpoint, once each; or ["hang", n], it never ends that step.
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module

from seqzoo.train import train, train_in_stages
from seqzoo.training.sharded_checkpoint import Saving
from seqzoo.training.stopping import StopRequest
from seqzoo.training.trainer import Trainer

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def once(mark: Path) -> None:
    """Kill this process, if it is the last and has not done so before."""
    if RANK == SIZE - 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def deadly(folder: Path, moments: list) -> list:
    """Patches that kill at these moments."""
    step, write = Trainer._step, Saving._write_parts
    steps = {n for what, n in moments if what == "step"}
    saves = {n for what, n in moments if what == "save"}

    def dying_step(self, *args):
        if self.step in hangs and RANK == SIZE - 1:
            time.sleep(600)
        if self.step in steps:
            once(folder / f"died-step-{self.step}")
        return step(self, *args)

    def dying_write(self):
        if self.step in saves:
            once(folder / f"died-save-{self.step}")
        write(self)

    hangs = {n for what, n in moments if what == "hang"}
    return [patch.object(Trainer, "_step", dying_step), patch.object(Saving, "_write_parts", dying_write)]


def run(job: dict) -> None:
    folder = Path(job["folder"])
    overrides = [*job["overrides"], *(job.get("alone", []) if RANK == 0 else [])]
    with initialize_config_module("seqzoo.configs", version_base=None):
        cfg = compose(job.get("config", "train"), overrides=overrides)
    patches = [patch("seqzoo.train.draw_losses"), *deadly(folder.parent, job.get("die", []))]
    for one in patches:
        one.start()
    try:
        hangs = any(what == "hang" for what, _ in job.get("die", []))  # and then does not heed a polite signal either
        with nullcontext(StopRequest()) if hangs else StopRequest() as stop:
            (train if cfg.stages is None else train_in_stages)(cfg, folder, stop)
    except ValueError as error:
        if "fails" not in job or not str(error).startswith(job["fails"]):
            raise
    else:
        if "fails" in job:
            raise SystemExit(f"{job['folder']}: expected {job['fails']!r}, and it ran")
    finally:
        for one in patches:
            one.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    if dist.is_initialized():
        dist.destroy_process_group()
