"""A conversion of folders, planned from the headers alone."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.models import checkpoints
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.checkpoints import Folder, Head
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert import architecture, architectures
from seqzoo.models.convert.origin import EXTRA, LAYOUT, RECORD, Origin
from seqzoo.models.convert.report import Fate, Report
from seqzoo.models.convert.rules import COPY, Row, Step, describe, differences, expected_of
from seqzoo.models.tensor_file import CODES

NOTHING = "$^"
CHUNK = 16 * 2**20  # [bytes] looked at and written at a time


class Reader:
    """Runs the step that gives a tensor; the last one's results stay at hand, for they are asked for in a row.

    `read`: gives what the steps read; `rest`: what no step gives, likewise from it where None.
    """

    def __init__(
        self, steps: Iterable[Step], read: Callable[[str], Tensor], rest: Callable[[str], Tensor] | None = None
    ) -> None:
        self._step = {name: step for step in steps for name in step.targets}
        self._read, self._rest = read, rest or read
        self._last: Step | None = None
        self._made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        step = self._step.get(name)
        if step is None:
            return self._rest(name)
        if step is not self._last:
            self._made = {}  # before the next results are made, or both would be held
            self._last, self._made = step, step.run(self._read)
        return self._made[name]

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's numbers from first to last, at most CHUNK bytes at a time."""
        step = self._step.get(name)
        if step is not None and step.copies and isinstance(self._read, Reader):  # which may have it in pieces
            yield from self._read.chunks(step.sources[0])
            return
        pieces = step.pieces(self._read) if step is not None and step.comes_in_pieces else [self(name)]
        for piece in pieces:
            for part in [piece] if piece.is_contiguous() else _rows(piece):  # an expanded one is never whole in memory
                yield from part.contiguous().reshape(-1).split(CHUNK // part.element_size())


def _rows(x: Tensor) -> Sequence[Tensor]:
    """Some rows at a time, about CHUNK bytes."""
    return x.split(max(1, CHUNK * len(x) // max(1, x.numel() * x.element_size())))


class Opened(NamedTuple):
    """A folder of any architecture seen as one of ours. No tensor has been read."""

    kind: str  # what it is on the disk
    config: SeqZooConfig
    source: Folder
    steps: list[Step]  # from its tensors to ours
    kept: dict[str, Head]  # its tensors that ours has no room for

    @property
    def heads(self) -> dict[str, Head]:
        """Every tensor of ours; in no file."""
        return {name: head for step in self.steps for name, head in step.heads.items()}


class Plan(NamedTuple):
    """All that will be written, but the values."""

    heads: dict[str, Head]  # every tensor, in its order, with the file it goes to
    read: Reader
    metadata: dict[str, dict[str, str]]  # file -> what its header says beside the tensors
    index: str | dict[str, Any] | None  # its text, or what it says beside the tensors; None is no index
    texts: dict[str, str]  # file -> content
    source: Folder
    report: Report

    @property
    def files(self) -> dict[str, dict[str, Head]]:
        """File -> the tensors in it."""
        files: dict[str, dict[str, Head]] = {}
        for name, head in self.heads.items():
            files.setdefault(head.file, {})[name] = head
        return files

    def state(self) -> dict[str, Any]:
        """What has to be the same for a conversion to go on where it stopped: every file's state, and the plan."""
        stats = {name: (self.source.path / name).stat() for name in [*self.source.files, *self.report.carried]}
        facts: dict[str, Any] = {f"source {name}": [x.st_size, x.st_mtime_ns] for name, x in stats.items()}
        facts |= {f"header of {name}": digest for name, digest in self.source.digests.items()}
        plan = [[[name, *head] for name, head in self.heads.items()], self.metadata, self.index, self.texts]
        fates = [[fate.what, list(fate.sources), list(fate.targets)] for fate in self.report.fates]
        return facts | {"what is to be written": hashlib.sha256(json.dumps([plan, fates]).encode()).hexdigest()}


def plan(src: Path, kind: str, to: str | None, *, max_shard_size: int, pickle: bool) -> Plan:
    """`kind`: what SRC is. Other arguments and errors: `convert`."""
    choices = architectures() if kind == "seqzoo" else ["seqzoo"]
    if to not in (None, *choices):
        raise ValueError(f"to: expected one of {choices} for a folder of {kind!r}, got {to!r}")
    return from_ours(src, to, max_shard_size) if kind == "seqzoo" else to_ours(src, kind, max_shard_size, pickle=pickle)


def open_as_ours(src: Path, kind: Any, *, pickle: bool = False) -> Opened:
    """`kind`: the model_type of its config.json. Errors: `convert`."""
    if kind == "seqzoo":
        config, source = _config(src), Folder(src)
        checkpoints.check_heads(src, source.heads, shapes_of(config), NOTHING)
        rows, kept_names = [Row((name,), (name,), COPY) for name in source.heads], NOTHING
    else:
        theirs, source = architecture(kind), Folder(src, pickle=pickle)
        with _of_a_stranger(src):
            config = _read(theirs, checkpoints.read_json(src / "config.json"))
            rows, kept_names = theirs.rows(config, source.heads), theirs.KEPT
            expected = expected_of(rows, shapes_of(config))
        checkpoints.check_heads(src, source.heads, expected, kept_names)
    steps = [Step(row, to_ours=True, heads=source.heads, recorded={}) for row in rows]
    used = {name for step in steps for name in step.sources}
    kept = {name: head for name, head in source.heads.items() if name not in used}
    if kind != "seqzoo" and hasattr(theirs, "check_kept"):
        theirs.check_kept(config, {name: source.read(name) for name in kept})
    return Opened(kind, config, source, steps, kept)


def _read(theirs: Any, said: dict[str, Any]) -> SeqZooConfig:
    """Their config.json as ours. Raises ValueError: what no architecture here has; else as `to_ours` of theirs."""
    for part in (said, said.get("text_config")):
        if isinstance(part, dict) and part.get("is_causal", True) not in (True, None):
            raise ValueError(f"config.json: is_causal: expected true, got {part['is_causal']!r}")
    return theirs.to_ours(said)


@contextmanager
def _of_a_stranger(src: Path) -> Iterator[None]:
    """Values of a config that nobody foresaw are its fault, whatever they lead to."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = " ".join(str(error).split())[:160]
        raise ValueError(f"{src / 'config.json'}: not understood: {type(error).__name__}: {why}") from error


def to_ours(src: Path, kind: Any, max_shard_size: int, *, pickle: bool = False) -> Plan:
    """Arguments and errors: `convert`."""
    opened = open_as_ours(src, kind, pickle=pickle)
    made, extra = opened.heads, {name: head._replace(file=EXTRA) for name, head in opened.kept.items()}
    heads = {**checkpoints.place(made, max_shard_size), **extra}
    texts = {"config.json": opened.config.to_json_string(), RECORD: Origin.of(kind, opened.source).text()}
    report = report_of((kind, "seqzoo"), opened.steps, opened.source, extra)
    read = Reader(opened.steps, opened.source.read)
    return Plan(heads, read, metadata_of(heads), index_of(made, heads), texts, opened.source, report)


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
    added = theirs.added(config) if origin is None and hasattr(theirs, "added") else {}
    fresh = {name: Head(tuple(x.shape), CODES[x.dtype], "") for name, x in added.items()}
    report = report_of(("seqzoo", kind), steps, source, kept.heads, fresh)
    made |= fresh
    rest = lambda name: added[name] if name in added else kept.read(name)
    read, texts = Reader(steps, source.read, rest), {"config.json": raw}
    if origin is not None:
        return Plan(origin.place(src, made), read, origin.metadata, origin.index, texts, source, report)
    heads = checkpoints.place(made, max_shard_size)
    return Plan(heads, read, metadata_of(heads), index_of(made, heads), texts, source, report)


def shapes_of(config: SeqZooConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a saved model of this config has: name to shape. Nothing is allocated."""
    with torch.device("meta"):
        model = SeqZooForCausalLM(config)
    tied = model._tied_weights_keys if config.tie_word_embeddings else ()
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if name not in tied}


def metadata_of(heads: dict[str, Head]) -> dict[str, dict[str, str]]:
    """What the headers of new files say."""
    return {head.file: {"format": "pt"} for head in heads.values()}


def index_of(made: dict[str, Head], heads: dict[str, Head]) -> dict[str, Any] | None:
    """What the index of new files says; None where one file needs none. `made`: what an index is of."""
    if len({heads[name].file for name in made}) == 1:
        return None
    return {"total_size": sum(heads[name].bytes for name in made)}


def report_of(
    names: tuple[str, str],
    steps: list[Step],
    source: Folder,
    kept: dict[str, Head],
    fresh: dict[str, Head] | None = None,
) -> Report:
    """Of a conversion by steps. `names`: the architectures; `kept`, `fresh`: tensors that no step gives."""
    fates = [Fate(step.fate, {name: source.heads[name] for name in step.sources}, step.heads) for step in steps]
    fates += [Fate("kept", {name: head}, {name: head}) for name, head in kept.items()]
    fates += [Fate("fresh", {}, {name: head}) for name, head in (fresh or {}).items()]
    return Report(*names, fates, *files_beside(source))


def files_beside(source: Folder) -> tuple[list[str], list[str]]:
    """The names of what a conversion carries along, and of what it leaves."""
    written = {"config.json", checkpoints.INDEX, checkpoints.PICKLE_INDEX, RECORD, EXTRA, *source.files}
    useless = {*checkpoints.RUN_FILES, LAYOUT}
    carried, left = [], []
    templates = source.path / checkpoints.TEMPLATES
    for path in sorted([*source.path.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        if path.name in written or path == templates:
            continue
        fits = path.is_file() and path.name[0] != "." and path.suffix not in checkpoints.PICKLES
        (carried if fits and path.name not in useless else left).append(str(path.relative_to(source.path)))
    return carried, left


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
