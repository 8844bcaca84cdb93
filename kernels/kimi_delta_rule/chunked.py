"""The delta rule with a decay per key channel, C tokens at a time, in torch on any device.

Within a chunk, S the memory at its start, i and j its tokens, c a key channel:

    e_i  = exp(g_0 + .. + g_i)   f_j = exp(g_{j+1} + .. + g_last)   D_ij = exp(g_{j+1} + .. + g_i) for j <= i, else 0
    P_ij = sum_c q_ic D_ijc k_jc           L_ij = sum_c k_ic D_ijc k_jc below the diagonal
    Z    = (I + diag(beta) L)^-1 beta (V - (e K) S)      what each token writes: each error depends on those before it
    O    = (e Q) S + P Z                   S' = e_last S + (f K)^T Z

How sums of g and P and L are made: `kernels/chunks.py`. L is solved for V and for e K at once, before any memory is
known, so that one chunk after another only two products are left.
Of a segment of chunks only the inputs and the memory at its start are kept for backward, which computes the rest again.
Source: arXiv 2510.26692, sec. 3.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqzoo.kernels.chunks import product, scores_by_channel, sums, to_chunks

CHUNK = {"cpu": 32}  # tokens, a power of two; 64 elsewhere
SEGMENT = {"cpu": 256}  # tokens; 4096 elsewhere, where launching costs more than cache


def kimi_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `kimi_delta_rule_reference`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_zeros(*v.shape[::2], k.shape[3], v.shape[3], dtype=dtype)
    if starts is not None:
        g = g.masked_fill(starts[..., None, None], -torch.inf)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, state))
    outputs, length, state = [], SEGMENT.get(v.device.type, 4096), state.to(dtype)
    for part in zip(*(x.split(length, 1) for x in (q, k, v, g, beta)), strict=True):
        inputs = *(x.to(dtype) for x in part), state
        if learns:
            o, state = checkpoint(_segment, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state = _segment(*inputs)
        outputs.append(o.to(v.dtype))
    return torch.cat(outputs, dim=1), state


def _segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, g [B,T,H,K]; v [B,T,H,V]; beta [B,T,H]; state [B,H,K,V], all of one dtype."""
    B, T, H, V = v.shape
    C = min(CHUNK.get(v.device.type, 64), 1 << (T - 1).bit_length())
    q, k, v, g, beta = (to_chunks(x, C) for x in (q, k, v, g, beta[..., None]))  # [n, N, C, ...], N = B H
    *halves, (until, after) = sums(g)
    P, L = scores_by_channel(torch.stack([q, k], dim=2), k, halves).unbind(2)
    until, keep = until.exp(), until[:, :, -1, :, None].exp()  # keep [n, N, K, 1]
    wanted = torch.cat([beta * v, beta * until * k], dim=-1)
    Z, asked = torch.linalg.solve_triangular(
        beta * L.tril(-1), wanted, upper=False, unitriangular=True
    ).split([V, k.shape[-1]], dim=-1)  # fmt: skip
    forget, S, before, written = (after.exp() * k).mT, state.flatten(0, 1), [], []
    for n in range(k.shape[0]):
        before.append(S)
        written.append(torch.baddbmm(Z[n], asked[n], S, alpha=-1))
        S = torch.baddbmm(keep[n] * S, forget[n], written[-1])
    o = product(until * q, torch.stack(before)) + product(P, torch.stack(written))
    return o.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T], S.view(state.shape)
