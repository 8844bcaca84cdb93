"""Tokens on disk: what a folder of shards is, and how one of them is written and read.

    manifest.json      what the folder was made of, and each shard's numbers, sizes and checksums
    tokenizer/         what made the ids; AutoTokenizer opens it
    SIDE-00000.ids     ids one after the other, unsigned, little-endian, as wide as the vocabulary needs
    SIDE-00000.index   uint64, little-endian, [2, documents + 1]: where each document begins among the ids, and where
                       among the bytes of text; at the end, where the last one ends
    SIDE-00000.text    of the validation side: the text, one document after the other

SIDE is train or validation. Until all is done, a finished shard has its facts in SIDE-00000.json. Whatever is being
written has a name of its own that no reader looks at.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqzoo.data.tokenizer import Tokenizer

FORMAT = "seqzoo shards 1"
MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the name of what is being written
PROBE = "def f(x):\n\treturn  x + 10**6  # caf\u00e9, na\u00efve \u65e5\u672c\u8a9e \U0001f600 The THE the 3.14 2026-01-01\r\n"  # noqa: E501 # fmt: skip


def kind_of(vocab_size: int) -> str:
    """The narrowest of numpy's unsigned kinds that has all ids below `vocab_size`."""
    return next(kind for kind in ("uint8", "uint16", "uint32") if vocab_size - 1 <= np.iinfo(kind).max)


def facts_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """What two tokenizers share that make the same ids; by the ids of a line, also rules that no vocabulary shows."""
    ids = hashlib.sha256(json.dumps(tokenizer.encode(PROBE.encode()).tolist()).encode())
    return {**tokenizer.identity(), "probe": ids.hexdigest()}


def shard_name(side: str, number: int) -> str:
    return f"{side}-{number:05d}"


def write_shard(base: Path, documents: Sequence[bytes], tokenizer: Tokenizer, *, keep_text: bool) -> dict[str, Any]:
    """The files of a shard, each whole or not there at all -> its facts.

    Args:
        base: the shard's path without an ending.
        documents: texts.
        tokenizer: makes the ids.
        keep_text: the text, too.

    Raises:
        ValueError: nothing can be written there, or an id that is not below the vocabulary's size.
    """
    kind = np.dtype(kind_of(tokenizer.vocab_size)).newbyteorder("<")
    encoded = []
    for text in documents:
        ids = tokenizer.encode(text).numpy()
        if len(ids) and ids.max() >= tokenizer.vocab_size:
            raise ValueError(f"tokenizer: expected ids below {tokenizer.vocab_size}, got {ids.max()}")
        encoded.append(ids.astype(kind))
    begins = [np.cumsum([0, *map(len, line)]) for line in (encoded, documents)]
    parts = {"ids": encoded, "index": [np.array(begins, "<u8")]} | ({"text": documents} if keep_text else {})
    files = {}
    for ending, content in parts.items():
        digest = hashlib.sha256()
        for piece in content:
            digest.update(piece)
        size = write_whole(base.with_name(f"{base.name}.{ending}"), content)
        files[ending] = dict(size=size, sha256=digest.hexdigest())
    return dict(documents=len(documents), tokens=int(begins[0][-1]), bytes=int(begins[1][-1]), files=files)


def write_whole(path: Path, content: Sequence[Any]) -> int:
    """Write pieces of bytes so that the file is all there, on the disk, or is as it was -> its size.

    Raises:
        ValueError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written: {error.strerror}; the same command goes on later") from error
    return size


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, [(json.dumps(content, indent=1, sort_keys=True) + "\n").encode()])


def damage_of(base: Path, facts: dict[str, Any], *, content: bool) -> str | None:
    """What is wrong with a shard's files: one is missing or of another size, or, of their content, another checksum."""
    for ending, expected in facts["files"].items():
        file = base.with_name(f"{base.name}.{ending}")
        size = file.stat().st_size if file.is_file() else None
        if size != expected["size"]:
            found = "nothing" if size is None else f"{size} bytes"
            return f"{file}: expected {expected['size']} bytes, got {found}"
        if content and sha256(file) != expected["sha256"]:
            return f"{file}: expected sha256 {expected['sha256']}, got another"
    return None


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def are_facts(found: Any) -> bool:
    """Whether JSON's content is what the manifest says of a shard."""
    if not isinstance(found, dict) or not found.keys() >= {"begin", "end"}:  # positions in the source, of any kind
        return False
    files = found.get("files")
    if not isinstance(files, dict) or not files.keys() >= {"ids", "index"}:
        return False
    entries = [x for x in files.values() if isinstance(x, dict) and isinstance(x.get("sha256"), str)]
    counts = [found.get(key) for key in ("documents", "tokens", "bytes")] + [x.get("size") for x in entries]
    return len(entries) == len(files) and all(isinstance(n, int) and n >= 0 for n in counts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with `sides` only where all is done.

    Raises:
        ValueError: there is none, or it is not one of ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: expected a folder that seqzoo-tokenize made, got no {MANIFEST} ({error})"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{folder / MANIFEST}: expected format {FORMAT!r}, got {found!r}")
    return manifest


class Shard:
    """One that is open: memory-mapped, so that what is not asked for is not read.

    Args:
        base: its path without an ending.
        facts: of it, from the manifest.
        vocab_size: all ids are below it.

    Raises:
        ValueError: files that are not those of the facts. The ids themselves are looked at as they are read.
    """

    def __init__(self, base: Path, facts: dict[str, Any], vocab_size: int) -> None:
        damage = damage_of(base, facts, content=False)
        index = base.with_name(f"{base.name}.index")
        if damage is None and sha256(index) != facts["files"]["index"]["sha256"]:
            damage = f"{index}: expected sha256 {facts['files']['index']['sha256']}, got another"
        if damage is not None:
            raise ValueError(f"a damaged shard: {damage}")
        self.base, self.vocab_size = base, vocab_size
        self.index = np.fromfile(index, "<u8").astype(np.int64).reshape(2, -1)  # [2, documents + 1]
        ends = [self.index.shape[1] - 1, *self.index[:, -1].tolist()]
        if (
            ends != [facts["documents"], facts["tokens"], facts["bytes"]]
            or self.index[:, 0].any()
            or (np.diff(self.index) < 0).any()
        ):
            raise ValueError(
                f"a damaged shard: {index}: expected offsets of all documents that rise from 0, got others"
            )
        kind = np.dtype(kind_of(vocab_size)).newbyteorder("<")
        empty = np.empty(0, kind)  # which cannot be mapped
        self.tokens = (
            np.memmap(base.with_name(f"{base.name}.ids"), kind, "r").view(np.ndarray) if facts["tokens"] else empty
        )
        if len(self.tokens) != facts["tokens"]:
            raise ValueError(f"a damaged shard: {base}.ids: expected {facts['tokens']} ids, got {len(self.tokens)}")

    def ids(self, first: int, last: int) -> np.ndarray:
        """A stretch of them. Raises ValueError: one that no tokenizer gave."""
        some = np.array(self.tokens[first:last])
        if len(some) and some.max() >= self.vocab_size:
            raise ValueError(
                f"a damaged shard: {self.base}.ids: expected ids below {self.vocab_size}, got {some.max()}"
            )
        return some

    def text(self, document: int) -> bytes:
        """A document's. Raises ValueError: it was not kept."""
        first, last = self.index[1, document : document + 2].tolist()
        file = self.base.with_name(f"{self.base.name}.text")
        if not file.is_file():
            raise ValueError(f"{self.base}: expected the text of its documents, got ids alone")
        with open(file, "rb") as stream:
            stream.seek(first)
            return stream.read(last - first)
