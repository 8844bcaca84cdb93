"""Local .txt, .jsonl and .parquet files, read as a stream: no file is ever in memory as a whole."""

import hashlib
import json
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from seqzoo.data.source import Corpus, Position, Share, TextSource

SUFFIXES = (".txt", ".jsonl", ".parquet")
HANDLERS = {"strict": "strict", "replace": "replace", "bytes": "surrogateescape"}  # surrogates carry the raw bytes


class TextFiles(TextSource):
    """The documents of some files, file after file. A position is [file, byte offset or row in it].

    A .jsonl line or a .parquet row is a document. A .txt file is one too, cut at line ends where it is longer
    than `longest_document`.

    Args:
        files: paths; each non-empty and readable.
        column: the field of a .jsonl line or the column of a .parquet file that holds the text.
        errors: what to do with bytes that are no UTF-8: "strict" raises, "replace" puts U+FFFD, "bytes" keeps them.
        longest_document: bytes of one document of a .txt file.

    Raises:
        ValueError: a file of unknown kind, empty or unreadable; an unknown `errors`; from `read` also text that is no
            UTF-8 (with file and byte offset), a line that is no JSON, a missing column.
    """

    def __init__(self, files: list[str], *, column: str, errors: str, longest_document: int) -> None:
        if errors not in HANDLERS:
            raise ValueError(f"data.errors: expected one of {list(HANDLERS)}, got {errors!r}")
        if longest_document < 4:  # the longest UTF-8 character
            raise ValueError(f"data.longest_document: expected at least 4 bytes, got {longest_document}")
        for file in files:
            _check_file(file)
        self.files, self.column = files, column
        self.errors, self.longest = errors, longest_document

    def read(self, position: Position = None) -> Iterator[tuple[bytes, Position]]:
        first, offset = position or (0, 0)
        readers = {".txt": self._read_txt, ".jsonl": self._read_jsonl, ".parquet": self._read_parquet}
        for index in range(first, len(self.files)):
            file = self.files[index]
            for document, after in readers[Path(file).suffix](file, offset if index == first else 0):
                if document:
                    yield document, [index, after]

    def identity(self) -> dict[str, Any]:
        listing = [f"{Path(file).name} {Path(file).stat().st_size}" for file in self.files]
        files = hashlib.sha256("\n".join(listing).encode()).hexdigest()
        return dict(files=files, column=self.column, errors=self.errors, longest_document=self.longest)

    def _read_txt(self, file: str, offset: int) -> Iterator[tuple[bytes, int]]:
        with open(file, "rb") as stream:
            stream.seek(offset)
            while piece := stream.read(self.longest):
                if len(piece) == self.longest:
                    piece = piece[: _cut(piece)]
                    stream.seek(offset + len(piece))
                text = piece if self.errors == "bytes" else self._decode(piece, file, offset).encode()
                offset += len(piece)
                yield text, offset

    def _read_jsonl(self, file: str, offset: int) -> Iterator[tuple[bytes, int]]:
        with open(file, "rb") as stream:
            stream.seek(offset)
            for line in stream:
                where, offset = f"{file}, byte {offset}", offset + len(line)
                if line.strip():
                    text = self._decode(line, file, offset - len(line))
                    yield self._field(text, where), offset

    def _read_parquet(self, file: str, offset: int) -> Iterator[tuple[bytes, int]]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as table:
            _check_column(self.column, table.schema_arrow.names, file)
            row = 0
            for group in range(table.num_row_groups):
                after = row + table.metadata.row_group(group).num_rows
                if after > offset:
                    for batch in table.iter_batches(row_groups=[group], columns=[self.column]):
                        for value in batch.column(0).to_pylist():
                            row += 1
                            if row > offset:
                                yield self._text(value, f"{file}, row {row - 1}"), row
                row = after

    def _decode(self, data: bytes, file: str, offset: int) -> str:
        try:
            return data.decode("utf-8", HANDLERS[self.errors])
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}: expected UTF-8, got byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
                "data.errors=replace or data.errors=bytes reads it all the same"
            ) from error

    def _field(self, line: str, where: str) -> bytes:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r} ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r}")
        _check_column(self.column, list(record), where)
        return self._text(record[self.column], where)

    def _text(self, value: Any, where: str) -> bytes:
        if not isinstance(value, str):
            raise ValueError(f"{where}: expected text in column {self.column!r}, got {type(value).__name__}")
        try:
            return value.encode("utf-8", HANDLERS[self.errors])
        except UnicodeEncodeError as error:  # half of a surrogate pair, escaped in JSON
            raise ValueError(f"{where}: expected Unicode text, got {value[error.start]!r}") from error


def text(
    *,
    files: str | list[str],
    column: str,
    errors: str,
    longest_document: int,
    validation_files: str | list[str] | None,
    validation_share: float,
) -> Corpus:
    """A corpus of local files.

    Args:
        files: paths or globs of .txt, .jsonl and .parquet files, `**` for any depth.
        column, errors, longest_document: as in `TextFiles`.
        validation_files: paths or globs of the files to validate on, none of them in `files`; None deals the documents
            of `files` by a hash of their content.
        validation_share: part of the documents for validation where no `validation_files` are given, 0 to 1.

    Raises:
        ValueError: no file fits a pattern, a file on both sides, and what `TextFiles` raises.
    """
    options = dict(column=column, errors=errors, longest_document=longest_document)
    train = find_files("data.files", files)
    if validation_files is None:
        source = TextFiles(train, **options)
        sides = (Share(source, validation_share, validation=side) for side in (False, True))
        return Corpus(*sides)
    held_out = find_files("data.validation_files", validation_files)
    both = {Path(file).resolve() for file in train} & {Path(file).resolve() for file in held_out}
    if both:
        raise ValueError(f"data.validation_files: expected files that are not in data.files, got {min(both)} in both")
    return Corpus(TextFiles(train, **options), TextFiles(held_out, **options))


def find_files(name: str, patterns: str | list[str]) -> list[str]:
    """Paths that fit, sorted. Raises ValueError for a pattern that no file fits, naming `name`."""
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fits = [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)
        fits = [path for path in fits if not Path(path).is_dir()]
        if not fits:
            raise ValueError(f"{name}: expected files, got none that fit {pattern!r}")
        found.update(fits)
    if not found:
        raise ValueError(f"{name}: expected at least one path or glob, got none")
    return sorted(found)


def _check_file(file: str) -> None:
    if Path(file).suffix not in SUFFIXES:
        raise ValueError(f"data file {file}: expected one of {', '.join(SUFFIXES)}, got {Path(file).suffix!r}")
    try:
        with open(file, "rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise ValueError(f"data file {file}: expected a readable file, got {error.strerror}") from error
    if empty:
        raise ValueError(f"data file {file}: expected text, got an empty file")


def _check_column(column: str, names: list[str], where: str) -> None:
    if column not in names:
        raise ValueError(f"data.column: expected a column of {where} ({', '.join(names)}), got {column!r}")


def _cut(piece: bytes) -> int:
    """Where to end a piece: after its last line, or else before a character that it holds only in part."""
    line = piece.rfind(b"\n") + 1
    if line:
        return line
    for back in range(1, 4):  # a character is at most four bytes, one that leads (11......) and some that follow
        if piece[-back] >= 0xC0:
            return len(piece) - back
        if piece[-back] < 0x80:
            break
    return len(piece)
