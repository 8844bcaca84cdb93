"""Documents packed into rows of one length (`data/rows.py`), with nothing lost and nothing seen twice.

Each byte is predicted exactly once per epoch, also the first of a row.
"""

import lzma
import math
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import torch

from seqzoo.data.rows import IGNORED, Batch, Rows
from seqzoo.data.source import Position, Source
from seqzoo.data.tokenizer import Tokenizer

__all__ = ["IGNORED", "Batch", "TrainingBatches", "ValidationRows"]


class TrainingBatches:
    """Batches without end: epoch after epoch, each in an order of its own, exact to resume.

    Documents are read in blocks of `shuffle_buffer`, dealt in a drawn order, cut into rows, and the rows dealt again: a
    batch of neighbouring rows would be one long document, and its gradient that document's. So a state is a block's
    position in the source and how many of its rows are used. The last row of a block is filled up with targets that
    count for nothing.

    Args:
        source: the documents.
        tokenizer: makes ids of them.
        rows: rows of a batch.
        length: tokens of a row.
        seed: of the orders.
        shuffle_buffer: documents of a block; all of the source, where it has fewer.
        here: the rows of each batch that this process reads, of which alone the batch has tensors; its counts, the
            order and the state are those of all rows. None is all.

    Raises:
        ValueError: sizes below 1; from `next`, a source without documents.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        rows: int,
        length: int,
        seed: int,
        shuffle_buffer: int,
        here: slice | None = None,
    ) -> None:
        for name, value in dict(batch_size=rows, sequence_length=length, shuffle_buffer=shuffle_buffer).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.source, self.tokenizer, self.length = source, tokenizer, length
        self.size, self.here = rows, range(rows)[here or slice(None)]
        self.seed, self.buffer = seed, shuffle_buffer
        self._start(dict(epoch=0, block=0, position=None, used=0))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        taken, parts, targets, size = 0, [], 0, 0
        while taken < self.size:
            if self.used == len(self.order):
                self._next_block()
                self.used = 0
            some = self.order[self.used : self.used + self.size - taken]
            parts.append(self.rows.tensors([row for i, row in enumerate(some, taken) if i in self.here]))
            targets += int(self.rows.num_targets[some].sum())
            size += int(self.rows.num_bytes[some].sum())
            taken += len(some)
            self.used += len(some)
        return Batch(*(torch.cat(x) for x in zip(*parts, strict=True)), targets, size)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins; plain JSON."""
        return {**self.place, "used": self.used, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ValueError where the data are not those of the state, naming what differs."""
        state = dict(state)
        then, now = state.pop("identity"), self._identity()
        changed = [name for name in then.keys() | now.keys() if then.get(name) != now.get(name)]
        if changed:
            facts = ", ".join(f"{name}: expected {then.get(name)}, got {now.get(name)}" for name in sorted(changed))
            raise ValueError(f"the data differ from the checkpoint's: {facts}")
        self._start(state)

    def _start(self, state: dict[str, Any]) -> None:
        self.used = state["used"]
        self.place = {name: value for name, value in state.items() if name != "used"}
        self.blocks = self._read(**self.place)
        self.order: list[int] = []
        if self.used:
            self._next_block()

    def _next_block(self) -> None:
        self.rows, self.order, self.place = next(self.blocks)

    def _read(self, epoch: int, block: int, position: Position) -> Iterator[tuple[Rows, list[int], dict[str, Any]]]:
        """Each block: its rows, their order, and where it is read from."""
        while True:
            stream, found = self.source.documents(self.tokenizer, position), False
            while documents := list(islice(stream, self.buffer)):
                found = True
                draw = Random(f"{self.seed} {epoch} {block}")
                dealt = [document for document, _ in draw.sample(documents, len(documents))]
                rows = Rows(dealt, self.tokenizer, self.length)
                here = dict(epoch=epoch, block=block, position=position)
                yield rows, draw.sample(range(len(rows)), len(rows)), here
                block, position = block + 1, documents[-1][1]
            if not found and position is None:
                raise ValueError("training data: expected documents, got none")
            epoch, block, position = epoch + 1, 0, None

    def _identity(self) -> dict[str, Any]:
        sizes = dict(seed=self.seed, shuffle_buffer=self.buffer, sequence_length=self.length)
        return {**self.source.identity(), **sizes}


class ValidationRows:
    """A fixed set of rows: the source's first documents, up to a number of bytes.

    Args:
        source: the documents.
        tokenizer: makes ids of them.
        length: tokens of a row.
        limit: bytes of text after which no further document is read.

    Raises:
        ValueError: no documents.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, *, length: int, limit: int) -> None:
        documents, size = [], 0
        for document, _ in source.documents(tokenizer):
            documents.append(document)
            size += document.num_bytes
            if size >= limit:
                break
        if not documents:
            raise ValueError("validation data: expected documents, got none; hold out more, or name files for it")
        self.rows = Rows(documents, tokenizer, length)

    @property
    def text(self) -> bytes:
        """All of it. Raises ValueError: the source has none."""
        return b"".join(document.text() for document in self.rows.documents)

    def batches(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """All rows, or as many as hold `limit` places, spread evenly over all; `rows` at a time."""
        total = len(self.rows)
        count = total if limit is None else min(total, math.ceil(limit / self.rows.length))
        chosen = torch.arange(count) * total // count
        for some in (part.tolist() for part in chosen.split(rows)):
            counts = (int(x[some].sum()) for x in (self.rows.num_targets, self.rows.num_bytes))
            yield Batch(*self.rows.tensors(some), *counts)

    def xz_bits_per_byte(self) -> float:
        """What `xz -9` needs for the same bytes."""
        text = self.text
        return 8 * len(lzma.compress(text, preset=9)) / len(text)
