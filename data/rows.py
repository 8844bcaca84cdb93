"""Documents laid one after the other and cut into rows, each of which is made when it is asked for.

A document of n tokens is n + 1 places: its start mark and its tokens are read, its tokens and its end mark are
predicted. A document cut by a row's end goes on in the next row as a segment of its own, whose positions begin at 0
again. Where the rows are cut follows from the documents' lengths alone: whoever needs a few rows reads no other tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqzoo.data.source import Document
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


class Rows:
    """Rows of one length. The last is filled up with places that predict nothing.

    Args:
        documents: in order.
        tokenizer: says which ids begin and end a document.
        length: places of a row.

    Attributes:
        num_targets: [rows] places of each row that predict something.
        num_bytes: [rows] bytes of text that they predict; a document's bytes are dealt evenly to its tokens.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, length: int) -> None:
        self.documents, self.length, self.marks = documents, length, (tokenizer.start, tokenizer.end)
        tokens = np.array([document.num_tokens for document in documents], np.int64)
        sizes = np.array([document.num_bytes for document in documents], np.int64) * (tokens > 0)
        self.starts = np.concatenate([[0], np.cumsum(tokens + 1)])  # the place of each document's first, and the end
        total = int(self.starts[-1])
        cuts = np.minimum(np.arange(-(-total // length) + 1) * length, total)
        self.num_targets = np.diff(cuts)
        which = np.minimum(self._document_at(cuts), len(documents) - 1)
        inside = np.minimum(cuts - self.starts[which], tokens[which]) * sizes[which] // np.maximum(tokens[which], 1)
        self.num_bytes = np.diff(np.concatenate([[0], np.cumsum(sizes)])[which] + inside)

    def __len__(self) -> int:
        return len(self.num_targets)

    def tensors(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What is read, at which positions, and what is predicted, [R, T] int64 each; reads these rows' tokens only."""
        shape = len(rows), self.length
        inputs, labels = np.full(shape, self.marks[1], np.int64), np.full(shape, IGNORED, np.int64)
        positions = np.empty(shape, np.int64)
        for i, row in enumerate(rows):
            done, place = 0, row * self.length
            which = int(self._document_at(place))
            while done < self.length and which < len(self.documents):
                first = place + done - int(self.starts[which])
                size = min(int(self.starts[which + 1] - self.starts[which]) - first, self.length - done)
                line = self._line(self.documents[which], first, size + 1)
                here = slice(done, done + size)
                inputs[i, here], labels[i, here], positions[i, here] = line[:-1], line[1:], np.arange(size)
                done, which = done + size, which + 1
            positions[i, done:] = np.arange(self.length - done)
        return torch.from_numpy(inputs), torch.from_numpy(positions), torch.from_numpy(labels)

    def _document_at(self, place: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self.starts, place, side="right") - 1

    def _line(self, document: Document, first: int, size: int) -> np.ndarray:
        """So many ids of a document with its marks."""
        line = np.empty(size, np.int64)
        line[0], line[-1] = self.marks  # what is no mark is written over
        low, high = max(first - 1, 0), min(first + size - 1, document.num_tokens)
        begin = low + 1 - first
        line[begin : begin + high - low] = document.ids(low, high)
        return line
