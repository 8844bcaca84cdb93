"""Causal attention in torch: documents, windows and kept keys as calls of `scaled_dot_product_attention`.

Nothing here ever holds a T x T mask, and a window costs O(T x window) in time and memory.

B batch   T queries   S keys, the first N of them sinks   H query heads   G key heads (H a multiple of G)
K, V head widths of keys and values
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # [queries] at a time where a mask is needed


def causal_attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """Same as `causal_attention_reference`."""
    T, S, N = q.shape[2], k.shape[2], sinks
    if N == S:
        return _softmax(q, k, v)
    if T == 1:
        low = N if window is None else max(N, S - window)
        seen = None if key_document is None else _same(query_document, key_document[:, low:])[:, 0]
        seen = F.pad(seen, (N, 0), value=True) if N and seen is not None else seen
        return _one_query(q, _sinks_and(k, N, low, S), _sinks_and(v, N, low, S), seen)
    if N + T == S and key_document is None:
        return _document(q, k, v, window, N)
    if N + T == S and _packed(query_document, key_document[:, N:] if N else key_document):
        return _documents(q, k, v, window, query_document, N)
    return _masked(q, k, v, window, query_document, key_document, N)


def _sinks_and(x: Tensor, N: int, low: int, high: int) -> Tensor:
    """Of x [B, heads, S, width] the sinks, and low to high, which stand behind them."""
    if N == 0 or low == N:
        return x[:, :, low - N : high]
    return torch.cat([x[:, :, :N], x[:, :, low:high]], dim=2)


def _packed(query_document: Tensor, key_document: Tensor) -> bool:
    """Whether documents stand one behind the other and every token is seen."""
    if query_document is not key_document and not torch.equal(query_document, key_document):
        return False
    return bool((key_document.diff(dim=1) >= 0).all() & (key_document[:, 0] >= 0).all())


def _documents(q: Tensor, k: Tensor, v: Tensor, window: int | None, document: Tensor, N: int) -> Tensor:
    """Each document by itself, behind its row's sinks."""
    B, T = document.shape
    first = F.pad(document.diff(dim=1) != 0, (1, 0), value=True)
    edges = first.flatten().nonzero()[:, 0]
    lengths = edges.diff(append=edges.new_tensor([B * T])).tolist()
    own = (q, k[:, :, N:], v[:, :, N:])
    rows = [x.transpose(0, 1).flatten(1, 2)[None].split(lengths, dim=2) for x in own]  # [1, heads, length, width]
    if N:
        row = (edges // T).tolist()
        for i, x in ((1, k), (2, v)):
            rows[i] = [torch.cat([x[b : b + 1, :, :N], y], dim=2) for b, y in zip(row, rows[i], strict=True)]
    pieces = [_document(*piece, window, N) for piece in zip(*rows, strict=True)]
    return torch.cat(pieces, dim=2)[0].unflatten(1, (B, T)).transpose(0, 1)


def _document(q: Tensor, k: Tensor, v: Tensor, window: int | None, N: int) -> Tensor:
    """One document, from its first token on: q [B, H, T, K], k and v [B, G, N + T, width]."""
    T = q.shape[2]
    if window is None or window >= T:  # where the sinks stand, queries that nobody asks: causal without a mask
        return _softmax(F.pad(q, (0, 0, N, 0)) if N else q, k, v, is_causal=True)[:, :, N:]
    C = max(window, 64)  # [tokens] a block of queries sees its own block of keys and the one before
    M = -(-T // C)
    sinks, own = [x[:, :, None, :N] for x in (k, v)], (q, k[:, :, N:], v[:, :, N:])
    q, k, v = (F.pad(x, (0, 0, 0, M * C - T)).unflatten(2, (M, C)) for x in own)
    first = _blocks(q[:, :, :1], k[:, :, :1], v[:, :, :1], window, sinks)
    if M == 1:
        return first.flatten(2, 3)[:, :, :T]
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3) for x in (k, v))  # [B, G, M-1, 2C, width]
    return torch.cat([first, _blocks(q[:, :, 1:], k, v, window, sinks)], dim=2).flatten(2, 3)[:, :, :T]


def _blocks(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: list[Tensor]) -> Tensor:
    """q [B, H, M, C, K], k and v [B, G, M, C or 2C, width] ending where q ends: blocks as a batch, sinks in each."""
    C, S, N = q.shape[3], k.shape[3], sinks[0].shape[3]
    back = torch.arange(S - C, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    mask = (back >= 0) & (back < window)
    if N:
        mask = F.pad(mask, (N, 0), value=True)
        k, v = (torch.cat([s.expand(-1, -1, x.shape[2], -1, -1), x], 3) for s, x in zip(sinks, (k, v), strict=True))
    o = _softmax(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), attn_mask=mask)
    return o.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    query_document: Tensor | None,
    key_document: Tensor | None,
    N: int,
) -> Tensor:
    """Any documents and any keys kept from before, a block of queries with its own mask at a time."""
    T, S = q.shape[2], k.shape[2]
    out = []
    for a in range(0, T, BLOCK):
        b = min(a + BLOCK, T)
        end = S - T + b
        low, high = N if window is None else max(N, S - T + a - window + 1), max(N, end)
        back = torch.arange(S - T + a, end, device=q.device)[:, None] - torch.arange(low, high, device=q.device)
        mask = (back >= 0) & (back < (window or S))
        if key_document is not None:
            mask = (mask & _same(query_document[:, a:b], key_document[:, low:high]))[:, None]
        mask = F.pad(mask, (N, 0), value=True) if N else mask
        out.append(_softmax(q[:, :, a:b], *(_sinks_and(x, N, low, high) for x in (k, v)), attn_mask=mask))
    return torch.cat(out, dim=2)


def _same(query_document: Tensor, key_document: Tensor) -> Tensor:
    """[B, T, S] bool: of one document, and of any."""
    return (query_document[:, :, None] == key_document[:, None]) & (key_document >= 0)[:, None]


def _softmax(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    """Unequal widths are made equal with zeros, which cost less than the dense path torch takes for them."""
    K, V = q.shape[-1], v.shape[-1]
    q, k, v = (F.pad(x, (0, max(K, V) - x.shape[-1])) if K != V else x for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=K**-0.5, enable_gqa=q.shape[1] != k.shape[1], **how)[..., :V]


def _one_query(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """q [B, H, 1, K], seen [B, S]. Grouped query heads are the rows of one product, so no key is repeated."""
    G = k.shape[1]
    scores = q.unflatten(1, (G, -1))[:, :, :, 0] @ k.mT  # [B, G, H/G, S]
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * q.shape[-1] ** -0.5
    if seen is None:
        weights = scores.softmax(-1)
    else:
        seen = seen[:, None, None]
        weights = (
            scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
        )  # nothing seen: nothing read
    return (weights.to(v.dtype) @ v).flatten(1, 2)[:, :, None]
