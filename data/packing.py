"""Documents packed into rows of one length, with nothing lost and nothing seen twice.

A document of n tokens is n + 1 places: its start mark and its tokens are read, its tokens and its end mark are
predicted. Places are laid one after the other and cut into rows. So each byte is predicted exactly once per epoch, also
the first of a row, and a document cut by a row's end goes on in the next row as a segment of its own, whose positions
begin at 0 again.
"""

import lzma
import math
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.data.source import Position, Source
from seqzoo.data.tokenizer import Tokenizer

IGNORED = -100  # a target that is none, as in transformers


class Batch(NamedTuple):
    """R rows of T places."""

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64, 0 where a document or a row begins
    shift_labels: Tensor  # [R, T] int64, the token after each place
    num_targets: int  # places that predict something
    num_bytes: int  # bytes of text that they predict

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The model's arguments."""
        names = ("input_ids", "position_ids", "shift_labels")
        return {name: getattr(self, name).to(device, non_blocking=True) for name in names}


class Places(NamedTuple):
    """Places in a line, [n] int64 each."""

    inputs: Tensor
    targets: Tensor
    sizes: Tensor  # bytes of text that a target stands for; the sum over a document is its length
    begins: Tensor  # 1 where a document begins

    def rows(self, length: int) -> Batch:
        """As rows; the number of places is a multiple of the length."""
        index = torch.arange(self.inputs.shape[0])
        begin = torch.where(self.begins.bool() | (index % length == 0), index, 0).cummax(0).values
        inputs, positions, targets = (x.view(-1, length) for x in (self.inputs, index - begin, self.targets))
        return Batch(inputs, positions, targets, int((targets != IGNORED).sum()), int(self.sizes.sum()))


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

    Raises:
        ValueError: sizes below 1; from `next`, a source without documents.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, *, rows: int, length: int, seed: int, shuffle_buffer: int
    ) -> None:
        for name, value in dict(batch_size=rows, sequence_length=length, shuffle_buffer=shuffle_buffer).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.source, self.tokenizer, self.rows, self.length = source, tokenizer, rows, length
        self.seed, self.buffer = seed, shuffle_buffer
        self._start(dict(epoch=0, block=0, position=None, used=0))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        wanted, parts = self.rows, []
        while wanted:
            if self.used == len(self.order):
                self._next_block()
                self.used = 0
            some = self.order[self.used : self.used + wanted]
            parts.append(Places(*(x[some].long() for x in self.places)))
            wanted -= len(some)
            self.used += len(some)
        return Places(*(torch.cat(x).flatten() for x in zip(*parts, strict=True))).rows(self.length)

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
        places, self.order, self.place = next(self.blocks)
        self.places = Places(*(x.view(-1, self.length) for x in places))  # [rows of the block, length] each

    def _read(self, epoch: int, block: int, position: Position) -> Iterator[tuple[Places, list[int], dict[str, Any]]]:
        """Each block: its places, the order of its rows, and where it is read from."""
        while True:
            stream, found = self.source.read(position), False
            while documents := list(islice(stream, self.buffer)):
                found = True
                draw = Random(f"{self.seed} {epoch} {block}")
                parts = [_places(text, self.tokenizer) for text, _ in draw.sample(documents, len(documents))]
                parts.append(_filling(-sum(part.inputs.shape[0] for part in parts) % self.length, self.tokenizer))
                places = _joined(parts)
                rows = range(places.inputs.shape[0] // self.length)
                here = dict(epoch=epoch, block=block, position=position)
                yield places, draw.sample(rows, len(rows)), here
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
        self.length, self.text = length, b""
        texts, parts, size = [], [], 0
        for document, _ in source.read():
            texts.append(document)
            parts.append(_places(document, tokenizer))
            size += len(document)
            if size >= limit:
                break
        if not texts:
            raise ValueError("validation data: expected documents, got none; hold out more, or name files for it")
        self.text = b"".join(texts)
        parts.append(_filling(-sum(part.inputs.shape[0] for part in parts) % length, tokenizer))
        self.places = _joined(parts)

    def batches(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """All rows, or as many as hold `limit` places, spread evenly over all; `rows` at a time."""
        total = self.places.inputs.shape[0] // self.length
        count = total if limit is None else min(total, math.ceil(limit / self.length))
        chosen = torch.arange(count) * total // count
        for some in chosen.split(rows):
            yield Places(*(x.view(-1, self.length)[some].flatten().long() for x in self.places)).rows(self.length)

    def xz_bits_per_byte(self) -> float:
        """What `xz -9` needs for the same bytes."""
        return 8 * len(lzma.compress(self.text, preset=9)) / len(self.text)


def _places(document: bytes, tokenizer: Tokenizer) -> Places:
    ids = tokenizer.encode(document)
    n = ids.shape[0]
    share = torch.arange(n + 1) * len(document) // max(n, 1)  # bytes up to each token, were all equally long
    begins = torch.zeros(n + 1, dtype=torch.long)
    begins[0] = 1
    start, end = torch.tensor([tokenizer.start]), torch.tensor([tokenizer.end])
    return Places(torch.cat([start, ids]), torch.cat([ids, end]), torch.cat([share.diff(), torch.tensor([0])]), begins)


def _joined(parts: list[Places]) -> Places:
    """One line of all, in half the memory that ids take in a batch."""
    return Places(*(torch.cat([x.int() for x in field]) for field in zip(*parts, strict=True)))


def _filling(n: int, tokenizer: Tokenizer) -> Places:
    zeros = torch.zeros(n, dtype=torch.long)
    begins = zeros.clone()
    begins[:1] = 1
    return Places(torch.full((n,), tokenizer.end), torch.full((n,), IGNORED), zeros, begins)
