"""Linear attention forward in Triton: a scan over chunks that adds to the memory and reads it in one pass.

Of a chunk, S the memory at its start:  O = (e Q) S + P V,  S' = e_last S + (f K)^T V;  e, f, P: see `chunked.py`.
One program has one memory, or some of its value channels, and serves all query heads that read it. With one decay per
head e, f and P are made on the way, with one per channel they come from `gpu_channel.prepare`.
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import fall, put, tile
from seqzoo.kernels.linear_attention.gpu_parts import CHANNEL, HEAD, C, head_decays


@triton.jit
def read(
    q, scores, o, k_, v_, S, coarse, fine, tokens, keys, values, left, q_step, head,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query head's outputs of a chunk; q, scores and o point to it."""
    q_ = tile(q + head * K, q_step, tokens, keys, left, K).to(DOT)
    if DECAY == CHANNEL:
        P = tl.load(scores + head * (C * C) + tokens[:, None] * C + tokens[None, :])
    else:
        P = tl.dot(q_, tl.trans(k_), input_precision=PRECISION)
        if DECAY == HEAD:
            P *= fall(coarse[:, None] - coarse[None, :], fine[:, None] - fine[None, :])
        P = tl.where(tokens[:, None] >= tokens[None, :], P, 0.0).to(DOT)
    y = tl.dot(q_, S, input_precision=PRECISION)
    if DECAY == HEAD:
        y *= fall(coarse, fine)[:, None]
    y += tl.dot(P, v_, input_precision=PRECISION)
    put(o + head * V, H * V, tokens, values, left, V, y)


@triton.jit(do_not_specialize=["T", "length", "segments"])
def scan(
    q, k, v, g, starts, scores, keep, first, o, last, T, length, segments, q_step, k_step, v_step,
    R: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [B, T, G R, V] and last [B, G, K, V], programs (slices of V times B G, segments of `length` chunks).

    first: [B, G, segments, K, V], the memory at the start of each segment, or None.
    scores [B, N, G R, C, C], keep [B, N, G, K]: of CHANNEL, of all N chunks; q and k are then faded ones.
    """
    slices: tl.constexpr = (V + BV - 1) // BV
    memory, segment = tl.program_id(0) // slices, tl.program_id(1)
    batch, group = memory // G, memory % G
    tokens, keys = tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(0) % slices * BV + tl.arange(0, BV)
    cells = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if first is not None:
        S += tl.load(first + (memory.to(tl.int64) * segments + segment) * (K * V) + cells, mask=inside, other=0.0)
    chunks = tl.cdiv(T, C)
    for n in range(segment * length, tl.minimum((segment + 1) * length, chunks)):
        row, left = batch.to(tl.int64) * T + n * C, T - n * C
        k_ = tile(k + row * k_step + group * K, k_step, tokens, keys, left, K).to(DOT)
        v_ = tile(v + row * v_step + group * V, v_step, tokens, values, left, V)
        S_, v_dot, coarse, fine = S.to(DOT), v_.to(DOT), 0.0, 0.0
        if DECAY == HEAD:
            coarse, fine, all_coarse, all_fine = head_decays(g, starts, row, group, left, tokens, G)
        q_at, o_at, at = q + row * q_step + group * R * K, o + (row * G + group) * R * V, scores
        if DECAY == CHANNEL:
            at = scores + ((batch.to(tl.int64) * chunks + n) * G + group) * R * (C * C)
        if R == 1:  # no inner loop: the compiler then loads ahead over the outer one
            read(q_at, at, o_at, k_, v_dot, S_, coarse, fine, tokens, keys, values, left, q_step, 0,
                 G * R, K, V, DECAY, DOT, PRECISION)  # fmt: skip
        else:
            for head in range(R):
                read(q_at, at, o_at, k_, v_dot, S_, coarse, fine, tokens, keys, values, left, q_step, head,
                     G * R, K, V, DECAY, DOT, PRECISION)  # fmt: skip
        if DECAY == HEAD:
            v_dot = (v_ * fall(all_coarse - coarse, all_fine - fine)[:, None]).to(DOT)
            S *= fall(all_coarse, all_fine)
        if DECAY == CHANNEL:
            to = keep + ((batch.to(tl.int64) * chunks + n) * G + group) * K + keys
            S *= tl.load(to, mask=keys < K, other=0.0)[:, None]
        S += tl.dot(tl.trans(k_), v_dot, input_precision=PRECISION)
    if segment == segments - 1:
        tl.store(last + memory.to(tl.int64) * (K * V) + cells, S, mask=inside)


@triton.jit(do_not_specialize=["T", "length", "segments"])
def states(
    left_, right, g, starts, keep, first, chunks, last, fades, T, length, segments, left_step, right_step,
    R: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Memories alone: of k and v from the first chunk on, or REVERSE, gradients of them, of q and d_o, from the last.

    Programs (slices of K times slices of V times B G, segments). A chunk adds the products of `left_` and `right` of
    R heads. `chunks` [B, G, N, K, V] gets the memory before each chunk, in the order they are gone through; without it,
    `last` [B, G, segments, K, V] gets what every segment makes of nothing, and `fades` [B, G, segments, 1 or K] how
    much it leaves of what was before it. With it `first` is as in `scan`, or None, and `last` [B, G, K, V], or None.
    """
    across: tl.constexpr = (K + BK - 1) // BK
    slices: tl.constexpr = (V + BV - 1) // BV
    memory, segment = tl.program_id(0) // (across * slices), tl.program_id(1)
    batch, group = memory // G, memory % G
    tokens = tl.arange(0, C)
    keys = tl.program_id(0) // slices % across * BK + tl.arange(0, BK)
    values = tl.program_id(0) % slices * BV + tl.arange(0, BV)
    cells = keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    here = memory.to(tl.int64) * segments + segment
    S, left_of = tl.zeros([BK, BV], tl.float32), tl.full([BK], 1.0, tl.float32)
    if first is not None:
        S += tl.load(first + here * (K * V) + cells, mask=inside, other=0.0)
    N = tl.cdiv(T, C)
    begin, end = segment * length, tl.minimum((segment + 1) * length, N)
    for i in range(begin, end):
        n = i
        if REVERSE:
            n = begin + end - 1 - i
        row, left = batch.to(tl.int64) * T + n * C, T - n * C
        if chunks is not None:
            to = chunks + (memory.to(tl.int64) * N + n) * (K * V) + cells
            tl.store(to, S.to(chunks.dtype.element_ty), mask=inside)
        if DECAY == HEAD:
            coarse, fine, all_coarse, all_fine = head_decays(g, starts, row, group, left, tokens, G)
            faded = fall(all_coarse, all_fine)
            share = fall(coarse, fine) if REVERSE else fall(all_coarse - coarse, all_fine - fine)
            S *= faded
            left_of *= faded
        if DECAY == CHANNEL:
            faded = tl.load(keep + ((batch.to(tl.int64) * N + n) * G + group) * K + keys, mask=keys < K, other=0.0)
            S *= faded[:, None]
            left_of *= faded
        for head in range(R):
            at = (group * R + head).to(tl.int64)
            a = tile(left_ + row * left_step + at * K, left_step, tokens, keys, left, K).to(DOT)
            b = tile(right + row * right_step + at * V, right_step, tokens, values, left, V)
            if DECAY == HEAD:
                b = b * share[:, None]
            S += tl.dot(tl.trans(a), b.to(DOT), input_precision=PRECISION)
    if fades is not None:
        if DECAY == HEAD:
            tl.store(fades + here + keys * 0, left_of, mask=keys == 0)
        if DECAY == CHANNEL:
            tl.store(fades + here * K + keys, left_of, mask=keys < K)
    if last is not None:
        if chunks is None:
            tl.store(last + here * (K * V) + cells, S, mask=inside)
        elif segment == (0 if REVERSE else segments - 1):
            tl.store(last + memory.to(tl.int64) * (K * V) + cells, S, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def combine(
    parts, fades, first, segments,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What every segment made of nothing -> the memory it starts with, in place. Programs (B G, blocks of K V)."""
    memory = tl.program_id(0).to(tl.int64)
    cells = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < K * V
    S = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        S += tl.load(first + memory * (K * V) + cells, mask=inside, other=0.0)
    for i in range(segments):
        here = memory * segments + i
        if REVERSE:
            here = memory * segments + segments - 1 - i
        part = tl.load(parts + here * (K * V) + cells, mask=inside, other=0.0)
        tl.store(parts + here * (K * V) + cells, S, mask=inside)
        if DECAY == HEAD:
            S *= tl.load(fades + here)
        if DECAY == CHANNEL:
            S *= tl.load(fades + here * K + cells // V, mask=inside, other=0.0)
        S += part
