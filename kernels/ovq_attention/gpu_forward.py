"""The joint read on a GPU, forward: one softmax over a document's slots and the open chunk, no score in memory.

A program has BM rows, the queries of a key head at one chunk of one document: r heads, L tokens each. It goes through
the slots, then through the chunk's tokens up to its last one, BN at a time. Chunks do not wait for each other.

`table` holds of each document at each chunk (a job): the first row in `q`; L; the first row in `memory`; slots in use;
slots there; the first row in `tokens`; C; and which of its C tokens the first query is. Rows of heads lie behind each
other: [H, L], [G, slots there], [G, C].
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def job_of(table, job):
    """The eight numbers, int64."""
    at = table + job * FIELDS
    return (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
            tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7))  # fmt: skip


@triton.jit
def rows_of(x, rows, there, width, first: tl.constexpr, size: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """Columns first to first + size of the rows of x, which are `width` wide: [rows, BLOCK], padded with zeros."""
    columns = tl.arange(0, BLOCK)
    inside = there[:, None] & (columns < size)[None]
    return tl.load(x + rows[:, None] * width + first + columns[None], mask=inside, other=0.0).to(DOT)


@triton.jit
def bias_of(counts, rows, there, LOG_COUNT: tl.constexpr):
    """Of each slot's logit, in base 2: -inf where there is none."""
    n = tl.load(counts + rows, mask=there, other=0.0)
    size = tl.log2(tl.maximum(n, 1e-37)) if LOG_COUNT else 0.0
    return tl.where(n > 0.0, size, float("-inf"))


@triton.jit
def correction_of(keys):
    """(1 - |key|^2) / 2 of keys [BN, BK]."""
    keys = keys.to(tl.float32)
    return 0.5 - 0.5 * tl.sum(keys * keys, axis=1)


@triton.jit
def _more(logits, values, most, total, o, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The softmax so far, and these logits [BM, BN] of values [BN, BV]."""
    new = tl.maximum(most, tl.max(logits, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    fade, p = tl.exp2(most - safe), tl.exp2(logits - safe[:, None])
    o = o * fade[:, None] + tl.dot(p.to(DOT), values, input_precision=PRECISION)
    return new, total * fade + tl.sum(p, axis=1), o


@triton.jit(do_not_specialize=["strips"])
def joint_read(
    q, scale, memory, counts, tokens, table, o, logsum, strips,
    G: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LOG_COUNT: tl.constexpr, NORMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [rows, V], and the logarithms (base 2) of each row's sum; HEADS: of queries per key head."""
    here = tl.program_id(0)
    strip, g = here % strips, here // strips % G
    first_q, L, first_slot, used, slots, first_token, C, offset = job_of(table, here // strips // G)
    if strip * BM >= HEADS * L:
        return
    row = strip * BM + tl.arange(0, BM)
    there = row < HEADS * L
    last = row % L + offset  # the token of the chunk that a query is
    row = first_q + g * HEADS * L + row
    queries = rows_of(q, row, there, K, 0, K, BK, DOT)
    s = tl.load(scale + row, mask=there, other=0.0)[:, None] * LOG2_E
    most, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, BV), tl.float32)
    first_slot += g * slots
    for n in range(0, used, BN):
        slot = n + tl.arange(0, BN)
        present = slot < used
        keys = rows_of(memory, first_slot + slot, present, K + V, 0, K, BK, DOT)
        product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if NORMS:
            product += correction_of(keys)[None]
        logits = s * product + bias_of(counts, first_slot + slot, present, LOG_COUNT)[None]
        values = rows_of(memory, first_slot + slot, present, K + V, K, V, BV, DOT)
        most, total, result = _more(logits, values, most, total, result, DOT, PRECISION)
    first_token += g * C
    for n in range(0, tl.minimum(C, tl.max(last) + 1), BN):
        token = n + tl.arange(0, BN)
        keys = rows_of(tokens, first_token + token, token < C, K + V, 0, K, BK, DOT)
        product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        logits = tl.where((token[None] <= last[:, None]) & (token < C)[None], s * product, float("-inf"))
        values = rows_of(tokens, first_token + token, token < C, K + V, K, V, BV, DOT)
        most, total, result = _more(logits, values, most, total, result, DOT, PRECISION)
    inside = there[:, None] & (tl.arange(0, BV) < V)[None]
    result /= total[:, None]
    tl.store(o + row[:, None] * V + tl.arange(0, BV)[None], result.to(o.dtype.element_ty), mask=inside)
    tl.store(logsum + row, most + tl.log2(total), mask=there)
