"""Where documents come from, and how they are dealt to training and validation."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from seqzoo.data.tokenizer import Tokenizer

Position = Any  # what JSON can hold: where a source stands; None is its beginning


class Document(Protocol):
    """Tokens whose number is known before they are read.

    Attributes:
        num_tokens: without marks.
        num_bytes: of the text that they stand for.
    """

    num_tokens: int
    num_bytes: int

    def ids(self, first: int, last: int) -> np.ndarray:
        """The tokens from `first` up to `last`, [last - first], of an integer kind."""

    def text(self) -> bytes:
        """What the tokens stand for. Raises ValueError: it was not kept."""


class Source(Protocol):
    """Documents in a fixed order, from any place on."""

    @abstractmethod
    def documents(self, tokenizer: Tokenizer, position: Position = None) -> Iterator[tuple[Document, Position]]:
        """One pass from `position` to the end: each document, and the position after it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must not change for a position to keep its meaning; plain JSON."""


class TextSource(Source):
    """Documents that are text; a tokenizer makes ids of them as they are read."""

    @abstractmethod
    def read(self, position: Position = None) -> Iterator[tuple[bytes, Position]]:
        """One pass from `position` to the end: each document's text, and the position after it."""

    def documents(self, tokenizer: Tokenizer, position: Position = None) -> Iterator[tuple[Document, Position]]:
        for text, after in self.read(position):
            yield Read(text, tokenizer), after


class Read:
    """A document in memory."""

    def __init__(self, text: bytes, tokenizer: Tokenizer) -> None:
        self._text, self._ids = text, tokenizer.encode(text).numpy().astype(np.int32)  # half of what a batch takes
        self.num_tokens, self.num_bytes = len(self._ids), len(text)

    def ids(self, first: int, last: int) -> np.ndarray:
        return self._ids[first:last]

    def text(self) -> bytes:
        return self._text


class Corpus(NamedTuple):
    """No document is in both."""

    train: Source
    validation: Source


class Share(TextSource):
    """The documents of a source that a hash of their content deals to one side.

    Args:
        source: all documents.
        share: part of them that is for validation, 0 to 1.
        validation: whether this is the validation side.
    """

    def __init__(self, source: TextSource, share: float, *, validation: bool) -> None:
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
