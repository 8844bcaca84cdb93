"""Where documents come from, and how they are dealt to training and validation."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

Position = Any  # what JSON can hold: where a source stands; None is its beginning


class Source(Protocol):
    """Documents in a fixed order, from any place on."""

    def read(self, position: Position = None) -> Iterator[tuple[bytes, Position]]:
        """One pass from `position` to the end: each document, and the position after it."""

    def identity(self) -> dict[str, Any]:
        """What must not change for a position to keep its meaning; plain JSON."""


class Corpus(NamedTuple):
    """No document is in both."""

    train: Source
    validation: Source


class Share:
    """The documents of a source that a hash of their content deals to one side.

    Args:
        source: all documents.
        share: part of them that is for validation, 0 to 1.
        validation: whether this is the validation side.
    """

    def __init__(self, source: Source, share: float, *, validation: bool) -> None:
        self.source, self.share, self.validation = source, check_share(share), validation

    def read(self, position: Position = None) -> Iterator[tuple[bytes, Position]]:
        for document, after in self.source.read(position):
            if is_validation(document, self.share) == self.validation:
                yield document, after

    def identity(self) -> dict[str, Any]:
        return {**self.source.identity(), "validation_share": self.share}


def is_validation(key: bytes, share: float) -> bool:
    """The same key falls on the same side in every run and on every machine."""
    digest = hashlib.md5(key, usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_share(share: float) -> float:
    """Raises ValueError unless 0 < share < 1."""
    if not 0 < share < 1:
        raise ValueError(f"validation_share: expected a number between 0 and 1, got {share}")
    return share
