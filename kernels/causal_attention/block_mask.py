"""Which blocks of keys a block of queries sees, for `flex_attention`, from a few numbers per block: never a T x S mask.

A block is in `partial` where some of its pairs may be seen (the mask itself then says which), and in `full` where all
are. Everything happens on the device; nothing waits for it.

No type is checked here: torch.compile traces these functions, and cannot trace a checker.

B batch, 1 where all rows are alike   M blocks of queries   N blocks of keys
"""

from collections.abc import Callable
from typing import no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries, and keys: flex_attention's own default


@no_type_check
def block_mask(
    T: int,
    S: int,
    window: int | None,
    query_document: Tensor | None,
    key_document: Tensor | None,
    sinks: int,
    device: torch.device,
) -> BlockMask:
    """Of T queries, the last of S keys; the arguments as in `causal_attention_reference`."""
    partial, full = blocks(T, S, window, query_document, key_document, sinks, device)
    of_queries, of_full_queries = listed(partial), listed(full)
    of_keys, of_full_keys = listed(partial.mT), listed(full.mT)
    return BlockMask(
        seq_lengths=(T, S),
        kv_num_blocks=of_queries[0],
        kv_indices=of_queries[1],
        full_kv_num_blocks=of_full_queries[0],
        full_kv_indices=of_full_queries[1],
        q_num_blocks=of_keys[0],
        q_indices=of_keys[1],
        full_q_num_blocks=of_full_keys[0],
        full_q_indices=of_full_keys[1],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=seen_by(T, S, window, query_document, key_document, sinks, device),
    )


@no_type_check
def seen_by(
    T: int,
    S: int,
    window: int | None,
    query_document: Tensor | None,
    key_document: Tensor | None,
    sinks: int,
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask of single pairs, as flex_attention asks for it."""
    if T == S:
        distance = torch.sub
    elif sinks == S - T:
        distance = lambda i, j: i + sinks - j
    else:  # a number that changes with every call is read, not compiled in
        ahead = torch.full((), S - T, dtype=torch.int32, device=device)
        distance = lambda i, j: i + ahead - j

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = distance(i, j)
        yes = back >= 0
        if window is not None:
            yes = yes & (back < window)
        if key_document is not None:
            there = key_document[b, j]
            yes = yes & (query_document[b, i] == there) & (there >= 0)
        return yes | (j < sinks) if sinks else yes

    return seen


@no_type_check
def blocks(
    T: int,
    S: int,
    window: int | None,
    query_document: Tensor | None,
    key_document: Tensor | None,
    sinks: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """partial and full [B, 1, M, N] bool. `partial` may hold a block of which nothing is seen, never misses one."""
    first = torch.arange(0, T, BLOCK, device=device)[:, None]
    key = torch.arange(0, S, BLOCK, device=device)
    last, last_key = (first + BLOCK - 1).clamp(max=T - 1) + S - T, (key + BLOCK - 1).clamp(max=S - 1)
    inside = (first + BLOCK <= T) & (key + BLOCK <= S)
    first = first + S - T
    some, all_ = last >= key, first >= last_key
    if window is not None:
        some, all_ = some & (first - last_key < window), all_ & (last - key < window)
    if key_document is None:
        some, all_ = some[None], all_[None]
    else:
        low, high, whole = (x[:, :, None] for x in extremes(query_document))
        low_key, high_key, whole_key = (x[:, None] for x in extremes(key_document))
        some = some & (low <= high_key) & (low_key <= high)
        all_ = all_ & (low == high_key) & (high == low_key) & whole & whole_key
    if sinks:
        some, all_ = some | (key < sinks), all_ | (last_key < sinks)
    all_ = all_ & inside
    return (some & ~all_)[:, None], all_[:, None]


@no_type_check
def extremes(document: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block of document [B, length]: the least number, the largest, and whether all have one; [B, blocks]."""
    tiles = F.pad(document, (0, -document.shape[1] % BLOCK), value=-1).unflatten(1, (-1, BLOCK))
    some = tiles >= 0
    return tiles.where(some, torch.iinfo(document.dtype).max).amin(-1), tiles.amax(-1), some.all(-1)


@no_type_check
def listed(there: Tensor) -> tuple[Tensor, Tensor]:
    """there [..., rows, columns] -> how many of each row [..., rows] and which, in order, then the others; int32."""
    order = there.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return there.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
