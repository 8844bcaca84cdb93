"""One decay per key channel: what a chunk's scores are, and gradients through them, as products of matrices.

How P_ij = sum_c q_ic D_ijc k_jc is put together from halves: `kernels/gpu/tiles.py`. A token is asked by its query
where it is in the second half of a block, by its key in the first: each size of block is one product of a matrix with
itself.
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import channel_log, fall, halves, put, tile, two
from seqzoo.kernels.linear_attention.gpu_parts import LEVELS, C


@triton.jit(do_not_specialize=["T"])
def prepare(
    q, k, g, starts, reads, writes, scores, keep, T, q_step, k_step,
    R: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [B, N, H, C, C], faded queries `reads` [B, T, H, K] and keys `writes` [B, T, G, K], keep [B, N, G, K].

    Programs (B H, N).
    """
    H: tl.constexpr = G * R
    batch, head, n = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    group = head // R
    tokens = tl.arange(0, C)
    row, left = batch.to(tl.int64) * T + n * C, T - n * C
    at = batch.to(tl.int64) * tl.cdiv(T, C) + n
    later, earlier = tokens[:, None], tokens[None, :]
    P = tl.zeros([C, C], tl.float32)
    for begin in range(0, K, BK):
        keys = begin + tl.arange(0, BK)
        coarse, fine = two(channel_log(g, starts, row, group, left, tokens, keys, G, K))
        all_coarse, all_fine = tl.sum(coarse, 0), tl.sum(fine, 0)
        coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
        q_ = tile(q + row * q_step + head * K, q_step, tokens, keys, left, K).to(tl.float32)
        k_ = tile(k + row * k_step + group * K, k_step, tokens, keys, left, K).to(tl.float32)
        put(reads + (row * H + head) * K, H * K, tokens, keys, left, K, q_ * fall(coarse, fine))
        if head % R == 0:
            faded = k_ * fall(all_coarse[None, :] - coarse, all_fine[None, :] - fine)
            put(writes + (row * G + group) * K, G * K, tokens, keys, left, K, faded)
            tl.store(keep + (at * G + group) * K + keys, fall(all_coarse, all_fine), mask=keys < K)
        P += tl.where(later == earlier, tl.sum(q_ * k_, 1)[:, None], 0.0)
        for level in range(LEVELS):
            decay = halves(coarse, fine, tokens, level, BK)
            x = (tl.where((later >> level) & 1 != 0, q_, k_) * decay).to(DOT)
            block = tl.dot(x, tl.trans(x), input_precision=PRECISION)
            P += tl.where((later ^ earlier) >> level == 1, block, 0.0)
    P = tl.where(later >= earlier, P, 0.0)  # above it are products of other pairs
    to = scores + (at * H + head) * (C * C) + later * C + earlier
    tl.store(to, P.to(scores.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def channel_gradients(
    q, k, v, g, starts, d_o, S, dS, dq, dk, dg, T, q_step, k_step, v_step, d_step,
    R: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg, contiguous, of a chunk and BK key channels. S and dS [B, G, N, K, V]: the memory before it and
    the gradient of that after it. Programs (slices of K times B G, N).

    The gradient of a log decay is the sum over all pairs that it lies between, of a token that writes and a later one
    that reads: both outside the chunk, one outside, or in the two halves of a block. Sums only, nothing is subtracted.
    """
    H: tl.constexpr = G * R
    across: tl.constexpr = (K + BK - 1) // BK
    memory, n = tl.program_id(0) // across, tl.program_id(1)
    batch, group = memory // G, memory % G
    tokens, keys = tl.arange(0, C), tl.program_id(0) % across * BK + tl.arange(0, BK)
    later, earlier = tokens[:, None], tokens[None, :]
    row, left = batch.to(tl.int64) * T + n * C, T - n * C
    at = (memory.to(tl.int64) * tl.cdiv(T, C) + n) * (K * V)
    v_at = v + row * v_step + group * V
    coarse, fine = two(channel_log(g, starts, row, group, left, tokens, keys, G, K))
    all_coarse, all_fine = tl.sum(coarse, 0), tl.sum(fine, 0)
    coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    k_at = k + row * k_step + group * K
    k_ = tile(k_at, k_step, tokens, keys, left, K).to(tl.float32)
    dk_, across_all = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    for begin in range(0, V, BV):
        values = begin + tl.arange(0, BV)
        v_ = tile(v_at, v_step, tokens, values, left, V).to(DOT)
        S_, dS_ = tile(S + at, V, keys, values, K, V), tile(dS + at, V, keys, values, K, V)
        dk_ += tl.dot(v_, tl.trans(dS_), input_precision=PRECISION)
        across_all += tl.sum(S_.to(tl.float32) * dS_.to(tl.float32), 1)
    dk_ *= fall(all_coarse[None, :] - coarse, all_fine[None, :] - fine)
    inside = (tokens < left)[:, None] & (keys < K)[None, :]
    from_here, before = earlier >= later, earlier < later
    dg_ = tl.zeros([C, BK], tl.float32) + (across_all * fall(all_coarse, all_fine))[None, :]
    dg_ += tl.dot(before.to(DOT), (k_ * dk_).to(DOT), input_precision=PRECISION)
    for r in range(R):
        head = group * R + r
        q_at = q + row * q_step + head * K
        d_at = d_o + row * d_step + head * V
        dP, dq_ = tl.zeros([C, C], tl.float32), tl.zeros([C, BK], tl.float32)
        for begin in range(0, V, BV):
            values = begin + tl.arange(0, BV)
            d_ = tile(d_at, d_step, tokens, values, left, V).to(DOT)
            v_ = tile(v_at, v_step, tokens, values, left, V).to(DOT)
            S_ = tile(S + at, V, keys, values, K, V)
            dP += tl.dot(d_, tl.trans(v_), input_precision=PRECISION)
            dq_ += tl.dot(d_, tl.trans(S_), input_precision=PRECISION)
        dq_ *= fall(coarse, fine)
        q_ = tile(q_at, q_step, tokens, keys, left, K).to(tl.float32)
        dg_ += tl.dot(from_here.to(DOT), (q_ * dq_).to(DOT), input_precision=PRECISION)
        same = tl.sum(tl.where(later == earlier, dP, 0.0), 1)[:, None]
        dP = tl.where(later > earlier, dP, 0.0)
        dP += tl.trans(dP)
        dq_ += same * tile(k_at, k_step, tokens, keys, left, K).to(tl.float32)
        dk_ += same * q_
        for level in range(LEVELS):
            decay = halves(coarse, fine, tokens, level, BK)
            second = (later >> level) & 1 != 0
            mine = tl.where(second, q_at + tokens[:, None] * q_step, k_at + tokens[:, None] * k_step) + keys[None, :]
            mine = tl.load(mine, mask=inside, other=0.0).to(tl.float32)  # again: registers are short
            pairs = tl.where((later ^ earlier) >> level == 1, dP, 0.0).to(DOT)
            more = tl.dot(pairs, (mine * decay).to(DOT), input_precision=PRECISION) * decay
            dq_ += tl.where(second, more, 0.0)
            dk_ += tl.where(second, 0.0, more)
            between = (later >> level == earlier >> level) & tl.where(second, earlier >= later, earlier < later)
            dg_ += tl.dot(between.to(DOT), (mine * more).to(DOT), input_precision=PRECISION)
        put(dq + (row * H + head) * K, H * K, tokens, keys, left, K, dq_)
    put(dk + (row * G + group) * K, G * K, tokens, keys, left, K, dk_)
    put(dg + (row * G + group) * K, G * K, tokens, keys, left, K, dg_)
