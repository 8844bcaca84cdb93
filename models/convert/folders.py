"""A conversion of folders: planned from the headers, then written tensor by tensor."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.models import checkpoints
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.checkpoints import Folder, Head
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert import architecture, architectures
from seqzoo.models.convert.origin import EXTRA, RECORD, Origin
from seqzoo.models.convert.report import Fate, Report
from seqzoo.models.convert.rules import Row, Step, describe, differences, expected_of

NOTHING = "$^"


class Plan(NamedTuple):
    """All that will be written, but the values."""

    heads: dict[str, Head]  # every tensor, in its order, with the file it goes to
    read: Callable[[str], Tensor]
    metadata: dict[str, dict[str, str]]  # file -> what its header says beside the tensors
    index: dict[str, Any] | None  # what the index says beside the tensors; None is no index
    texts: dict[str, str]  # file -> content
    source: Path
    report: Report


def to_ours(src: Path, kind: Any, max_shard_size: int) -> Plan:
    """Arguments and errors: `convert`."""
    theirs, raw = architecture(kind), checkpoints.read_json(src / "config.json")
    config, source = theirs.to_ours(raw), Folder(src)
    rows = theirs.rows(config, source.heads)
    checkpoints.check_heads(src, source.heads, expected_of(rows, shapes_of(config)), theirs.KEPT)
    steps = [Step(row, to_ours=True, heads=source.heads, recorded={}) for row in rows]
    made = {name: head for step in steps for name, head in step.heads.items()}
    used = {name for step in steps for name in step.sources}
    extra = {name: head._replace(file=EXTRA) for name, head in source.heads.items() if name not in used}
    if hasattr(theirs, "check_kept"):
        theirs.check_kept(config, {name: source.read(name) for name in extra})
    heads = {**checkpoints.place(made, max_shard_size), **extra}
    texts = {"config.json": config.to_json_string(), RECORD: Origin.of(kind, source).text()}
    report = _report((kind, "seqzoo"), steps, source.heads, extra, src, source.files)
    return Plan(heads, _Reader(steps, source.read), _metadata(heads), _index(made, heads), texts, src, report)


def from_ours(src: Path, to: str | None, max_shard_size: int) -> Plan:
    """Arguments and errors: `convert`."""
    config, origin = _config(src), Origin.load(src)
    kind, raw = _destination(config, to, origin)
    origin = origin if origin is not None and origin.architecture == kind else None
    theirs, source = architecture(kind), Folder(src)
    kept = Folder(src, files=[EXTRA] if (src / EXTRA).is_file() else [])
    if origin is None and kept.heads:
        raise ValueError(f"{src}: {EXTRA} holds tensors of its origin, for which {kind!r} has no room")
    if origin is not None:
        raw = _unchanged(src, origin, config, theirs)
    rows: list[Row] = theirs.rows(config, {} if origin is None else origin.tensors)
    checkpoints.check_heads(src, source.heads, shapes_of(config), NOTHING)
    expected_of(rows, shapes_of(config))
    recorded = {} if origin is None else origin.dtypes
    steps = [Step(row, to_ours=False, heads=source.heads, recorded=recorded) for row in rows]
    made = {name: head for step in steps for name, head in step.heads.items()} | kept.heads
    report = _report(("seqzoo", kind), steps, source.heads, kept.heads, src, source.files)
    added = theirs.added(config) if origin is None and hasattr(theirs, "added") else {}
    made |= {name: Head(tuple(x.shape), checkpoints.CODES[x.dtype], "") for name, x in added.items()}
    rest = lambda name: added[name] if name in added else kept.read(name)
    read, texts = _Reader(steps, source.read, rest), {"config.json": raw}
    if origin is not None:
        return Plan(origin.place(src, made), read, origin.metadata, origin.index, texts, src, report)
    heads = checkpoints.place(made, max_shard_size)
    return Plan(heads, read, _metadata(heads), _index(made, heads), texts, src, report)


def check_target(src: Path, dst: Path) -> None:
    """Raises ValueError: no SRC, or a DST that is something."""
    if not src.is_dir():
        raise ValueError(f"{src}: no such folder")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst}: expected a folder that is empty or not yet there, got one with something in it")


def write(plan: Plan, dst: Path) -> None:
    """Under another name beside DST, which is moved when all is there.

    Raises:
        ValueError: no space left, or what an interrupted conversion left is in the way.
    """
    dst = dst.resolve()
    part = dst.with_name(f".{dst.name}.partial")
    dst.parent.mkdir(parents=True, exist_ok=True)
    carried = sum((plan.source / name).stat().st_size for name in plan.report.carried)
    needed, free = carried + sum(head.bytes for head in plan.heads.values()), shutil.disk_usage(dst.parent).free
    if needed > free:
        raise ValueError(f"{dst.parent}: no space left: expected {needed:,} bytes, got {free:,}")
    try:
        part.mkdir()
    except FileExistsError:
        raise ValueError(f"{part}: an interrupted conversion left it, or one is under way; remove it first") from None
    try:
        _fill(plan, part)
        os.replace(part, dst)
    except BaseException as error:
        shutil.rmtree(part)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ValueError(f"{dst.parent}: no space left, nothing was written") from error
        raise


def shapes_of(config: SeqZooConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a saved model of this config has: name to shape. Nothing is allocated."""
    with torch.device("meta"):
        model = SeqZooForCausalLM(config)
    tied = model._tied_weights_keys if config.tie_word_embeddings else ()
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if name not in tied}


class _Reader:
    """Runs the step that gives a tensor; the last one's results stay at hand, for they are asked for in a row."""

    def __init__(self, steps: Iterable[Step], *reads: Callable[[str], Tensor]) -> None:
        self._step = {name: step for step in steps for name in step.targets}
        self._read, self._kept = reads[0], reads[-1]
        self._last: Step | None = None
        self._made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        step = self._step.get(name)
        if step is None:
            return self._kept(name)
        if step is not self._last:
            self._made = {}  # before the next results are made, or both would be held
            self._last, self._made = step, step.run(self._read)
        return self._made[name]


def _fill(plan: Plan, folder: Path) -> None:
    files: dict[str, dict[str, Head]] = {}
    for name, head in plan.heads.items():
        files.setdefault(head.file, {})[name] = head
    for name in plan.report.carried:
        if name in files or name in (*plan.texts, checkpoints.INDEX):
            raise ValueError(f"{plan.source / name}: not part of the checkpoint, but has the name of a file to write")
        shutil.copyfile(plan.source / name, folder / name)
    for file, heads in files.items():
        checkpoints.write_tensors(folder / file, heads, plan.read, plan.metadata.get(file, {}))
    if plan.index is not None:
        indexed = {name: head for name, head in plan.heads.items() if head.file != EXTRA}
        checkpoints.write_index(folder, indexed, plan.index)
    for file, text in plan.texts.items():
        (folder / file).write_bytes(text.encode())


def _config(src: Path) -> SeqZooConfig:
    try:
        return SeqZooConfig.from_dict(checkpoints.read_json(src / "config.json"))
    except ValueError:
        raise
    except Exception as error:  # transformers' validators raise classes of their own
        raise ValueError(f"{src / 'config.json'}: {' '.join(str(error).split())}") from None


def _destination(config: SeqZooConfig, to: str | None, origin: Origin | None) -> tuple[str, str]:
    """The architecture to write and its config.json, derived from ours."""
    named = to or (origin.architecture if origin is not None else None)
    fits, reasons = {}, []
    for kind in architectures() if named is None else [named]:
        try:
            fits[kind] = json.dumps(architecture(kind).to_theirs(config), indent=2, sort_keys=True) + "\n"
        except ValueError as error:
            reasons.append(str(error))
    if len(fits) != 1:
        raise ValueError("; ".join(reasons) if not fits else f"to: expected one of {sorted(fits)}, got None")
    return next(iter(fits.items()))


def _unchanged(src: Path, origin: Origin, config: SeqZooConfig, theirs: Any) -> str:
    """The config.json there once was. Raises ValueError: it no longer describes the folder."""
    try:
        raw = json.loads(origin.config)
    except ValueError as error:
        raise ValueError(f"{src / RECORD}: config: not readable as JSON: {error}") from None
    lost = differences(describe(config), describe(theirs.to_ours(raw)))
    if lost:
        raise ValueError(
            f"{src / 'config.json'}: changed since it was converted ({'; '.join(lost)}); "
            f"remove {RECORD} to convert without the origin's own config and files"
        )
    return origin.config


def _metadata(heads: dict[str, Head]) -> dict[str, dict[str, str]]:
    return {head.file: {"format": "pt"} for head in heads.values()}


def _index(made: dict[str, Head], heads: dict[str, Head]) -> dict[str, Any] | None:
    if len({heads[name].file for name in made}) == 1:
        return None
    return {"total_size": sum(heads[name].bytes for name in made)}


def _report(
    names: tuple[str, str],
    steps: list[Step],
    sources: dict[str, Head],
    kept: dict[str, Head],
    src: Path,
    files: list[str],
) -> Report:
    fates = [Fate(step.fate, {name: sources[name] for name in step.sources}, step.heads) for step in steps]
    fates += [Fate("kept", {name: head}, {name: head}) for name, head in kept.items()]
    written = {"config.json", checkpoints.INDEX, RECORD, EXTRA, *files}
    others = sorted(path for path in src.iterdir() if path.name not in written)
    useless = {path.name for path in others if path.suffix in checkpoints.PICKLES} | set(checkpoints.RUN_FILES)
    carried = [path.name for path in others if path.is_file() and path.name[0] != "." and path.name not in useless]
    return Report(*names, fates, carried, [path.name for path in others if path.name not in carried])
