"""An interrupted conversion leaves nothing under the target's name, and the same call goes on from what is complete."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_qwen3_next import small
from test_convert import assert_same_folder

from seqzoo.models import checkpoints
from seqzoo.models.checkpoints import Folder, Head
from seqzoo.models.convert import convert, writing

SIZE = 20_000  # [bytes] of a shard: several files


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    small("all dense").save_pretrained(root / "theirs", max_shard_size="20KB")
    (root / "theirs" / "tokenizer.json").write_text("{}")
    (root / "theirs" / "additional_chat_templates").mkdir()
    (root / "theirs" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    convert(root / "theirs", root / "whole", max_shard_size=SIZE)
    assert (root / "whole" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert len(Folder(root / "whole").files) >= 3
    return root


@pytest.fixture
def stopped_after(monkeypatch):
    """A conversion that gets an error in the midst of its file of this number, counted from 0."""

    def stop(source, target, after, error, **how):
        written, write_tensors = [], checkpoints.write_tensors

        def faulty(path, *rest):
            if len(written) == after:
                path.write_bytes(b"half")
                raise error
            written.append(path.name)
            write_tensors(path, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_tensors", faulty)
            with pytest.raises((type(error), ValueError)) as caught:
                convert(source, target, max_shard_size=SIZE, **how)
        return str(caught.value)

    return stop


@pytest.fixture
def written(monkeypatch):
    """The names of the files that are written from now on."""
    names, write_tensors = [], checkpoints.write_tensors
    monkeypatch.setattr(
        checkpoints, "write_tensors", lambda path, *rest: (names.append(path.name), write_tensors(path, *rest))
    )
    return names


FULL = OSError(28, os.strerror(28))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL], ids=["stopped", "disk full"])
def test_goes_on(source, tmp_path, stopped_after, error, request):
    target = tmp_path / "new"
    said = stopped_after(source / "theirs", target, 2, error)
    assert error is not FULL or "no space left, 2 files are complete: the same call goes on from them" in said
    assert [path.name for path in tmp_path.iterdir()] == [".new.partial"]
    names = request.getfixturevalue("written")
    convert(source / "theirs", target, max_shard_size=SIZE)
    assert names == Folder(source / "whole").files[2:]
    assert_same_folder(source / "whole", target)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO])
def test_what_is_complete_outlives_a_disk_that_fails_twice(source, tmp_path, stopped_after, monkeypatch, code):
    """Also a second call that finds no room before it begins."""
    target = tmp_path / "new"
    stopped_after(source / "theirs", target, 2, OSError(code, os.strerror(code)))
    little = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: little)
        with pytest.raises(ValueError, match="no space left: expected .* bytes, got 10"):
            convert(source / "theirs", target, max_shard_size=SIZE)
    assert len(Folder(source / "whole").files[:2]) == len(
        [*(tmp_path / ".new.partial" / writing.HALF).glob("*.safetensors")]
    )
    convert(source / "theirs", target, max_shard_size=SIZE)
    assert_same_folder(source / "whole", target)


@pytest.mark.parametrize("error, after", [(KeyboardInterrupt(), 0), (FULL, 0), (ValueError("bad"), 2)])
def test_leaves_nothing_where_nothing_is_worth_it(source, tmp_path, stopped_after, error, after):
    stopped_after(source / "theirs", tmp_path / "new", after, error)
    assert not list(tmp_path.iterdir())


def test_does_not_go_on_from_another_source_or_plan(source, tmp_path, stopped_after):
    theirs, target = tmp_path / "theirs", tmp_path / "new"
    os.system(f"cp -a '{source / 'theirs'}' '{theirs}'")
    stopped_after(theirs, target, 1, KeyboardInterrupt())
    shard = sorted(theirs.glob("*.safetensors"))[0]
    for how, words in (
        (dict(max_shard_size=SIZE // 2), "what is to be written"),
        (dict(max_shard_size=SIZE, allow_nonfinite=True), "allow_nonfinite"),
    ):
        with pytest.raises(ValueError, match=rf"\.new\.partial: left by .* \(changed: {words}\); remove it first"):
            convert(theirs, target, **how)
    os.utime(shard, ns=(0, 0))
    with pytest.raises(ValueError, match=f"changed: source {shard.name}"):
        convert(theirs, target, max_shard_size=SIZE)
    assert not target.exists() and (tmp_path / ".new.partial").is_dir()


@pytest.mark.parametrize("left", ["nothing", "torn journal", "torn line", "file cut short", "file not in the journal"])
def test_what_a_kill_or_a_crash_may_leave(source, tmp_path, stopped_after, left, request):
    target, part = tmp_path / "new", tmp_path / ".new.partial"
    journal, half = part / writing.JOURNAL, part / writing.HALF
    if left in ("nothing", "torn journal"):
        part.mkdir()
        if left == "torn journal":
            journal.write_text('{"source mod')
    else:
        stopped_after(source / "theirs", target, 2, KeyboardInterrupt())
        first, second = (half / file for file in Folder(source / "whole").files[:2])
        if left == "file cut short":
            os.truncate(second, 100)
        elif left == "torn line":
            journal.write_text(journal.read_text()[:-9])
        else:
            lines = journal.read_text().splitlines(keepends=True)
            journal.write_text("".join(lines[:-1]))
    names = request.getfixturevalue("written")
    convert(source / "theirs", target, max_shard_size=SIZE)
    again = 0 if left in ("nothing", "torn journal") else 1
    assert names == Folder(source / "whole").files[again:]
    assert_same_folder(source / "whole", target)


@pytest.mark.parametrize("content", ["other", "journal"])
def test_what_is_not_ours_is_not_touched(source, tmp_path, content):
    part = tmp_path / ".new.partial"
    part.mkdir()
    mine = part / ("mine" if content == "other" else writing.JOURNAL)
    mine.write_text("my notes\n")
    with pytest.raises(ValueError, match="remove it first|no journal of a conversion"):
        convert(source / "theirs", tmp_path / "new")
    assert mine.read_text() == "my notes\n"


def test_two_at_once(source, tmp_path, monkeypatch):
    """The second is refused, and the first is not disturbed."""
    write_tensors, refused = checkpoints.write_tensors, []

    def second(path, *rest):
        with monkeypatch.context() as patch, pytest.raises(ValueError) as caught:
            patch.setattr(checkpoints, "write_tensors", write_tensors)
            convert(source / "theirs", tmp_path / "new", max_shard_size=SIZE)
        refused.append(str(caught.value))
        write_tensors(path, *rest)

    monkeypatch.setattr(checkpoints, "write_tensors", second)
    convert(source / "theirs", tmp_path / "new", max_shard_size=SIZE)
    assert refused and all(x == f"{tmp_path / 'new'}: another conversion into it is under way" for x in refused)
    assert_same_folder(source / "whole", tmp_path / "new")


def test_source_that_changes_meanwhile(source, tmp_path, monkeypatch):
    theirs, write_tensors = tmp_path / "theirs", checkpoints.write_tensors
    os.system(f"cp -a '{source / 'theirs'}' '{theirs}'")
    shard = sorted(theirs.glob("*.safetensors"))[0]

    def touched(path, *rest):
        os.utime(shard, ns=(time.time_ns(), time.time_ns()))
        write_tensors(path, *rest)

    monkeypatch.setattr(checkpoints, "write_tensors", touched)
    with pytest.raises(ValueError, match="changed while it was converted"):
        convert(theirs, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


KILLED = """
import os, sys
from seqzoo.models import checkpoints
from seqzoo.models.convert import convert
files, slow = [], checkpoints._bytes
checkpoints._bytes = lambda *x: (print(flush=True), slow(*x))[1]  # a line for every piece that is written
print("ready", flush=True)
convert(*sys.argv[1:], max_shard_size=20_000)
"""


def killed_at(source: Path, target: Path, pieces: int) -> int:
    """Kill -9 after so many pieces. Returns the exit status, 0 where it was done before."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, target], stdout=subprocess.PIPE)
    for _ in range(1 + pieces):
        if not process.stdout.readline():
            break
    process.kill()
    process.stdout.close()
    return process.wait()


def test_killed(source, tmp_path):
    """`SEQZOO_KILLS=100` does it more often, at random moments."""
    kills, heads = int(os.environ.get("SEQZOO_KILLS", "0")), Folder(source / "whole").heads
    in_the_third_file = 1 + sum(head.file in Folder(source / "whole").files[:2] for head in heads.values())
    moments = [random.randrange(len(heads) + 3) for _ in range(kills)] or [in_the_third_file]
    target = tmp_path / "new"
    for moment in moments:
        status = killed_at(source / "theirs", target, moment)
        assert status == -9 or target.is_dir()
        if target.is_dir():
            assert_same_folder(source / "whole", target)
            os.system(f"rm -r '{target}'")
    complete = (tmp_path / ".new.partial" / writing.JOURNAL).read_text().count("\n") if not kills else None
    convert(source / "theirs", target, max_shard_size=SIZE)
    assert_same_folder(source / "whole", target)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert kills or complete >= 2, "the kill came before there was anything to go on from"


@pytest.mark.parametrize("at", ["write", "sync while writing", "last sync"])
def test_a_disk_that_fails_is_heard(tmp_path, monkeypatch, at):
    """Writing and syncing are done by threads behind: no error of theirs is lost, nor what came before it."""
    syncs, tensor = [], torch.arange(1024.0)

    def fsync(_):
        syncs.append(0)
        if at == "last sync" or (at == "sync while writing" and len(syncs) == 1):
            raise FULL

    monkeypatch.setattr(checkpoints, "_SYNCED", 4096 if at == "sync while writing" else 2**40)
    monkeypatch.setattr(checkpoints.os, "fsync", fsync)
    if at == "write":
        monkeypatch.setattr(checkpoints._Behind, "_write", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(OSError, match=os.strerror(28)):
        heads = {f"x{n}": Head((1024,), "F32", "") for n in range(4)}
        checkpoints.write_tensors(tmp_path / "x", heads, lambda _: [tensor], {})
