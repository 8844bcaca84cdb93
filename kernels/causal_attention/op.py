"""causal_attention: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqzoo.kernels import across
from seqzoo.kernels.causal_attention.blocked import causal_attention_blocked
from seqzoo.kernels.causal_attention.cpp import causal_attention_cpp, usable
from seqzoo.kernels.causal_attention.flex import causal_attention_flex, takes
from seqzoo.kernels.causal_attention.reference import causal_attention_reference
from seqzoo.kernels.dispatch import choose

BACKENDS = {
    "reference": causal_attention_reference,
    "torch": causal_attention_blocked,
    "cpp": causal_attention_cpp,  # float32 and bfloat16 on a CPU
    "flex": causal_attention_flex,  # all but float64 on a GPU
}


def causal_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    *,
    window: int | None = None,
    query_document: Int64[Tensor, "B T"] | None = None,
    key_document: Int64[Tensor, "B S"] | None = None,
    sinks: int = 0,
) -> Float[Tensor, "B H T V"]:
    """Every query looks at the keys of its own document up to itself. Definition: `reference.py`.

    The last T of the S keys are the queries' own, those before them were kept from earlier calls. A sequence alone:
    neither document argument. Packed documents: `key_document`. One query over a ring of keys, whose order is not
    that of time: both, with T = 1 and no window. Sink tokens, whose keys stand before all others: `sinks`; where all
    keys are sinks, every query sees every key.

    Args:
        q: queries, any strides; nothing is copied where the elements of a head stand side by side.
        k, v: keys and values; H is a multiple of G, and each serves H / G query heads that follow each other.
        window: [tokens] a query sees at most that many, itself and those right before it; None is all.
        query_document: number of each query's document, 0 to 2^31 - 1; None is the last T of `key_document`.
        key_document: number of each key's document, -1 is seen by nobody; None is one document.
        sinks: so many keys, the first ones, are seen by every query, whatever its place, window and document; what
            `key_document` says of them means nothing.

    Returns:
        o, in q's dtype; zeros for a query that sees no key.

    Raises:
        ValueError: shapes or dtypes that do not agree, a window below 1, more sinks than keys, queries' documents
            without the keys', or a forced backend that cannot run this.
    """
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    expected = dict(k=(B, G, S, K), v=(B, G, S, v.shape[-1]), query_document=(B, T), key_document=(B, S))
    for (name, shape), x in zip(expected.items(), (k, v, query_document, key_document), strict=True):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"causal_attention: {name}: expected shape {shape}, got {tuple(x.shape)}")
    if not 1 <= T <= S:
        raise ValueError(f"causal_attention: q: expected 1 to S={S} queries, got {T}")
    if not G or H % G:
        raise ValueError(f"causal_attention: q: expected a multiple of the keys' {G} heads, got {H}")
    if window is not None and window < 1:
        raise ValueError(f"causal_attention: window: expected None or 1 and more tokens, got {window}")
    if not 0 <= sinks <= S:
        raise ValueError(f"causal_attention: sinks: expected 0 to S={S} keys, got {sinks}")
    if key_document is None and query_document is not None:
        raise ValueError("causal_attention: key_document: expected one beside query_document, got None")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    for name, x in dict(k=k, v=v).items():
        if x.dtype != q.dtype:
            raise ValueError(f"causal_attention: {name}: expected q's dtype {q.dtype}, got {x.dtype}")
    if key_document is not None and query_document is None:
        query_document = key_document[:, S - T :] if T < S else key_document
    if across.ranks() is not None and sinks < S:
        k, v, key_document = _with_those_before(T, k, v, window, query_document, key_document, sinks)
        query_document = key_document[:, -T:]
    name = choose(BACKENDS, tokens=S, device=q.device, able=lambda name: takes(q, v) if name == "flex" else usable(q))
    return BACKENDS[name](q, k, v, window, query_document, key_document, sinks)


def _with_those_before(
    T: int, k: Tensor, v: Tensor, window: int | None, query_document: Tensor | None, document: Tensor | None, sinks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and documents of the sinks, of the ranks before as far as they are seen, and of this rank.

    A rank's documents are counted from the one that goes on from before, 0. Of the ranks before, only that one is seen.
    """
    S, K = k.shape[2], k.shape[-1]
    if T + sinks != S:
        raise ValueError(f"causal_attention: k: expected {T} keys beside {sinks} sinks, none kept, got {S}")
    if document is None:
        document = torch.zeros(k.shape[0], S, dtype=torch.int64, device=k.device)
    own, split = document[:, sinks:], across.ranks()
    pairs = torch.cat([k[:, :, sinks:], v[:, :, sinks:]], dim=-1)
    last = own == own[:, -1:]  # of the document that goes on into the next rank
    whole = own[:, -1:] == 0  # where that one has begun before this rank
    if window is not None and window - 1 <= T:
        reach = max(window - 1, 1)
        ahead = across.from_before(pairs[:, :, -reach:])
        seen = across.from_before(last[:, -reach:].to(pairs.dtype)) > 0
    else:
        parts = across.gathered(pairs)[: split.rank]
        marks = across.gathered(torch.cat([last, whole], dim=1).float())[: split.rank] > 0
        seen, goes_on = [], torch.ones_like(whole)
        for mark in marks.flip(0):  # the nearest first
            seen.insert(0, mark[:, :-1] & goes_on)
            goes_on = goes_on & mark[:, -1:]
        ahead = parts.movedim(0, 2).flatten(2, 3)  # [B, G, ranks T, K + V]
        seen = torch.cat([own[:, :0] > 0, *seen], dim=1)
    pairs = torch.cat([ahead, pairs], dim=2)
    documents = torch.cat([document[:, :sinks], seen.long() - 1, own], dim=1)
    k = torch.cat([k[:, :, :sinks], pairs[..., :K]], dim=2)
    v = torch.cat([v[:, :, :sinks], pairs[..., K:]], dim=2)
    return k, v, documents
