"""Strict linear attention, C tokens at a time, forward and backward, in torch on any device.

Within a chunk, S the memory at its start, i and j its tokens from 0, f_ij = exp(decay (i - j)) for j < i, else 0:

    P  = R R^T * f                          A  = P V + e (R S)              e_i = exp(decay i)
    S' = keep S + R^T (w V)                 keep = exp(decay C)             w_j = exp(decay (C - j))

and backward, dS' the gradient of the memory after the chunk, Q = (dA V^T) * f:

    dV = P^T dA + w (R dS')                 dS = keep dS' + R^T (e dA)
    dR = Q R + Q^T R + (e dA) S^T + (w V) dS'^T                             r is query and key

Where a document starts inside the chunk, e, f and w are 0 across its start, and keep is 0. A token and head cost
4 N D + 2 C (N + D) operations; without a memory the first of the two falls away. So one chunk takes all up to a few
times D tokens, else C is a few times D. Kept for backward are R, V and the memory at the start of each chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SQUARE = 4  # times D: so many tokens are one chunk, if no memory comes in
CHUNK = 2  # times D: tokens of a chunk in longer ones


def strict_linear_attention_chunked(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None = None, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `strict_linear_attention_reference`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    (B, T, H, N), (G, D) = r.shape, v.shape[2:]
    length = T if state is None and T <= SQUARE * D else min(T, CHUNK * D)
    fresh = state is None
    if fresh:
        state = r.new_zeros(B, H, N, D, dtype=dtype)
    decay = None if decay is None else decay.to(dtype)
    r, values = (x.to(dtype).transpose(1, 2).unflatten(1, (G, -1)) for x in (r, v))  # [B, G, H / G or 1, T, ...]
    a, state = _Strict.apply(r, values, state.to(dtype).unflatten(1, (G, -1)), starts, decay, length, fresh)
    return a.flatten(1, 2).transpose(1, 2).to(v.dtype), state.flatten(1, 2)


def _factors(C: int, G: int, like: Tensor, starts: Tensor | None, decay: Tensor | None) -> tuple[Tensor, ...]:
    """f [.., C, C], e and w [.., C, 1], keep [.., 1, 1] of a chunk of C tokens, for [B, G, H / G]."""
    at = torch.arange(C, device=like.device, dtype=like.dtype)
    rate = like.new_zeros(1, 1, 1, 1, 1) if decay is None else decay.view(1, G, -1, 1, 1)
    f = (rate * (at[:, None] - at).clamp(min=0)).exp().tril(-1)
    e, w, keep = (rate * at[:, None]).exp(), (rate * (C - at[:, None])).exp(), (rate * C).exp()
    if starts is not None:
        document = starts.int().cumsum(1)[:, None, None, :, None]  # 0: since before the chunk
        last = document[:, :, :, -1:]
        f, e, w = f * (document == document.mT), e * (document == 0), w * (document == last)
        keep = keep * (last == 0)
    return f, e, w, keep


def _chunks(r: Tensor, v: Tensor, starts: Tensor | None, decay: Tensor | None, length: int):
    """Of each chunk: its slice, r, v and factors."""
    for begin in range(0, r.shape[3], length):
        at = slice(begin, min(begin + length, r.shape[3]))
        marks = None if starts is None else starts[:, at]
        yield at, r[:, :, :, at], v[:, :, :, at], _factors(at.stop - at.start, r.shape[1], r, marks, decay)


class _Strict(torch.autograd.Function):
    """r [B, G, H / G, T, N], v [B, G, 1, T, D], state [B, G, H / G, N, D] -> a [B, G, H / G, T, D], the last state."""

    @staticmethod
    def forward(ctx, r, v, state, starts, decay, length, fresh):
        a, before = r.new_empty(*r.shape[:4], v.shape[-1]), []
        for at, r_, v_, (f, e, w, keep) in _chunks(r, v, starts, decay, length):
            inside = ((r_ @ r_.mT) * f) @ v_
            a[:, :, :, at] = inside if fresh and not before else inside + e * (r_ @ state)
            before.append(state)
            state = keep * state + r_.mT @ (w * v_)
        ctx.save_for_backward(r, v, starts, decay, *before)
        ctx.length, ctx.fresh = length, fresh
        return a, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_a, d_state):
        r, v, starts, decay, *before = ctx.saved_tensors
        d_r, d_v = torch.empty_like(r), torch.empty_like(v)
        chunks = list(_chunks(r, v, starts, decay, ctx.length))
        for (at, r_, v_, (f, e, w, keep)), state in zip(reversed(chunks), reversed(before), strict=True):
            from_a = d_a[:, :, :, at]
            Q, read = (from_a @ v_.mT) * f, e * from_a
            d_r[:, :, :, at] = (Q + Q.mT) @ r_ + (w * v_) @ d_state.mT
            each = ((r_ @ r_.mT) * f).mT @ from_a + w * (r_ @ d_state)  # by head; v is shared by a group
            d_v[:, :, :, at] = each.sum(2, keepdim=True)
            if at.start or not ctx.fresh:
                d_r[:, :, :, at] += read @ state.mT
                d_state = keep * d_state + r_.mT @ read
        return d_r, d_v, None if ctx.fresh else d_state, None, None, None, None
