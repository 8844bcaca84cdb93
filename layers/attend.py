"""Causal softmax attention over packed documents, over a sliding window, and over kept keys.

Nothing here ever holds a T x T mask, and a window costs O(T x window) in time and memory.

B batch   T new tokens   S kept tokens   H query heads   G key heads (H a multiple of G)   K head width
Source: Vaswani et al. 2017, arXiv 1706.03762; grouped heads: Ainslie et al. 2023, arXiv 2305.13245.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.layers.precision import wide

BLOCK = 256  # [queries] at a time where a mask is needed


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, borders: Tensor | None = None) -> Tensor:
    """Every token sees itself and what came before it: at most `window` tokens, and none beyond a border.

    q [B, H, T, K], k and v [B, G, T, K], borders [B, T] bool True where a document begins -> [B, H, T, K].
    """
    if borders is None:
        return _document(q, k, v, window)
    B, _, T, _ = q.shape
    first = borders.clone()
    first[:, 0] = True
    edges = first.flatten().nonzero()[:, 0]
    lengths = edges.diff(append=edges.new_tensor([B * T])).tolist()
    rows = [x.transpose(0, 1).flatten(1, 2)[None].split(lengths, dim=2) for x in (q, k, v)]  # [1, H, length, K] each
    pieces = [_document(*document, window) for document in zip(*rows, strict=True)]
    return torch.cat(pieces, dim=2)[0].unflatten(1, (B, T)).transpose(0, 1)


def attend_past(
    q: Tensor, k: Tensor, v: Tensor, *, query_document: Tensor, key_document: Tensor, window: int | None = None
) -> Tensor:
    """T new queries over S kept keys, of which the last T are their own.

    q [B, H, T, K], k and v [B, G, S, K]; a query sees the keys of its own document, query_document [B, T] and
    key_document [B, S] int64, up to itself, and at most `window` of them -> [B, H, T, K].
    """
    T, S = q.shape[2], k.shape[2]
    if T == 1:
        low = 0 if window is None else max(0, S - window)
        return _one_query(q, k[:, :, low:], v[:, :, low:], key_document[:, low:] == query_document)
    out = []
    for a in range(0, T, BLOCK):
        b = min(a + BLOCK, T)
        low, high = 0 if window is None else max(0, S - T + a - window + 1), S - T + b
        back = torch.arange(S - T + a, high, device=q.device)[:, None] - torch.arange(low, high, device=q.device)
        near = back >= 0 if window is None else (back >= 0) & (back < window)
        same = query_document[:, a:b, None] == key_document[:, None, low:high]
        mask = (near & same)[:, None]
        out.append(_softmax(q[:, :, a:b], k[:, :, low:high], v[:, :, low:high], attn_mask=mask))
    return torch.cat(out, dim=2)


def _document(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One document, from its first token on."""
    T = q.shape[2]
    if window is None or T <= window:
        return _softmax(q, k, v, is_causal=True)
    C = max(window, 64)  # [tokens] a block of queries sees its own block of keys and the one before
    N = -(-T // C)
    q, k, v = (F.pad(x, (0, 0, 0, N * C - T)).unflatten(2, (N, C)) for x in (q, k, v))
    first = _blocks(q[:, :, :1], k[:, :, :1], v[:, :, :1], C, window)
    if N == 1:
        return first.flatten(2, 3)[:, :, :T]
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3) for x in (k, v))  # [B, G, N-1, 2C, K]
    return torch.cat([first, _blocks(q[:, :, 1:], k, v, C, window)], dim=2).flatten(2, 3)[:, :, :T]


def _blocks(q: Tensor, k: Tensor, v: Tensor, C: int, window: int) -> Tensor:
    """q [B, H, N, C, K], k and v [B, G, N, C or 2C, K] ending where q ends -> [B, H, N, C, K]: blocks as a batch."""
    S = k.shape[3]
    back = torch.arange(S - C, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    o = _softmax(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), attn_mask=(back >= 0) & (back < window))
    return o.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)


def _one_query(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [B, H, 1, K], seen [B, S]. Grouped query heads are the rows of one product, so no key is repeated."""
    G = k.shape[1]
    scores = q.unflatten(1, (G, -1))[:, :, :, 0] @ k.mT * q.shape[-1] ** -0.5  # [B, G, H/G, S]
    weights = wide(scores).masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ v).flatten(1, 2)[:, :, None]
