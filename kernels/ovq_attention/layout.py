"""Rows of packed documents as chunks of a batch of documents.

Documents know nothing of each other, so all of them are worked on at once, the first chunk of each, then the second of
each that has one, and so on. They are sorted by their number of chunks: those at work are always the first so many.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Document(NamedTuple):
    """What a call holds of one."""

    row: int
    begin: int  # its tokens begin .. end of the row
    end: int
    pending: int  # tokens in its open chunk before the call
    merged: int  # tokens in its memory before the call
    pieces: int  # chunks that the call has tokens of
    writes: int  # chunks to merge: those that something still reads after


class Step(NamedTuple):
    """One chunk of each document at work."""

    at_work: int  # documents
    writes: int  # documents that merge this chunk, the first so many of those at work
    offset: list[int]  # of each document, tokens of this chunk before the first new one
    length: list[int]  # of each document, tokens of this chunk, old and new
    merged: list[int]  # of each document, tokens in its memory


def documents(
    T: int, chunk: int, seen: Sequence[int], starts: Tensor | None, valid: Tensor | None, keep: bool
) -> list[Document]:
    """Most work first. seen [B]: tokens of the open document of each row; keep: a state is wanted.

    Raises:
        ValueError: fewer than no tokens seen, with which C++ would read what is not there.
    """
    if min(seen) < 0:
        raise ValueError(f"ovq_attention: state.tokens: expected 0 or more, got {list(seen)}")
    edges: list[list[int]] = [[] for _ in seen]
    padding = [0] * len(seen) if valid is None else (valid.shape[1] - valid.sum(1)).tolist()
    for row, t in [] if starts is None else starts.nonzero().tolist():
        edges[row].append(t)
    found = []
    for row, before in enumerate(seen):
        first = padding[row]
        inner = [t for t in edges[row] if t > first]
        fresh = first in edges[row]
        for begin, end in zip([first, *inner], [*inner, T], strict=True):
            past = 0 if fresh or begin > first else before
            pending, length = past % chunk, past % chunk + end - begin
            pieces = -(-length // chunk) if end > begin else 0
            writes = length // chunk if keep and end == T else pieces - 1
            if pieces:
                found.append(Document(row, begin, end, pending, past - pending, pieces, writes))
    return sorted(found, key=lambda d: (-d.writes, -d.pieces, d.row))  # both fall


_last: tuple[tuple, list[weakref.ref], list[Document]] | None = None


def known_documents(
    T: int, chunk: int, seen: Sequence[int], starts: Tensor | None, valid: Tensor | None, keep: bool
) -> list[Document]:
    """`documents`, looked up once for all layers that get the same tensors: a GPU must be waited for."""
    global _last
    marks = [x for x in (starts, valid) if x is not None]
    if not marks or torch.compiler.is_compiling() or any(x.is_inference() for x in marks):
        return documents(T, chunk, seen, starts, valid, keep)
    key = T, chunk, tuple(seen), starts is None, valid is None, keep, *(x._version for x in marks)
    if _last is not None and _last[0] == key and all(a() is b for a, b in zip(_last[1], marks, strict=True)):
        return _last[2]
    found = documents(T, chunk, seen, starts, valid, keep)
    _last = key, [weakref.ref(x) for x in marks], found
    return found


def steps(found: Sequence[Document], chunk: int) -> list[Step]:
    plan = []
    for s in range(found[0].pieces if found else 0):
        here = [d for d in found if d.pieces > s]
        offset = [d.pending if s == 0 else 0 for d in here]
        length = [min(chunk, d.pending + d.end - d.begin - s * chunk) for d in here]
        merged = [d.merged + s * chunk for d in here]
        plan.append(Step(len(here), sum(d.writes > s for d in here), offset, length, merged))
    return plan


class Places(NamedTuple):
    """Where each piece's rows lie among the rows [B T H] of a tensor of tokens, and the reverse."""

    there: Tensor  # [n] int64, n the rows of all steps, [documents, H, width] each
    padding: Tensor | None  # [n, 1] bool, True for rows of no token, which repeat the piece's last; None if none is
    back: Tensor  # [B T H] int64
    lost: Tensor | None  # [B T H, 1] bool, True for rows that are in no piece; None if none is
    sizes: list[tuple[int, int, int]]  # of each step: documents, H, width

    def take(self, x: Tensor) -> list[Tensor]:
        """x [B, T, H, W] -> of each step [documents, H, width, W]."""
        return self.parts(self.rows(x))

    def rows(self, x: Tensor) -> Tensor:
        """x [B, T, H, W] -> [n, W], all steps' rows."""
        return _Take.apply(x.flatten(0, 2), self.there, None, self.back, self.lost)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """rows [n, W] -> of each step [documents, H, width, W]."""
        parts = rows.split([a * b * c for a, b, c in self.sizes])
        return [part.view(*size, -1) for part, size in zip(parts, self.sizes, strict=True)]

    def give_back(self, rows: Tensor) -> Tensor:
        """The reverse of `rows`: -> [B T H, W], zeros where no piece has anything."""
        return _Take.apply(rows, self.back, self.lost, self.there, self.padding)


class Layout(NamedTuple):
    documents: list[Document]
    steps: list[Step]
    queries: Places  # in tensors of the call's T tokens
    tokens: Places  # in tensors of S tokens, the last T of which are the call's


def layout(
    q: Tensor, kv: Tensor, chunk: int, seen: Sequence[int], starts: Tensor | None, valid: Tensor | None, *, keep: bool
) -> Layout:
    """Of a call with q [B, T, H, ...] and kv [B, S, G, ...]. seen, keep: see `documents`."""
    (B, T), S = q.shape[:2], kv.shape[1]
    found = known_documents(T, chunk, seen, starts, valid, keep)
    plan = steps(found, chunk)
    queries, tokens = [], []  # of each step its pieces: the first token in the batch, and the length
    for s, step in enumerate(plan):
        first = [s * chunk - d.pending for d in found[: step.at_work]]  # token of the call where the chunk begins
        first = [d.begin + a for d, a in zip(found, first, strict=False)]
        tokens.append([(d.row * S + S - T + a, n) for d, a, n in zip(found, first, step.length, strict=False)])
        queries.append(
            [(d.row * T + a + o, n - o) for d, a, o, n in zip(found, first, step.offset, step.length, strict=False)]
        )
    return Layout(
        found, plan, places(queries, B * T, q.shape[2], q.device), places(tokens, B * S, kv.shape[2], q.device)
    )


def places(steps: Sequence[Sequence[tuple[int, int]]], tokens: int, H: int, device: torch.device) -> Places:
    """Of the pieces (first token, length) of each step, among the batch's `tokens`."""
    widths = [max(length for _, length in pieces) for pieces in steps]
    table = [(*piece, w) for pieces, w in zip(steps, widths, strict=True) for piece in pieces]
    n, full = H * sum(w for _, _, w in table), sum(length for _, length, _ in table)
    begin, length, width = torch.tensor(table, dtype=torch.int64).view(-1, 3).unbind(1)
    size = width * H
    table = sent(torch.stack([begin, length, width, size.cumsum(0) - size, size]), device)
    begin, length, width, first = table[:4].repeat_interleave(table[4], dim=1, output_size=n)
    inside = torch.arange(n, device=device) - first
    head, j = inside // width, inside % width
    there = (begin + torch.minimum(j, length - 1)) * H + head
    padding = None if full * H == n else j >= length
    rows = tokens * H
    goal = there if padding is None else there.masked_fill(padding, rows)
    back = torch.full((rows + 1,), -1, device=device).scatter_(0, goal, torch.arange(n, device=device))[:rows]
    return Places(
        there,
        None if padding is None else padding[:, None],
        back.clamp(min=0),
        None if full == tokens else (back < 0)[:, None],
        [(len(pieces), H, w) for pieces, w in zip(steps, widths, strict=True)],
    )


def sent(values: Sequence | Tensor, device: torch.device) -> Tensor:
    """What the host knows, on the device; a GPU is not waited for."""
    x = torch.as_tensor(values, device=None if isinstance(values, Tensor) else "cpu")  # not a default device's
    if device.type != "cuda" or x.is_cuda or torch.compiler.is_compiling():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class _Take(torch.autograd.Function):
    """Rows x[index], zeros where `hidden`; as rows come once at most, the gradient is taken in the same way, by
    `reverse`."""

    @staticmethod
    def forward(ctx, x, index, hidden, reverse, hidden_back):
        ctx.reverse = reverse, hidden_back
        return _rows(x, index, hidden)

    @staticmethod
    def backward(ctx, d_y):
        return _rows(d_y, *ctx.reverse), None, None, None, None


def _rows(x: Tensor, index: Tensor, hidden: Tensor | None) -> Tensor:
    y = x.index_select(0, index)
    return y if hidden is None else y.masked_fill_(hidden, 0.0)
