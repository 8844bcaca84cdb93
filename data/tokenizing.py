"""Documents to shards of tokens, once: by several processes, and going on where an earlier call was cut off.

One process reads the source and deals its documents, in order, into shards of so many bytes of text; which document is
in which shard depends on nothing else. Workers make the ids and write. A shard counts once its facts are written, after
its files; they say where in the source it begins and ends, so that a later call passes over it without reading.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from seqzoo.data.shard_files import (
    FORMAT,
    MANIFEST,
    PARTIAL,
    are_facts,
    damage_of,
    facts_of,
    kind_of,
    read_manifest,
    shard_name,
    write_json,
    write_shard,
)
from seqzoo.data.source import Corpus, Position, TextSource
from seqzoo.data.tokenizer import Tokenizer, load_tokenizer

Facts = dict[str, Any]  # of a shard, as in the manifest
_tokenizer: Tokenizer | None = None  # a worker's


def tokenize(
    corpus: Corpus,
    tokenizer: str | None,
    folder: Path,
    *,
    source: dict[str, Any],
    shard_bytes: int,
    workers: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A corpus as shards of ids, or what is missing of them.

    Args:
        corpus: of text.
        tokenizer: as `load_tokenizer` takes it.
        folder: not there yet, empty, or of an earlier call of the same.
        source: what the corpus was made of, for the manifest.
        shard_bytes: of text in a shard; its last document may go beyond.
        workers: processes that make ids; 1 is this one.
        say: called with a line for each shard.

    Returns:
        The manifest.

    Raises:
        ValueError: sides that are no text, sizes below 1, no documents to train on, a folder of something else or in
            use, or nothing can be written there.
        RuntimeError: a worker died.
    """
    for name, value in dict(shard_bytes=shard_bytes, workers=workers).items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not all(isinstance(side, TextSource) for side in corpus):
        raise ValueError(f"data: expected a source of text, got {source.get('_target_')}")
    own = load_tokenizer(tokenizer)
    made_of = dict(
        format=FORMAT, kind=kind_of(own.vocab_size), tokenizer=facts_of(own), source=source, shard_bytes=shard_bytes,
        identity={name: side.identity() for name, side in corpus._asdict().items()},
    )  # fmt: skip
    made_of = json.loads(json.dumps(made_of))
    with _locked(folder), _Workers(workers, tokenizer, own) as crew:
        known = _begin(folder, made_of, own)
        sides: dict[str, list[Facts]] = {}
        for name, side in corpus._asdict().items():
            sides[name] = _tokenize_side(side, folder, name, shard_bytes, known, crew, say)
        if not sides["train"]:
            raise ValueError("training data: expected documents, got none")
        write_json(folder / MANIFEST, made_of | dict(sides=sides))
        for name, shards in sides.items():
            for number in range(len(shards)):
                _note(folder, name, number).unlink(missing_ok=True)
    return made_of | dict(sides=sides)


def _tokenize_side(
    source: TextSource,
    folder: Path,
    side: str,
    shard_bytes: int,
    known: dict[str, list[Facts]],
    crew: "_Workers",
    say: Callable[[str], None],
) -> list[Facts]:
    """The facts of all shards; the next is read while workers are at those before."""
    done: list[Facts] = []
    waiting: deque[tuple[Future, str]] = deque()

    def settle(most: int) -> None:
        while len(waiting) > most:
            future, how = waiting.popleft()
            facts = future.result()
            say(f"{side} {len(done)}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {how}")
            done.append(facts)

    position, stream, number = None, None, 0
    while True:
        base = folder / shard_name(side, number)
        kept = _kept(folder, side, number, known)
        if kept is not None and kept["begin"] == position:
            waiting.append((_settled(kept), "kept"))
            position, stream = kept["end"], None
        else:
            stream = source.read(position) if stream is None else stream
            documents, after = _some(stream, shard_bytes)
            if not documents:
                settle(0)
                return done
            future = crew.write(base, documents, dict(begin=position, end=after), side == "validation")
            waiting.append((future, "written"))
            position = after
        number += 1
        settle(2 * crew.size)


def _some(stream: Iterator[tuple[bytes, Position]], shard_bytes: int) -> tuple[list[bytes], Position]:
    """The documents of the next shard and the position after it, as JSON gives it back."""
    documents, size, after = [], 0, None
    while size < shard_bytes and (found := next(stream, None)) is not None:
        document, after = found
        documents.append(document)
        size += len(document)
    return documents, json.loads(json.dumps(after))


def _begin(folder: Path, made_of: dict[str, Any], tokenizer: Tokenizer) -> dict[str, list[Facts]]:
    """The folder with a manifest and a tokenizer, without what was cut off -> the shards that a manifest names."""
    sides: dict[str, list[Facts]] = {}
    if set(folder.iterdir()) - set(folder.glob(f"{MANIFEST}.*{PARTIAL}")):
        there = read_manifest(folder)
        sides = there.pop("sides", {})
        changed = sorted(key for key in there.keys() | made_of.keys() if there.get(key) != made_of.get(key))
        if changed:
            facts = ", ".join(f"{key}: expected {there.get(key)}, got {made_of.get(key)}" for key in changed)
            raise ValueError(f"{folder}: expected an empty folder or the options that it was begun with; {facts}")
    else:
        write_json(folder / MANIFEST, made_of)
    for path in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not (folder / "tokenizer").exists():
        partial = folder / f"tokenizer{PARTIAL}"
        tokenizer.save(str(partial))
        os.replace(partial, folder / "tokenizer")
    return sides


def _kept(folder: Path, side: str, number: int, known: dict[str, list[Facts]]) -> Facts | None:
    """The facts of a shard that is there and whole."""
    try:
        note = _note(folder, side, number)
        facts = json.loads(note.read_text()) if note.exists() else known[side][number]
    except (OSError, ValueError, LookupError, TypeError):  # none, or not such as we write
        return None
    whole = are_facts(facts) and damage_of(folder / shard_name(side, number), facts, content=True) is None
    return facts if whole else None


def _note(folder: Path, side: str, number: int) -> Path:
    return folder / f"{shard_name(side, number)}.json"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in a folder, which is made where it is not there; whoever is killed leaves no lock behind."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: expected no other seqzoo-tokenize to be at work there, got one") from error
        yield
    finally:
        os.close(handle)


class _Workers:
    """Processes that write shards; or, for one, this process."""

    def __init__(self, size: int, tokenizer: str | None, own: Tokenizer) -> None:
        self.size, self.own = size, own
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self.pool = ProcessPoolExecutor(size, context, _be_worker, (tokenizer,)) if size > 1 else None

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(
                "a worker died, perhaps for want of memory; the same command goes on from here"
            ) from error

    def write(self, base: Path, documents: list[bytes], ends: Facts, keep_text: bool) -> Future:
        if self.pool is not None:
            return self.pool.submit(_work, base, documents, ends, keep_text)
        return _settled(_write(base, documents, ends, keep_text, self.own))


def _settled(facts: Facts) -> Future:
    future: Future = Future()
    future.set_result(facts)
    return future


def _be_worker(tokenizer: str | None) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when it is over,
    Thread(target=_end_with_parent, daemon=True).start()  # also by its death
    _tokenizer = load_tokenizer(tokenizer)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(base: Path, documents: list[bytes], ends: Facts, keep_text: bool) -> Facts:
    return _write(base, documents, ends, keep_text, _tokenizer)


def _write(base: Path, documents: list[bytes], ends: Facts, keep_text: bool, tokenizer: Tokenizer) -> Facts:
    facts = write_shard(base, documents, tokenizer, keep_text=keep_text) | ends
    write_json(base.with_name(f"{base.name}.json"), facts)
    return facts
