"""Sharded checkpoints that are damaged are told, and survived; an index is data, and may lie."""

import errno
import json
import os
import shutil
from unittest.mock import patch

import pytest
import torch
from runs import HYBRID, run, written

from seqzoo.training import sharded_checkpoint
from seqzoo.training.shards import INDEX, Shards

NUMBERS = dict(steps=6, checkpoint_every=2, log_every=1, sample_tokens=0, keep=3)
SHARD = "shards/rank-00000.safetensors"


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of one process, its weights in shards."""
    folder = tmp_path_factory.mktemp("shards") / "run"
    run(folder, "parallel=fsdp", model=HYBRID, **NUMBERS)
    return folder


@pytest.fixture
def again(ended, tmp_path):
    """A copy of it, its text beside it."""
    shutil.copytree(ended.parent / "text", tmp_path / "text")
    return shutil.copytree(ended, tmp_path / "run")


def flip(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES = {
    "truncated": lambda path: os.truncate(path / SHARD, 2000),
    "flipped": lambda path: flip(path / SHARD),
    "missing": lambda path: (path / SHARD).unlink(),
    "no index": lambda path: (path / INDEX).unlink(),
    "another index": lambda path: (path / INDEX).write_text("{}"),
    "no facts": lambda path: (path / "training.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_used_and_that_is_said(damage, ended, again, caplog):
    """The run ends as it had ended."""
    newest = sorted((again / "checkpoints").iterdir())[-1]
    DAMAGES[damage](newest)
    run(again, "parallel=fsdp", "trainer.resume=auto", model=HYBRID, **NUMBERS)
    assert f"{newest} is damaged" in caplog.text
    assert written(again) == written(ended)
    one, other = (Shards(folder / "checkpoints" / newest.name) for folder in (again, ended))
    assert all(torch.equal(one.read(name), other.read(name)) for name in other.index if not name.startswith("rng/"))


def test_only_damaged_ones(again):
    for path in (again / "checkpoints").iterdir():
        DAMAGES["flipped"](path)
    with pytest.raises(ValueError, match="expected a whole checkpoint, got only damaged ones"):
        run(again, "parallel=fsdp", "trainer.resume=auto", model=HYBRID, **NUMBERS)


NAME = "weights/lm_head.weight"
LIES = {  # what is changed in the entry of a tensor -> what is said
    "no list": (lambda entry: entry.update(parts=3), "expected parts of a tensor in shards"),
    "another folder": (
        lambda entry: entry["parts"][0].update(file="../../secret.safetensors"), "expected parts of a tensor in shards",
    ),
    "an absolute path": (lambda entry: entry["parts"][0].update(file="/etc/passwd"), "expected parts of a tensor"),
    "no dtype": (lambda entry: entry.update(dtype="nn"), "expected parts of a tensor in shards"),
    "beyond its end": (lambda entry: entry["parts"][0].update(offset=[9, 0]), "expected parts of a tensor in shards"),
    "a hole": (lambda entry: entry["parts"][0].update(shape=[3, 24]), "are missing"),
    "twice": (lambda entry: entry["parts"].append(entry["parts"][0]), "once, got"),
    "another dtype": (lambda entry: entry.update(dtype="float16"), "once, got"),
    "a file that is not there": (
        lambda entry: entry["parts"][0].update(file="shards/rank-00009.safetensors"), "expected a part of it in",
    ),
    "from another place": (lambda entry: entry["parts"][0].update(at=[200, 0]), "once, got|expected a part of it"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(lie, again):
    path = sorted((again / "checkpoints").iterdir())[-1]
    index, (change, said) = json.loads((path / INDEX).read_text()), LIES[lie]
    change(index[NAME])
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=said):
        Shards(path).read(NAME)
    (path / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="expected an index of tensors, got list"):
        Shards(path)


def test_whatever_a_writer_dies_of(tmp_path, caplog):
    """There is no checkpoint then, and the one before stays the last."""
    real, room = sharded_checkpoint.save_file, [True, False, True]

    def full(tensors, path):
        if not room.pop(0):
            raise MemoryError
        real(tensors, path)

    with patch.object(sharded_checkpoint, "save_file", full):
        run(tmp_path / "run", "parallel=fsdp", model=HYBRID, **NUMBERS)
    assert "no checkpoint of step 4 could be written (rank 0: MemoryError)" in caplog.text
    assert sorted(x.name for x in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000006"]


def test_no_space_left(tmp_path, caplog):
    """What is on the way is given up, and the run goes on; the last one must be written."""
    real, room = sharded_checkpoint.save_file, [True, False, True]

    def full(tensors, path):
        if room.pop(0):
            return real(tensors, path)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(sharded_checkpoint, "save_file", full):
        run(tmp_path / "run", "parallel=fsdp", model=HYBRID, **NUMBERS)
    assert "no checkpoint of step 4 could be written (rank 0: [Errno 28]" in caplog.text
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step-00000002", "step-00000006"]
    room[:] = [True, True, False]
    with (
        patch.object(sharded_checkpoint, "save_file", full),
        pytest.raises(RuntimeError, match="no checkpoint of step 6 could be written .*last good checkpoint is .*0004"),
    ):
        run(tmp_path / "other", "parallel=fsdp", model=HYBRID, **NUMBERS)
