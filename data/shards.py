"""Documents that seqzoo-tokenize has made ids of: read where they are wanted, and nowhere else."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from seqzoo.data.shard_files import MANIFEST, Shard, are_facts, damage_of, facts_of, read_manifest, shard_name
from seqzoo.data.source import Corpus, Document, Position, Source
from seqzoo.data.tokenizer import Tokenizer

OPEN = 128  # shards of a source; each has a file open


class Shards(Source):
    """One side of a folder. A position is the number of documents before it.

    Args:
        folder: of the shards.
        manifest: its own, of all that is done.
        side: "train" or "validation".
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], side: str) -> None:
        self.folder, self.side, self.tokenizer = folder, side, manifest["tokenizer"]
        self.facts = manifest["sides"][side]
        self.begins = [0, *accumulate(facts["documents"] for facts in self.facts)]
        self.shard = lru_cache(OPEN)(self._shard)

    def documents(self, tokenizer: Tokenizer, position: Position = None) -> Iterator[tuple[Document, Position]]:
        _check_tokenizer(self.folder, self.tokenizer, tokenizer)
        after = position or 0
        while after < self.begins[-1]:
            number = bisect_right(self.begins, after) - 1
            sizes = np.diff(self.shard(number).index)[:, after - self.begins[number] :].T.tolist()
            for num_tokens, num_bytes in sizes:
                yield Stored(self, number, after - self.begins[number], num_tokens, num_bytes), after + 1
                after += 1

    def identity(self) -> dict[str, Any]:
        content = json.dumps([self.tokenizer, self.facts], sort_keys=True).encode()
        return dict(shards=hashlib.sha256(content).hexdigest())

    def _shard(self, number: int) -> Shard:
        base = self.folder / shard_name(self.side, number)
        return Shard(base, self.facts[number], self.tokenizer["vocab_size"])


class Stored:
    """A document in a shard."""

    __slots__ = ("source", "number", "place", "num_tokens", "num_bytes")

    def __init__(self, source: Shards, number: int, place: int, num_tokens: int, num_bytes: int) -> None:
        self.source, self.number, self.place = source, number, place
        self.num_tokens, self.num_bytes = num_tokens, num_bytes

    def ids(self, first: int, last: int) -> np.ndarray:
        shard = self.source.shard(self.number)
        begin = int(shard.index[0, self.place])
        return shard.ids(begin + first, begin + last)

    def text(self) -> bytes:
        return self.source.shard(self.number).text(self.place)


def shards(*, folder: str, checksums: bool) -> Corpus:
    """Both sides of a folder that seqzoo-tokenize has made; they were dealt when it was.

    Args:
        folder: see `data/shard_files.py`.
        checksums: read all of it once and compare; without, sizes are compared, and indexes as they are opened.

    Raises:
        ValueError: no such folder, one that is not done, or is damaged.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if "sides" not in manifest:
        raise ValueError(f"data.folder: expected shards that are done, got {folder}; run its seqzoo-tokenize again")
    sides, said = manifest["sides"], manifest.get("tokenizer")
    lists = [sides.get(side) for side in Corpus._fields] if isinstance(sides, dict) else [None]
    if not all(isinstance(facts, list) and all(map(are_facts, facts)) for facts in lists):
        raise ValueError(f"{path / MANIFEST}: expected each shard's numbers, sizes and checksums, got not all of them")
    if not isinstance(said, dict) or not isinstance(said.get("vocab_size"), int):
        raise ValueError(f"{path / MANIFEST}: expected what is known of a tokenizer, got {said!r}")
    for side, facts in zip(Corpus._fields, lists, strict=True):
        for number, each in enumerate(facts):
            damage = damage_of(path / shard_name(side, number), each, content=checksums)
            if damage is not None:
                raise ValueError(f"a damaged shard: {damage}; run its seqzoo-tokenize again")
    return Corpus(*(Shards(path, manifest, side) for side in Corpus._fields))


def _check_tokenizer(folder: Path, expected: dict[str, Any], tokenizer: Tokenizer) -> None:
    found = facts_of(tokenizer)
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if changed:
        facts = ", ".join(f"{name}: expected {expected.get(name)}, got {found.get(name)}" for name in changed)
        raise ValueError(f"data.tokenizer: expected that of the shards, {folder}/tokenizer; {facts}")
