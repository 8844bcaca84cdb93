"""The Python standard library's own sources: real text that every machine with Python already has."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqzoo.data.source import Corpus, Position, TextSource, check_share, is_validation

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Folder(TextSource):
    """Files as documents, one each, in the order of their names.

    Args:
        root: the folder.
        names: paths below it, with "/".
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, sorted(names)

    def read(self, position: Position = None) -> Iterator[tuple[bytes, Position]]:
        for index in range(position or 0, len(self.names)):
            yield (self.root / self.names[index]).read_bytes(), index + 1

    def identity(self) -> dict[str, Any]:
        listing = [f"{name} {(self.root / name).stat().st_size}" for name in self.names]
        return {"files": hashlib.sha256("\n".join(listing).encode()).hexdigest()}


def stdlib(*, validation_share: float, folder: str | None = None) -> Corpus:
    """Every .py file of the standard library that is not a test, as bytes.

    Args:
        validation_share: part of the files, by a hash of their names, that training never sees; 0 to 1.
        folder: another folder of .py files instead.

    Raises:
        ValueError: no .py file there, or none for one of the two sides.
    """
    check_share(validation_share)
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py") if path.is_file() and path.stat().st_size]
    names = [name.as_posix() for name in names if not NOT_LIBRARY & set(name.parts[:-1])]
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name in names:
        sides[is_validation(name.encode(), validation_share)].append(name)
    for validation, side in sides.items():
        if not side:
            what = "validation" if validation else "training"
            raise ValueError(f"data.folder: expected .py files for {what} in {root}, got none of {len(names)} files")
    return Corpus(Folder(root, sides[False]), Folder(root, sides[True]))
