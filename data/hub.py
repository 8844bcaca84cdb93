"""A data set of the Hugging Face hub, or a folder that `datasets` can read, as a stream."""

from collections.abc import Iterator
from typing import Any

from seqzoo.data.source import Corpus, Position, Share, TextSource


class HubDocuments(TextSource):
    """One split, example after example.

    Args:
        path, name, revision: what `datasets.load_dataset` calls so.
        split: for instance "train".
        column: the column that holds the text.

    Raises:
        ValueError: from `read`, no such column, or no text in it.
    """

    def __init__(self, path: str, *, name: str | None, revision: str | None, split: str, column: str) -> None:
        self.facts = dict(path=path, name=name, revision=revision, split=split)
        self.column = column

    def read(self, position: Position = None) -> Iterator[tuple[bytes, Position]]:
        from datasets import load_dataset

        stream = load_dataset(**self.facts, streaming=True)
        if position is not None:
            stream.load_state_dict(position)
        for example in stream:
            if self.column not in example:
                raise ValueError(f"data.column: expected one of {', '.join(example)}, got {self.column!r}")
            if not isinstance(example[self.column], str):
                kind = type(example[self.column]).__name__
                raise ValueError(f"{self.facts['path']}: expected text in column {self.column!r}, got {kind}")
            if document := example[self.column].encode():
                yield document, stream.state_dict()

    def identity(self) -> dict[str, Any]:
        return {**self.facts, "column": self.column}


def hub(
    *,
    path: str,
    name: str | None,
    revision: str | None,
    split: str,
    column: str,
    validation_split: str | None,
    validation_share: float,
) -> Corpus:
    """A streamed data set.

    Args:
        path, name, revision, split, column: as in `HubDocuments`.
        validation_split: the split to validate on; None deals the examples of `split` by a hash of their text.
        validation_share: part of the examples for validation where there is no `validation_split`, 0 to 1.
    """
    facts = dict(path=path, name=name, revision=revision, column=column)
    train = HubDocuments(split=split, **facts)
    if validation_split is not None:
        return Corpus(train, HubDocuments(split=validation_split, **facts))
    return Corpus(*(Share(train, validation_share, validation=side) for side in (False, True)))
