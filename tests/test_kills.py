"""Runs that are killed again and again, at moments drawn at random, and end as if nothing had been:

    pytest -m slow tests/test_kills.py --kills 20

A moment is a time after the start, a time after a step, or a time after a checkpoint's folder has appeared, which is
then half written. One process is killed, and torchrun ends the others; or all of them at once.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from runs import HYBRID, options, written
from safetensors.torch import load_file

from seqzoo.training.checkpoint import PARTIAL, damage_of

WORKER = Path(__file__).parent / "ranks_worker.py"
STEPS, EVERY = 36, 3
NUMBERS = dict(steps=STEPS, batch_size=4, log_every=1, validate_every=20, checkpoint_every=EVERY, sample_tokens=0)
LAYOUTS = {"single": 1, "fsdp": 2, "context": 2}


def started(folder, layout):
    """torchrun, or the one process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = options(folder, f"parallel={layout}", "optimizer=adamw", model=HYBRID, resume="auto", **NUMBERS)
    jobs = folder.parent / "jobs.json"
    jobs.write_text(json.dumps([dict(folder=str(folder), overrides=words)]))
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={LAYOUTS[layout]}", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0"]
    command = [sys.executable, *(torchrun if LAYOUTS[layout] > 1 else []), str(WORKER), str(jobs)]
    log = (folder.parent / "said").open("ab")
    return subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_of(folder):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines() if (folder / "metrics.jsonl").exists() else []
    return sum(b'"train"' in line for line in lines)


def partials(folder):
    return {path.name for path in folder.glob(f"checkpoints/*{PARTIAL}*")}


def wait(process, folder, draw):
    """Until a moment that is drawn -> what it was; None where the run ended before."""
    kind, began, step, seen = (
        draw.choice(["time", "step", "save", "save"]),
        time.time(),
        steps_of(folder),
        partials(folder),
    )
    until = draw.randint(step + 1, max(step + 1, STEPS - 2))
    delay = draw.uniform(0, 9) if kind == "time" else draw.uniform(0, 0.03)
    while process.poll() is None:
        reached = dict(
            time=lambda: time.time() - began > delay, step=lambda: steps_of(folder) >= until,
            save=lambda: steps_of(folder) >= until - EVERY and partials(folder) - seen,
        )  # fmt: skip
        if reached[kind]():
            time.sleep(delay if kind != "time" else 0)
            return (
                f"{kind}, at step {steps_of(folder)}, {len(partials(folder))} half written"
                if process.poll() is None
                else None
            )
        time.sleep(0.002)
    return None


def kill(process, draw, ranks):
    """One of the processes, or all at once; and wait until nothing is left of them."""
    workers = children(process.pid) if ranks > 1 else []
    if workers and draw.random() < 0.5:
        os.kill(draw.choice(workers), signal.SIGKILL)
        assert process.wait(timeout=120) != 0
        return "one"
    os.killpg(process.pid, signal.SIGKILL)
    for pid in workers:  # torchrun puts them into sessions of their own
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
    return "all"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_random_moments(layout, tmp_path, request):
    draw, left, number = random.Random(0), request.config.getoption("kills"), 0
    whole = tmp_path / "whole" / "run"
    assert started(whole, layout).wait(timeout=300) == 0, (tmp_path / "whole" / "said").read_text()[-3000:]
    while left:
        folder, number = tmp_path / f"killed-{number}" / "run", number + 1
        while True:
            process = started(folder, layout)
            moment = wait(process, folder, draw) if left else None
            if moment is None:
                status = process.wait(timeout=300)
                if status == 0:
                    break
                raise AssertionError((folder.parent / "said").read_text()[-5000:])
            print(f"{layout}: killed {kill(process, draw, LAYOUTS[layout])}: {moment}", flush=True)
            left -= 1
        assert_same(folder, whole)


@pytest.mark.slow
def test_asked_to_leave(tmp_path):
    """SIGTERM to torchrun, as a cluster sends it: the step is finished and saved, and the run goes on from there."""
    whole, folder = tmp_path / "whole" / "run", tmp_path / "left" / "run"
    assert started(whole, "fsdp").wait(timeout=300) == 0
    for step in (5, 20):
        process = started(folder, "fsdp")
        while steps_of(folder) < step:
            assert process.poll() is None, (folder.parent / "said").read_text()[-3000:]
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) != 0
        newest = sorted((folder / "checkpoints").iterdir())[-1]
        assert damage_of(newest) is None and newest.name == f"step-{steps_of(folder):08d}"
    assert started(folder, "fsdp").wait(timeout=300) == 0
    assert_same(folder, whole)


def assert_same(folder, whole):
    """What is written down, and what the last checkpoint holds."""
    assert written(folder) == written(whole)
    ours, theirs = (x / "checkpoints" / f"step-{STEPS:08d}" for x in (folder, whole))
    assert damage_of(ours) is None
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert files and files == sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    for file in files:
        one, other = load_file(ours / file), load_file(theirs / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("rng/")), file
