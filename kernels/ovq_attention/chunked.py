"""OVQ attention, a chunk of every document at a time, in torch on any device.

Memory in training grows by N (K + V) / C numbers a token and key head, never by [T, N] scores. Where a state comes
in, the host waits to know its length, and for packed documents or padding once for all layers that get the same marks;
the chunks themselves never wait.

A documents at work   G key heads   H = r G query heads   L new tokens   C tokens of the chunk   M slots in use
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqzoo.kernels.ovq_attention.layout import Document, layout, sent
from seqzoo.kernels.ovq_attention.read import InTurn, column
from seqzoo.kernels.ovq_attention.rule import OVQRule, OVQState


def ovq_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    rule: OVQRule,
    state: OVQState | None = None,
    starts: Tensor | None = None,
    valid: Tensor | None = None,
    read: Any = InTurn,
) -> tuple[Tensor, OVQState | None]:
    """Same as `ovq_attention_reference`; `read`: a class in the manner of `InTurn`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    kv, scale = torch.cat([k, v], dim=-1), scale.to(dtype)
    seen = [0] * len(q) if state is None else state.tokens.tolist()
    if state is not None:
        kv = torch.cat([state.pending.to(kv.dtype), kv], dim=1)
    plan = layout(q, kv, rule.chunk, seen, starts, valid, keep=state is not None)
    if not plan.steps:  # nothing but padding
        return q.new_zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype), state
    memory, counts = _before(plan.documents, state, kv, dtype)
    tokens = plan.tokens.rows(kv).to(dtype)
    reader, ended = read(q, tokens, scale, plan, rule), _Ended(plan.documents, q.shape[1])
    for s, (step, chunk) in enumerate(zip(plan.steps, plan.tokens.parts(tokens), strict=True)):
        M = max(map(rule.used, step.merged))
        reader.add(memory[:, :, :M], counts[:, :, :M])
        n, going_on = step.writes, plan.steps[s + 1].at_work if s + 1 < len(plan.steps) else 0
        if state is not None:
            ended.add(n, memory[n:], counts[n:])
        if n:
            memory, counts = _write(memory[:n], counts[:n], chunk[:n], step.merged[:n], q.shape[-1], rule, read)
        if state is not None:
            ended.add(going_on, memory[going_on:n], counts[going_on:n])
        memory, counts = memory[:going_on], counts[:going_on]
    o = plan.queries.give_back(reader.rows()).view(*q.shape[:3], -1).to(v.dtype)
    return o, None if state is None else ended.state(state, kv, seen, rule)


def _before(found: Sequence[Document], state: OVQState | None, kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The memory [A, G, M, K + V] and counts [A, G, M] that each document begins with; M = 0 where all are new."""
    if state is None or not any(d.merged for d in found):
        memory = kv.new_zeros(len(found), kv.shape[2], 0, kv.shape[3], dtype=dtype)
        return memory, memory[..., 0]
    memory, counts = (_rows(x.to(dtype), [d.row for d in found]) for x in state[:2])
    if all(d.merged for d in found):
        return memory, counts
    new = sent([d.merged == 0 for d in found], kv.device)[:, None, None]
    return memory.masked_fill(new[..., None], 0.0), counts.masked_fill(new, 0.0)


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x if rows == list(range(len(x))) else x.index_select(0, sent(rows, x.device))


class _Ended:
    """Gathers the memories of documents that end with their row, in whatever order they come."""

    def __init__(self, found: Sequence[Document], T: int) -> None:
        self.found, self.T = found, T
        self.rows, self.memory, self.counts = [], [], []

    def add(self, first: int, memory: Tensor, counts: Tensor) -> None:
        """Of the documents from the first-th on."""
        here = [i for i in range(len(memory)) if self.found[first + i].end == self.T]
        if here:
            self.rows += [self.found[first + i].row for i in here]
            self.memory.append(_rows(memory, here))
            self.counts.append(_rows(counts, here))

    def state(self, past: OVQState, kv: Tensor, seen: Sequence[int], rule: OVQRule) -> OVQState:
        """After the call; rows of nothing but padding stay. kv [B, C - 1 + T, G, K + V]: what was pending, and came."""
        tokens = {d.row: d.merged + d.pending + d.end - d.begin for d in self.found if d.end == self.T}
        tokens = sent([tokens.get(row, before) for row, before in enumerate(seen)], kv.device)
        pending, idle = kv[:, self.T :], [row for row in range(len(kv)) if row not in self.rows]
        if idle:
            self.rows += idle
            self.memory.append(past.memory[idle].to(self.memory[0].dtype))
            self.counts.append(past.counts[idle].to(self.counts[0].dtype))
            pending = pending.index_copy(0, sent(idle, kv.device), kv[idle, : rule.chunk - 1])
        order = sorted(range(len(kv)), key=self.rows.__getitem__)
        room = [rule.slots - x.shape[2] for x in self.counts]
        memory = torch.cat([F.pad(x, (0, 0, 0, n)) if n else x for x, n in zip(self.memory, room, strict=True)])
        counts = torch.cat([F.pad(x, (0, n)) if n else x for x, n in zip(self.counts, room, strict=True)])
        return OVQState(_rows(memory, order), _rows(counts, order), pending, tokens)


def _write(
    memory: Tensor, counts: Tensor, chunk: Tensor, merged: list[int], K: int, rule: OVQRule, read: Any
) -> tuple[Tensor, Tensor]:
    """Full chunks [A, G, C, K + V] into their documents' memory and counts, both with room for the new slots."""
    with torch.no_grad():
        slot = _assign(chunk[..., :K], memory[..., :K], counts, merged, rule, read)  # [A, G, C]
        counts = F.pad(counts, (0, max(0, max(rule.used(t + rule.chunk) for t in merged) - counts.shape[2])))
        slot += torch.arange(0, counts.numel(), counts.shape[2], device=slot.device).view(*slot.shape[:2], 1)
        added = torch.zeros_like(counts).flatten().index_add_(0, slot.flatten(), counts.new_ones(slot.numel()))
        added = added.view_as(counts)
        step = 1 / (counts + added).clamp(min=1)
        if rule.step is not None:
            step = torch.where(counts == 0, step, (1 / added).clamp(max=rule.step))
    new = _Write.apply(memory, chunk, slot.flatten(), (1 - added * step)[..., None], step.flatten()[slot][..., None])
    if rule.renormalise:
        new = torch.cat([F.normalize(new[..., :K], dim=-1), new[..., K:]], dim=-1)
    return (new.detach() if rule.detach else new), counts + added


class _Write(torch.autograd.Function):
    """memory [A, G, M, W] times keep [A, G, M', 1], which may be longer, and chunk [A, G, C, W] times move
    [A, G, C, 1] added at slot [A G C], counted over all heads."""

    @staticmethod
    def forward(ctx, memory, chunk, slot, keep, move):
        M = memory.shape[2]
        new = memory * keep[:, :, :M]
        new = F.pad(new, (0, 0, 0, keep.shape[2] - M)) if keep.shape[2] > M else new
        add_rows(new.view(-1, new.shape[-1]), slot, (chunk * move).flatten(0, 2))
        ctx.save_for_backward(slot, keep[:, :, :M], move)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx, d_new):
        slot, keep, move = ctx.saved_tensors
        d_chunk = d_new.flatten(0, 2).index_select(0, slot).view(*move.shape[:3], -1) * move
        return d_new[:, :, : keep.shape[2]] * keep, d_chunk, None, None, None


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, always in one order, which a GPU keeps in this way only."""
    if total.device.type == "cuda":
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def _assign(k: Tensor, slots: Tensor, counts: Tensor, merged: list[int], rule: OVQRule, read: Any) -> Tensor:
    """The slot [A, G, C] of each key [A, G, C, K], of slots [A, G, M, K]."""
    C, device = k.shape[2], k.device
    if rule.similarity == "cosine":
        k, slots = F.normalize(k, dim=-1), F.normalize(slots, dim=-1)
    if not any(merged):
        return _assign_first(k @ k.mT, rule.used(C), rule, read)
    used, new = [rule.used(t) for t in merged], [rule.used(t + C) - rule.used(t) for t in merged]
    likeness = k @ slots[:, :, : max(used)].mT
    if min(used) < max(used):
        likeness.masked_fill_(counts[:, :, None, : max(used)] == 0, -torch.inf)
    likeness, slot = likeness.max(-1)
    if any(new):
        if rule.choice == "novel":
            order = likeness.argsort(stable=True)
        else:
            order = torch.stack([rule.scatter(t, device) for t in merged])[:, None].expand_as(slot)
        place = torch.arange(C, device=device).expand_as(order)
        rank = torch.empty_like(place).scatter_(-1, order, place)
        slot = torch.where(rank < column(new, device), rank + column(used, device), slot)
    if not all(merged):
        first = sent([t == 0 for t in merged], device)[:, None, None]
        slot = torch.where(first, _assign_first(k @ k.mT, rule.used(C), rule, read), slot)
    return slot


def _assign_first(likeness: Tensor, new: int, rule: OVQRule, read: Any) -> Tensor:
    """The same where no slot is in use; likeness [A, G, C, C] of the chunk's keys."""
    if rule.first_chunk == "farthest":
        return read.farthest(likeness, new)
    slot = torch.zeros_like(likeness[..., 0], dtype=torch.int64)
    chosen = 1 + likeness[..., 0, 1:].argsort(stable=True)
    chosen = torch.cat([torch.zeros_like(slot[..., :1]), chosen], dim=-1)[..., :new]
    return slot.scatter(-1, chosen, torch.arange(new, device=slot.device).expand_as(chosen))
