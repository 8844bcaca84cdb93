"""The joint read on a GPU, backward: the gradients of the queries, and those of slots and tokens, each by who owns it.

    p = exp2(logit - logsum)   d_logit = p (v . d_o - o . d_o)   d_k = sum s d_logit q   d_v = sum p d_o

A program owns BM rows of queries and goes through keys as the forward pass does, or owns BN keys and goes through the
queries that see them, head by head: sums always in one order, and a query that is padding adds zeros to them.
"""

import triton
import triton.language as tl

from seqzoo.kernels.ovq_attention.gpu_forward import LOG2_E, bias_of, correction_of, job_of, rows_of


@triton.jit
def _step(queries, keys, values, d_o, inner, logsum, s, shift, bias, seen, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """d_logit [BM, BN] of queries [BM, BK] and keys [BN, BK]."""
    product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + shift[None]
    p = tl.exp2(tl.where(seen, s[:, None] * LOG2_E * product + bias[None] - logsum[:, None], float("-inf")))
    return p * (tl.dot(d_o, tl.trans(values), input_precision=PRECISION) - inner[:, None])


@triton.jit(do_not_specialize=["strips"])
def joint_read_queries(
    q, scale, memory, counts, tokens, table, o, logsum, d_o, d_q, d_scale, inner, strips,
    G: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LOG_COUNT: tl.constexpr, NORMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q, d_scale [rows], and `inner`, o . d_o of each row."""
    here = tl.program_id(0)
    strip, g = here % strips, here // strips % G
    first_q, L, first_slot, used, slots, first_token, C, offset = job_of(table, here // strips // G)
    if strip * BM >= HEADS * L:
        return
    row = strip * BM + tl.arange(0, BM)
    there = row < HEADS * L
    last = row % L + offset
    row = first_q + g * HEADS * L + row
    given = rows_of(d_o, row, there, V, 0, V, BV, tl.float32)
    delta = tl.sum(given * rows_of(o, row, there, V, 0, V, BV, tl.float32), axis=1)
    tl.store(inner + row, delta, mask=there)
    given = given.to(DOT)
    queries = rows_of(q, row, there, K, 0, K, BK, DOT)
    s, log = tl.load(scale + row, mask=there, other=0.0), tl.load(logsum + row, mask=there, other=0.0)
    result, shifted = tl.zeros((BM, BK), tl.float32), tl.zeros((BM,), tl.float32)
    first_slot += g * slots
    for n in range(0, used, BN):
        slot = n + tl.arange(0, BN)
        present = slot < used
        keys = rows_of(memory, first_slot + slot, present, K + V, 0, K, BK, DOT)
        values = rows_of(memory, first_slot + slot, present, K + V, K, V, BV, DOT)
        bias, shift = bias_of(counts, first_slot + slot, present, LOG_COUNT), tl.zeros((BN,), tl.float32)
        if NORMS:
            shift = correction_of(keys)
        seen = there[:, None] & present[None]
        d = _step(queries, keys, values, given, delta, log, s, shift, bias, seen, DOT, PRECISION)
        shifted += tl.sum(d * shift[None], axis=1)
        result += tl.dot(d.to(DOT), keys, input_precision=PRECISION)
    first_token += g * C
    none = tl.zeros((BN,), tl.float32)
    for n in range(0, tl.minimum(C, tl.max(last) + 1), BN):
        token = n + tl.arange(0, BN)
        keys = rows_of(tokens, first_token + token, token < C, K + V, 0, K, BK, DOT)
        values = rows_of(tokens, first_token + token, token < C, K + V, K, V, BV, DOT)
        seen = there[:, None] & (token[None] <= last[:, None]) & (token < C)[None]
        d = _step(queries, keys, values, given, delta, log, s, none, none, seen, DOT, PRECISION)
        result += tl.dot(d.to(DOT), keys, input_precision=PRECISION)
    inside = there[:, None] & (tl.arange(0, BK) < K)[None]
    tl.store(d_scale + row, tl.sum(result * queries.to(tl.float32), axis=1) + shifted, mask=there)
    tl.store(
        d_q + row[:, None] * K + tl.arange(0, BK)[None], (result * s[:, None]).to(d_q.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["strips"])
def joint_read_keys(
    q, scale, memory, counts, tokens, table, logsum, inner, d_o, d_keys, strips,
    G: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SLOTS: tl.constexpr,
    LOG_COUNT: tl.constexpr, NORMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_keys [rows, K + V] of the memory's slots, or of the tokens where not SLOTS."""
    here = tl.program_id(0)
    strip, g = here % strips, here // strips % G
    first_q, L, first_slot, used, slots, first_token, C, offset = job_of(table, here // strips // G)
    if SLOTS:
        size, first, present = slots, first_slot + g * slots, used
    else:
        size, first, present = C, first_token + g * C, C
    if strip * BN >= size:
        return
    key = strip * BN + tl.arange(0, BN)
    there, row = key < present, first + key
    source = memory if SLOTS else tokens
    keys, values = rows_of(source, row, there, K + V, 0, K, BK, DOT), rows_of(source, row, there, K + V, K, V, BV, DOT)
    bias, shift = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    begin = L * 0
    if SLOTS:
        bias = bias_of(counts, row, there, LOG_COUNT)
        if NORMS:
            shift = correction_of(keys)
    else:  # queries before the first of these tokens see none of them
        begin = tl.maximum(strip * BN - offset, 0) // BM * BM
    d_k, d_v = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BV), tl.float32)
    shifted = tl.zeros((BN,), tl.float32)
    for head in range(0, HEADS):
        for n in range(begin, L, BM):
            token = n + tl.arange(0, BM)
            asked = token < L
            query = first_q + (g * HEADS + head) * L + token
            queries, given = rows_of(q, query, asked, K, 0, K, BK, DOT), rows_of(d_o, query, asked, V, 0, V, BV, DOT)
            s, log = tl.load(scale + query, mask=asked, other=0.0), tl.load(logsum + query, mask=asked, other=0.0)
            delta = tl.load(inner + query, mask=asked, other=0.0)
            product = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) + shift[:, None]
            seen = there[:, None] & asked[None]
            if not SLOTS:
                seen = seen & (key[:, None] <= token[None] + offset)
            logits = (s * LOG2_E)[None] * product + bias[:, None] - log[None]
            p = tl.exp2(tl.where(seen, logits, float("-inf")))
            d_v += tl.dot(p.to(DOT), given, input_precision=PRECISION)
            d = tl.dot(values, tl.trans(given), input_precision=PRECISION) - delta[None]
            d = p * d * s[None]
            d_k += tl.dot(d.to(DOT), queries, input_precision=PRECISION)
            if NORMS and SLOTS:
                shifted += tl.sum(d, axis=1)
    if NORMS and SLOTS:
        d_k -= shifted[:, None] * rows_of(
            memory, row, there, K + V, 0, K, BK, tl.float32
        )  # read again: registers are few
    inside = (key < size)[:, None]
    at = d_keys + row[:, None] * (K + V)
    tl.store(at + tl.arange(0, BK)[None], d_k, mask=inside & (tl.arange(0, BK) < K)[None])
    tl.store(at + K + tl.arange(0, BV)[None], d_v, mask=inside & (tl.arange(0, BV) < V)[None])
