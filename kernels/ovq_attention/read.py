"""What the queries of each chunk read, chunk by chunk, in torch.

Kept for backward are the inputs, the outputs and each chunk's memory; the logits are computed again.

A documents at work   G key heads   H = r G query heads   L new tokens   C tokens of the chunk   M slots in use
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqzoo.kernels.ovq_attention.layout import Layout, Step, sent
from seqzoo.kernels.ovq_attention.rule import OVQRule


class InTurn:
    """Reads as soon as a chunk's memory is there.

    Args:
        q: [B, T, H, K].
        tokens: [n, K + V], the rows of `plan.tokens`, in the dtype to compute in.
        scale: [H], of that dtype.
    """

    def __init__(self, q: Tensor, tokens: Tensor, scale: Tensor, plan: Layout, rule: OVQRule) -> None:
        self.plan, self.scale, self.rule = plan, scale, rule
        self.queries, self.tokens = plan.queries.take(q.to(scale.dtype) * scale[:, None]), plan.tokens.parts(tokens)
        self.outputs: list[Tensor] = []

    def add(self, memory: Tensor, counts: Tensor) -> None:
        """The next step's: memory [A, G, M, K + V] and counts [A, G, M]."""
        s = len(self.outputs)
        here = self.queries[s], memory, counts, self.tokens[s], self.scale, self.plan.steps[s], self.rule
        self.outputs.append(_read(*here))

    def rows(self) -> Tensor:
        """What was read, [n, V], the rows of `plan.queries`."""
        return torch.cat(self.outputs)

    @staticmethod
    def farthest(likeness: Tensor, new: int) -> Tensor:
        """The slot [A, G, C] of each token of a first chunk, by the likeness [A, G, C, C] of its keys."""
        C = likeness.shape[-1]
        chosen = torch.zeros_like(likeness[..., 0, :1], dtype=torch.int64)
        covered = likeness[..., 0, :].scatter(-1, chosen, torch.inf)
        while chosen.shape[-1] < new:
            pick = covered.argmin(-1, keepdim=True)
            chosen = torch.cat([chosen, pick], dim=-1)
            more = likeness.gather(-2, pick[..., None].expand(*pick.shape, C))[..., 0, :]
            covered = torch.maximum(covered, more).scatter_(-1, pick, torch.inf)
        slot = likeness.gather(-1, chosen[..., None, :].expand(*likeness.shape[:3], new)).argmax(-1)
        return slot.scatter(-1, chosen, torch.arange(new, device=slot.device).expand_as(chosen))


def column(values: Sequence[int], device: torch.device) -> int | Tensor:
    """A number for each document: one for all, or [A, 1, 1]."""
    if all(x == values[0] for x in values):
        return values[0]
    return sent(values, device)[:, None, None]


def _read(q: Tensor, memory: Tensor, counts: Tensor, chunk: Tensor, scale: Tensor, step: Step, rule: OVQRule) -> Tensor:
    """The new tokens of a chunk: q [A, H, L, K] times scale, chunk [A, G, C, K + V] -> o [A H L, V]."""
    (A, H, L, K), G = q.shape, chunk.shape[1]
    bias = counts.log() if rule.log_count else torch.zeros_like(counts).masked_fill_(counts == 0, -torch.inf)
    if rule.norm_correction:  # as one more channel of queries and keys
        correction = (1 - memory[..., :K].square().sum(-1, keepdim=True)) / 2
        memory = torch.cat([memory[..., :K], correction, memory[..., K:]], dim=-1)
        q = torch.cat([q, scale[:, None, None].expand(A, H, L, 1)], dim=-1)
        chunk = torch.cat([chunk[..., :K], torch.zeros_like(chunk[..., :1]), chunk[..., K:]], dim=-1)
    last = torch.arange(L, device=q.device)[:, None] + column(step.offset, q.device)  # [L, 1] or [A, L, 1]
    last = last.repeat(*[1] * (last.ndim - 2), H // G, 1)  # the rows of a key head: its query heads' tokens
    if last.ndim == 3:
        last = last.repeat_interleave(G, dim=0)
    q = q.reshape(A * G, H // G * L, -1)
    o = _Read.apply(q, memory.flatten(0, 1), bias.flatten(0, 1)[:, None], chunk.flatten(0, 1), last)
    return o.flatten(0, 1)


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
