"""OVQ attention, a chunk of every document at a time, in torch on any device.

Kept for backward are the inputs, the outputs and each chunk's memory; the logits are computed again. So memory in
training grows by N (K + V) / C numbers a token and key head, never by [T, N] scores. Where a state, packed documents or
padding come in, the host waits once to know their places; the chunks themselves never wait.

A documents at work   G key heads   H = r G query heads   L new tokens   C tokens of the chunk   M slots in use
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqzoo.kernels.ovq_attention.layout import Document, Step, layout
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
) -> tuple[Tensor, OVQState | None]:
    """Same as `ovq_attention_reference`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    kv, scale = torch.cat([k, v], dim=-1), scale.to(dtype)
    seen = [0] * len(q) if state is None else state.tokens.tolist()
    if state is not None:
        kv = torch.cat([state.pending.to(kv.dtype), kv], dim=1)
    plan = layout(q, kv, rule.chunk, seen, starts, valid, keep=state is not None)
    if not plan.steps:  # nothing but padding
        return q.new_zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype), state
    queries = plan.queries.take(q.to(dtype) * scale[:, None])
    memory, counts = _before(plan.documents, state, kv, dtype)
    outputs, ended = [], _Ended(plan.documents, q.shape[1])
    for s, (step, chunk) in enumerate(zip(plan.steps, plan.tokens.take(kv), strict=True)):
        chunk = chunk.to(dtype)  # [A, G, C, K + V]
        outputs.append(_read(queries[s], memory, counts, chunk, scale, step, rule))
        n, going_on = step.writes, plan.steps[s + 1].at_work if s + 1 < len(plan.steps) else 0
        if state is not None:
            ended.add(n, memory[n:], counts[n:])
        if n:
            memory, counts = _write(memory[:n], counts[:n], chunk[:n], step.merged[:n], q.shape[-1], rule)
        if state is not None:
            ended.add(going_on, memory[going_on:n], counts[going_on:n])
        memory, counts = memory[:going_on], counts[:going_on]
    o = plan.queries.give_back(outputs).view(*q.shape[:3], -1).to(v.dtype)
    return o, None if state is None else ended.state(state, kv, seen, rule)


def _before(found: Sequence[Document], state: OVQState | None, kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The memory [A, G, M, K + V] and counts [A, G, M] that each document begins with; M = 0 where all are new."""
    if state is None or not any(d.merged for d in found):
        memory = kv.new_zeros(len(found), kv.shape[2], 0, kv.shape[3], dtype=dtype)
        return memory, memory[..., 0]
    memory, counts = (_rows(x.to(dtype), [d.row for d in found]) for x in state[:2])
    if all(d.merged for d in found):
        return memory, counts
    new = torch.tensor([d.merged == 0 for d in found], device=kv.device)[:, None, None]
    return memory.masked_fill(new[..., None], 0.0), counts.masked_fill(new, 0.0)


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x if rows == list(range(len(x))) else x.index_select(0, torch.tensor(rows, device=x.device))


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
        tokens = torch.tensor([tokens.get(row, before) for row, before in enumerate(seen)], device=kv.device)
        pending, idle = kv[:, self.T :], [row for row in range(len(kv)) if row not in self.rows]
        if idle:
            self.rows += idle
            self.memory.append(past.memory[idle].to(self.memory[0].dtype))
            self.counts.append(past.counts[idle].to(self.counts[0].dtype))
            pending = pending.index_copy(0, torch.tensor(idle, device=kv.device), kv[idle, : rule.chunk - 1])
        order = sorted(range(len(kv)), key=self.rows.__getitem__)
        room = [rule.slots - x.shape[2] for x in self.counts]
        memory = torch.cat([F.pad(x, (0, 0, 0, n)) if n else x for x, n in zip(self.memory, room, strict=True)])
        counts = torch.cat([F.pad(x, (0, n)) if n else x for x, n in zip(self.counts, room, strict=True)])
        return OVQState(_rows(memory, order), _rows(counts, order), pending, tokens)


def _column(values: Sequence[int], device: torch.device) -> int | Tensor:
    """A number for each document: one for all, or [A, 1, 1]."""
    if all(x == values[0] for x in values):
        return values[0]
    return torch.tensor(values, device=device)[:, None, None]


def _read(q: Tensor, memory: Tensor, counts: Tensor, chunk: Tensor, scale: Tensor, step: Step, rule: OVQRule) -> Tensor:
    """The new tokens of a chunk: q [A, H, L, K] times scale, chunk [A, G, C, K + V] -> o [A, H, L, V]."""
    (A, H, L, K), G = q.shape, chunk.shape[1]
    M = max(map(rule.used, step.merged))
    memory, counts = memory[:, :, :M], counts[:, :, :M]
    bias = counts.log() if rule.log_count else torch.zeros_like(counts).masked_fill_(counts == 0, -torch.inf)
    if rule.norm_correction:  # as one more channel of queries and keys
        correction = (1 - memory[..., :K].square().sum(-1, keepdim=True)) / 2
        memory = torch.cat([memory[..., :K], correction, memory[..., K:]], dim=-1)
        q = torch.cat([q, scale[:, None, None].expand(A, H, L, 1)], dim=-1)
        chunk = torch.cat([chunk[..., :K], torch.zeros_like(chunk[..., :1]), chunk[..., K:]], dim=-1)
    last = torch.arange(L, device=q.device)[:, None] + _column(step.offset, q.device)  # [L, 1] or [A, L, 1]
    last = last.repeat(*[1] * (last.ndim - 2), H // G, 1)  # the rows of a key head: its query heads' tokens
    if last.ndim == 3:
        last = last.repeat_interleave(G, dim=0)
    q = q.reshape(A * G, H // G * L, -1)
    o = _Read.apply(q, memory.flatten(0, 1), bias.flatten(0, 1)[:, None], chunk.flatten(0, 1), last)
    return o.view(A, H, L, -1)


def _weights(q: Tensor, memory: Tensor, bias: Tensor, chunk: Tensor, last: Tensor) -> Tensor:
    """Of slots, then tokens: [A G, r L, M + C]."""
    K, C = q.shape[-1], chunk.shape[1]
    future = torch.arange(C, device=q.device) > last
    future = torch.zeros_like(future, dtype=q.dtype).masked_fill_(future, -torch.inf)
    slots, tokens = torch.baddbmm(bias, q, memory[..., :K].mT), torch.baddbmm(future, q, chunk[..., :K].mT)
    return torch.cat([slots, tokens], dim=-1).softmax(-1)


class _Read(torch.autograd.Function):
    """q [A G, r L, K], memory [A G, M, K + V], bias [A G, 1, M], chunk [A G, C, K + V], last [(A G,) r L, 1] token of
    the chunk that each query sees."""

    @staticmethod
    def forward(ctx, q, memory, bias, chunk, last):
        K, M = q.shape[-1], memory.shape[1]
        p = _weights(q, memory, bias, chunk, last)
        o = torch.baddbmm(torch.bmm(p[..., :M], memory[..., K:]), p[..., M:], chunk[..., K:])
        ctx.save_for_backward(q, memory, bias, chunk, last, o)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, d_o):
        q, memory, bias, chunk, last, o = ctx.saved_tensors
        K, M = q.shape[-1], memory.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            p = _weights(q, memory, bias, chunk, last)
            d_p = torch.cat([torch.bmm(d_o, memory[..., K:].mT), torch.bmm(d_o, chunk[..., K:].mT)], dim=-1)
            d_logits = d_p.sub_((d_o * o).sum(-1, keepdim=True)).mul_(p)
            d_q = torch.baddbmm(torch.bmm(d_logits[..., :M], memory[..., :K]), d_logits[..., M:], chunk[..., :K])
            d_memory, d_chunk = (
                torch.cat([torch.bmm(d_logits[..., part].mT, q), torch.bmm(p[..., part].mT, d_o)], dim=-1)
                for part in (slice(M), slice(M, None))
            )
        return d_q, d_memory, None, d_chunk, None


def _write(
    memory: Tensor, counts: Tensor, chunk: Tensor, merged: list[int], K: int, rule: OVQRule
) -> tuple[Tensor, Tensor]:
    """Full chunks [A, G, C, K + V] into their documents' memory and counts, both with room for the new slots."""
    with torch.no_grad():
        slot = _assign(chunk[..., :K], memory[..., :K], counts, merged, rule)  # [A, G, C]
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
        new.view(-1, new.shape[-1]).index_add_(0, slot, (chunk * move).flatten(0, 2))
        ctx.save_for_backward(slot, keep[:, :, :M], move)
        return new

    @staticmethod
    @once_differentiable
    def backward(ctx, d_new):
        slot, keep, move = ctx.saved_tensors
        d_chunk = d_new.flatten(0, 2).index_select(0, slot).view(*move.shape[:3], -1) * move
        return d_new[:, :, : keep.shape[2]] * keep, d_chunk, None, None, None


def _assign(k: Tensor, slots: Tensor, counts: Tensor, merged: list[int], rule: OVQRule) -> Tensor:
    """The slot [A, G, C] of each key [A, G, C, K], of slots [A, G, M, K]."""
    C, device = k.shape[2], k.device
    if rule.similarity == "cosine":
        k, slots = F.normalize(k, dim=-1), F.normalize(slots, dim=-1)
    if not any(merged):
        return _assign_first(k @ k.mT, rule.used(C), rule)
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
        slot = torch.where(rank < _column(new, device), rank + _column(used, device), slot)
    if not all(merged):
        first = torch.tensor([t == 0 for t in merged], device=device)[:, None, None]
        slot = torch.where(first, _assign_first(k @ k.mT, rule.used(C), rule), slot)
    return slot


def _assign_first(likeness: Tensor, new: int, rule: OVQRule) -> Tensor:
    """The same where no slot is in use; likeness [A, G, C, C] of the chunk's keys."""
    C = likeness.shape[-1]
    chosen = torch.zeros_like(likeness[..., 0, :1], dtype=torch.int64)
    if rule.first_chunk == "shared":
        slot = torch.zeros_like(likeness[..., 0], dtype=torch.int64)
        chosen = torch.cat([chosen, 1 + likeness[..., 0, 1:].argsort(stable=True)], dim=-1)[..., :new]
    else:
        covered = likeness[..., 0, :].scatter(-1, chosen, torch.inf)
        while chosen.shape[-1] < new:
            pick = covered.argmin(-1, keepdim=True)
            chosen = torch.cat([chosen, pick], dim=-1)
            more = likeness.gather(-2, pick[..., None].expand(*pick.shape, C))[..., 0, :]
            covered = torch.maximum(covered, more).scatter_(-1, pick, torch.inf)
        slot = likeness.gather(-1, chosen[..., None, :].expand(*likeness.shape[:3], new)).argmax(-1)
    return slot.scatter(-1, chosen, torch.arange(new, device=slot.device).expand_as(chosen))
