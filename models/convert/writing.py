"""A planned conversion is written: under another name beside its target, which it gets when all is there.

`.TARGET.partial` holds the new folder and a journal: first what is converted and how, then a line for every file that
is complete, each on the disk (fsync) before the next begins. A second call with the same arguments goes on from there.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from seqzoo.models import checkpoints
from seqzoo.models.convert.folders import Plan
from seqzoo.models.convert.origin import EXTRA
from seqzoo.models.convert.report import Verification

JOURNAL, HALF = "journal.jsonl", "folder"


def check_target(src: Path, dst: Path) -> None:
    """Raises ValueError: no SRC, a DST that is something, one inside SRC, or one that nothing can be renamed to."""
    if not src.is_dir():
        raise ValueError(f"{src}: no such folder")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst}: expected a folder that is empty or not yet there, got one with something in it")
    if dst.is_mount():
        raise ValueError(f"{dst}: expected a folder that can be replaced, got a mount point; name one inside it")
    if src.resolve() in (dst.resolve(), *dst.resolve().parents):
        raise ValueError(f"{dst}: expected a folder outside {src}, which is only read")


def write(
    plan: Plan, dst: Path, *, allow_nonfinite: bool = False, check: Callable[[Path], Verification] | None = None
) -> Verification:
    """`check`: called with the new folder before it gets its name. Returns what it says.

    Where it is interrupted or the disk fails or is full, the files that are complete stay for the next call; after any
    other error nothing is left.

    Raises:
        ValueError: no space left, values that are not finite, a conversion into it is under way, or what an
            interrupted one left is of another source.
    """
    dst = dst.resolve()
    part = dst.with_name(f".{dst.name}.partial")
    dst.parent.mkdir(parents=True, exist_ok=True)
    state = plan.state() | {"allow_nonfinite": allow_nonfinite}
    with _journal(part, dst) as journal:
        done: list[str] = []
        try:
            done += _done(journal, state, part)
            _check_space(plan, part, done)
            with one_thread():
                _fill(plan, part / HALF, journal, done, allow_nonfinite)
            if not plan.state().items() <= state.items():
                raise ValueError(f"{plan.source.path}: changed while it was converted")
            found = plan.report.verification if check is None else check(part / HALF)
            _move(part / HALF, dst)
        except _NotOurs as error:
            raise ValueError(str(error)) from None
        except BaseException as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            stays = done and (isinstance(error, OSError | _NoSpace) or not isinstance(error, Exception))
            if not stays:
                shutil.rmtree(part)
            if full:
                said = (
                    f"{len(done)} files are complete: the same call goes on from them"
                    if done
                    else "nothing was written"
                )
                raise ValueError(f"{dst.parent}: no space left, {said}") from error
            raise
        shutil.rmtree(part)
        return found


class _NoSpace(ValueError):
    """Seen before anything more is written."""


class _NotOurs(Exception):
    """What lies there was left by another conversion."""


@contextmanager
def _journal(part: Path, dst: Path) -> Iterator[TextIO]:
    """Opened, and locked for as long as it is open."""
    fresh = not part.exists()
    part.mkdir(exist_ok=True)
    if not fresh and any(part.iterdir()) and not (part / JOURNAL).is_file():
        raise ValueError(f"{part}: expected what an interrupted conversion left, got something else; remove it first")
    with (part / JOURNAL).open("a+") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(journal.fileno()), (part / JOURNAL).stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ValueError(f"{dst}: another conversion into it is under way")
        yield journal


@contextmanager
def one_thread() -> Iterator[None]:
    """The disk sets the pace; threads that share a few megabytes wait for each other, for long where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _done(journal: TextIO, state: dict[str, Any], part: Path) -> list[str]:
    """The files that are complete; what else there is goes. Begins the journal where it is new."""
    journal.seek(0)
    text = journal.read()
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last may be torn
    journal.truncate(len("\n".join([*lines, ""]).encode()) if lines else 0)
    try:
        begun, *entries = [json.loads(line) for line in lines] or [None]
        sizes = {entry["file"]: entry["bytes"] for entry in entries}
    except (ValueError, TypeError, KeyError):
        raise _NotOurs(f"{part / JOURNAL}: no journal of a conversion; remove {part} first") from None
    if begun is None:
        _note(journal, state)
    elif begun != state:
        other = [name for name in {**begun, **state} if begun.get(name) != state.get(name)]
        raise _NotOurs(
            f"{part}: left by an interrupted conversion of another source or with other arguments, so this one cannot "
            f"go on from it (changed: {checkpoints.some(other)}); remove it first"
        )
    (part / HALF).mkdir(exist_ok=True)
    there = {path.name: path for path in (part / HALF).iterdir()}
    done = [file for file, size in sizes.items() if file in there and there[file].stat().st_size == size]
    for file in set(there) - set(done):
        shutil.rmtree(there[file]) if there[file].is_dir() else there[file].unlink()
    return done


def _note(journal: TextIO, entry: dict[str, Any]) -> None:
    journal.write(json.dumps(entry) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _check_space(plan: Plan, part: Path, done: list[str]) -> None:
    carried = sum((plan.source.path / name).stat().st_size for name in plan.report.carried)
    needed = carried + sum(head.bytes for head in plan.heads.values() if head.file not in done)
    free = shutil.disk_usage(part).free
    if needed > free:
        raise _NoSpace(f"{part.parent}: no space left: expected {needed:,} bytes, got {free:,}")


def _fill(plan: Plan, folder: Path, journal: TextIO, done: list[str], allow_nonfinite: bool) -> None:
    """`done` grows by every file of tensors."""
    files = plan.files
    for name in plan.report.carried:
        if name in files or name in (*plan.texts, checkpoints.INDEX):
            where = plan.source.path / name
            raise ValueError(f"{where}: not part of the checkpoint, but has the name of a file to write")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(plan.source.path / name, folder / name)
    chunks = lambda name: _chunks(plan, name, allow_nonfinite)
    for file, heads in files.items():
        if file in done:
            continue
        checkpoints.write_tensors(folder / file, heads, chunks, plan.metadata.get(file, {}))
        _note(journal, {"file": file, "bytes": (folder / file).stat().st_size})
        done.append(file)
    if isinstance(plan.index, str):
        (folder / checkpoints.INDEX).write_bytes(plan.index.encode())
    elif plan.index is not None:
        indexed = {name: head for name, head in plan.heads.items() if head.file != EXTRA}
        checkpoints.write_index(folder, indexed, plan.index)
    for file, text in plan.texts.items():
        (folder / file).write_bytes(text.encode())


def _chunks(plan: Plan, name: str, allow_nonfinite: bool) -> Iterator[Tensor]:
    for chunk in plan.read.chunks(name):
        if not allow_nonfinite and plan.heads[name].file != EXTRA:
            check_finite(plan, name, chunk)
        yield chunk
        plan.source.release()


def finite(x: Tensor) -> bool:
    """No NaN and no infinity; aminmax hands both on, and takes a tenth of isfinite's time."""
    return x.numel() == 0 or all(torch.isfinite(bound) for bound in x.aminmax())


def check_finite(plan: Plan, name: str, x: Tensor) -> None:
    """Raises ValueError: NaN or infinity in it, with the names of the tensors it is made of."""
    if not finite(x):
        origins = next((fate.sources for fate in plan.report.fates if name in fate.targets), {})
        raise ValueError(
            f"{plan.source.path}: {checkpoints.some(origins or [name])}: expected finite weights, got NaN or infinity "
            "(--allow-nonfinite takes them as they are)"
        )


def _move(folder: Path, dst: Path) -> None:
    """Everything is on the disk before the name is."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    try:
        os.replace(folder, dst)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ValueError(
            f"{dst}: expected a folder that is empty or not yet there, got one with something in it"
        ) from None
    _sync(dst.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
