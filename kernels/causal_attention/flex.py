"""Causal attention on a GPU through PyTorch's own kernels: no T x S mask, and nothing waits for the device.

Neither window nor documents: `scaled_dot_product_attention`, causal without a mask. A few queries: the same over the
keys in reach. Everything else: `flex_attention`, compiled once for each kind of mask, whatever the lengths.
Without a GPU nothing is compiled: a check of the masks, with T x S scores.
"""

import inspect
import operator
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from seqzoo.kernels.causal_attention.block_mask import block_mask
from seqzoo.kernels.causal_attention.blocked import _same, _sinks_and, _softmax

FEW = 16  # queries that share one mask over their keys
NARROW, WIDE = 16, 256  # head widths that flex_attention's kernels take
OPTIONS = dict(FORCE_USE_FLEX_ATTENTION=True)  # not the kernel whose sums are split by the size of the batch
LIMITS = dict(recompile_limit=32)  # of torch.compile, where it knows that


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether this backend is to be chosen for q and v."""
    return q.dtype in (torch.bfloat16, torch.float16, torch.float32) and max(q.shape[-1], v.shape[-1]) <= WIDE


def causal_attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """Same as `causal_attention_reference`.

    Raises:
        ValueError: float64 on a GPU, or heads too wide for the kernels.
    """
    T, S = q.shape[2], k.shape[2]
    if q.device.type == "cuda" and not takes(q, v):
        raise ValueError(
            f"causal_attention: backend flex: expected bfloat16, float16 or float32 and heads up to {WIDE} wide, "
            f"got {q.dtype}, {q.shape[-1]} and {v.shape[-1]}"
        )
    if window is not None and window >= S:
        window = None
    if sinks == S:
        return _softmax(q, k, v)
    if window is None and key_document is None and sinks <= S - T + 1 and S - T <= T // 8:
        ahead = S - T  # queries that nobody asks, so that queries and keys are as many
        return _softmax(F.pad(q, (0, 0, ahead, 0)) if ahead else q, k, v, is_causal=True)[:, :, ahead:]
    if T <= FEW and T < S:
        return _few(q, k, v, window, query_document, key_document, sinks)
    if key_document is not None:
        query_document, key_document = query_document.int(), key_document.int()
    attend = _flex
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        attend = _compiled(window, sinks, S - T in (0, sinks), key_document is not None)
    return attend(q, k, v, window, query_document, key_document, sinks)


@cache
def _compiled(window: int | None, sinks: int, square: bool, packed: bool) -> Callable[..., Tensor]:
    """One of its own for each kind of mask: torch.compile counts recompilations by code object, up to a limit."""
    known = inspect.signature(torch.compile).parameters
    own = FunctionType(_flex.__code__.replace(), _flex.__globals__)
    return torch.compile(own, fullgraph=True, **{name: x for name, x in LIMITS.items() if name in known})


@no_type_check  # it is traced
def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    query_document: Tensor | None,
    key_document: Tensor | None,
    sinks: int,
) -> Tensor:
    """The mask's blocks are found in the same graph: a few numbers per block, less than a layer's norm.

    Heads, widths and the window are compiled in, by `index`: as symbols, as which torch.compile takes what has once
    changed, they make the scale a power and a group's size a quotient that not every flex_attention can write down.
    """
    H, G, K, V, sinks = map(operator.index, (q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], sinks))
    window = None if window is None else operator.index(window)
    mask = block_mask(q.shape[2], k.shape[2], window, query_document, key_document, sinks, q.device)
    q, k, v = (F.pad(x, (0, NARROW - n)) if n < NARROW else x for x, n in ((q, K), (k, K), (v, V)))
    o = flex_attention(q, k, v, block_mask=mask, scale=K**-0.5, enable_gqa=H != G, kernel_options=OPTIONS)
    return o[..., :V]


def _few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    query_document: Tensor | None,
    key_document: Tensor | None,
    N: int,
) -> Tensor:
    """The query heads of a group are rows of one query, so no key is repeated, and no kernel need know of groups."""
    (H, T), (G, S) = q.shape[1:3], k.shape[1:3]
    low = N if window is None else max(N, S - T - window + 1)
    mask = nothing = None
    if T > 1 or key_document is not None:
        back = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(low, S, device=q.device)
        mask = ((back >= 0) & (back < (window or S)))[None]
        if key_document is not None:
            mask = mask & _same(query_document, key_document[:, low:])
        if N:
            mask = F.pad(mask, (N, 0), value=True)
        elif key_document is not None:  # who sees nothing sees all, and then reads zeros: no kernel must divide by 0
            nothing = ~mask.any(-1, keepdim=True)
            mask, nothing = mask | nothing, nothing[:, None]
        mask = mask.repeat(1, H // G, 1)[:, None]  # [B, 1, H/G T, L]
    rows = q.unflatten(1, (G, H // G)).flatten(2, 3)
    o = _softmax(rows, *(_sinks_and(x, N, low, S) for x in (k, v)), attn_mask=mask)
    o = o.unflatten(2, (H // G, T)).flatten(1, 2)
    return o if nothing is None else o.masked_fill(nothing, 0.0)
