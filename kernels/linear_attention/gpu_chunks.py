"""Linear attention in Triton, all chunks at once, from the memories that `gpu_forward.states` left."""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import fall, put, tile
from seqzoo.kernels.linear_attention.gpu_parts import CHANNEL, HEAD, C, head_decays


@triton.jit(do_not_specialize=["T"])
def outputs(
    q, k, v, g, starts, scores, S, o, T, q_step, k_step, v_step,
    R: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] of a chunk and BV value channels. Programs (slices of V times B H, N).

    S [B, G, N, K, V]: the memory before each chunk. q is of CHANNEL the faded one, and k is not used.
    """
    H: tl.constexpr = G * R
    slices: tl.constexpr = (V + BV - 1) // BV
    batch, head, n = tl.program_id(0) // (slices * H), tl.program_id(0) // slices % H, tl.program_id(1)
    group = head // R
    tokens, values = tl.arange(0, C), tl.program_id(0) % slices * BV + tl.arange(0, BV)
    row, left = batch.to(tl.int64) * T + n * C, T - n * C
    chunks = tl.cdiv(T, C)
    at = ((batch.to(tl.int64) * G + group) * chunks + n) * (K * V)
    y, P = tl.zeros([C, BV], tl.float32), tl.zeros([C, C], tl.float32)
    for begin in range(0, K, BK):
        keys = begin + tl.arange(0, BK)
        q_ = tile(q + row * q_step + head * K, q_step, tokens, keys, left, K).to(DOT)
        y += tl.dot(q_, tile(S + at, V, keys, values, K, V), input_precision=PRECISION)
        if DECAY != CHANNEL:
            k_ = tile(k + row * k_step + group * K, k_step, tokens, keys, left, K).to(DOT)
            P += tl.dot(q_, tl.trans(k_), input_precision=PRECISION)
    if DECAY == HEAD:
        coarse, fine, _, _ = head_decays(g, starts, row, group, left, tokens, G)
        y *= fall(coarse, fine)[:, None]
        P *= fall(coarse[:, None] - coarse[None, :], fine[:, None] - fine[None, :])
    if DECAY == CHANNEL:
        to = scores + ((batch.to(tl.int64) * chunks + n) * H + head) * (C * C)
        P += tl.load(to + tokens[:, None] * C + tokens[None, :])
    P = tl.where(tokens[:, None] >= tokens[None, :], P, 0.0).to(DOT)
    v_ = tile(v + row * v_step + group * V, v_step, tokens, values, left, V).to(DOT)
    y += tl.dot(P, v_, input_precision=PRECISION)
    put(o + (row * H + head) * V, H * V, tokens, values, left, V, y)


@triton.jit(do_not_specialize=["T"])
def value_gradients(
    q, k, g, starts, scores, d_o, dS, dv, T, q_step, k_step, d_step,
    R: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv [B, T, G, V] of a chunk and BV value channels. Programs (slices of V times B G, N).

    dS [B, G, N, K, V]: gradient of the memory after each chunk. k is of CHANNEL the faded one, and q is not used.
    """
    slices: tl.constexpr = (V + BV - 1) // BV
    memory, n = tl.program_id(0) // slices, tl.program_id(1)
    batch, group = memory // G, memory % G
    tokens, values = tl.arange(0, C), tl.program_id(0) % slices * BV + tl.arange(0, BV)
    row, left = batch.to(tl.int64) * T + n * C, T - n * C
    chunks = tl.cdiv(T, C)
    at = (memory.to(tl.int64) * chunks + n) * (K * V)
    k_at = k + row * k_step + group * K
    dv_ = tl.zeros([C, BV], tl.float32)
    for begin in range(0, K, BK):
        keys = begin + tl.arange(0, BK)
        k_ = tile(k_at, k_step, tokens, keys, left, K).to(DOT)
        dv_ += tl.dot(k_, tile(dS + at, V, keys, values, K, V), input_precision=PRECISION)
    if DECAY == HEAD:
        coarse, fine, all_coarse, all_fine = head_decays(g, starts, row, group, left, tokens, G)
        dv_ *= fall(all_coarse - coarse, all_fine - fine)[:, None]
        between = fall(coarse[:, None] - coarse[None, :], fine[:, None] - fine[None, :])
    for r in range(R):
        head = group * R + r
        if DECAY == CHANNEL:
            to = scores + ((batch.to(tl.int64) * chunks + n) * (G * R) + head) * (C * C)
            P = tl.load(to + tokens[:, None] * C + tokens[None, :])
        else:
            P = tl.zeros([C, C], tl.float32)
            for begin in range(0, K, BK):
                keys = begin + tl.arange(0, BK)
                q_ = tile(q + row * q_step + head * K, q_step, tokens, keys, left, K).to(DOT)
                k_ = tile(k_at, k_step, tokens, keys, left, K).to(DOT)
                P += tl.dot(q_, tl.trans(k_), input_precision=PRECISION)
            if DECAY == HEAD:
                P *= between
            P = tl.where(tokens[:, None] >= tokens[None, :], P, 0.0).to(DOT)
        d_ = tile(d_o + row * d_step + head * V, d_step, tokens, values, left, V).to(DOT)
        dv_ += tl.dot(tl.trans(P), d_, input_precision=PRECISION)
    put(dv + (row * G + group) * V, G * V, tokens, values, left, V, dv_)


@triton.jit(do_not_specialize=["T"])
def gradients(
    q, k, v, g, starts, d_o, S, dS, dq, dk, dg, T, q_step, k_step, v_step, d_step,
    R: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk, contiguous, and where g is the share of its gradient in dg [slices of K, B, T, G], of a chunk and BK
    key channels; one decay per head, or none. S and dS as in `channel_gradients`. Programs (slices of K times B G, N).

    The gradient of a log decay is the sum over all pairs that it lies between, of a token that writes and a later one
    that reads: both outside the chunk, one outside, none. Sums only, nothing is subtracted.
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
    k_ = tile(k + row * k_step + group * K, k_step, tokens, keys, left, K)
    dk_, across_all = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    for begin in range(0, V, BV):
        values = begin + tl.arange(0, BV)
        dS_ = tile(dS + at, V, keys, values, K, V)
        v_ = tile(v_at, v_step, tokens, values, left, V).to(DOT)
        dk_ += tl.dot(v_, tl.trans(dS_), input_precision=PRECISION)
        if dg is not None:
            across_all += tl.sum(tile(S + at, V, keys, values, K, V).to(tl.float32) * dS_.to(tl.float32), 1)
    if DECAY == HEAD:
        coarse, fine, all_coarse, all_fine = head_decays(g, starts, row, group, left, tokens, G)
        dk_ *= fall(all_coarse - coarse, all_fine - fine)[:, None]
        between = fall(coarse[:, None] - coarse[None, :], fine[:, None] - fine[None, :])
    if dg is not None:
        written, asked = tl.sum(k_.to(tl.float32) * dk_, 1), tl.zeros([C], tl.float32)
        inside = tl.zeros([C, C], tl.float32)
    for r in range(R):
        head = group * R + r
        q_ = tile(q + row * q_step + head * K, q_step, tokens, keys, left, K)
        d_at = d_o + row * d_step + head * V
        dP, dq_ = tl.zeros([C, C], tl.float32), tl.zeros([C, BK], tl.float32)
        for begin in range(0, V, BV):
            values = begin + tl.arange(0, BV)
            d_ = tile(d_at, d_step, tokens, values, left, V).to(DOT)
            v_ = tile(v_at, v_step, tokens, values, left, V).to(DOT)
            dP += tl.dot(d_, tl.trans(v_), input_precision=PRECISION)
            dq_ += tl.dot(d_, tl.trans(tile(S + at, V, keys, values, K, V)), input_precision=PRECISION)
        if DECAY == HEAD:
            dP *= between
            dq_ *= fall(coarse, fine)[:, None]
        dP = tl.where(later >= earlier, dP, 0.0)
        if dg is not None:
            asked += tl.sum(q_.to(tl.float32) * dq_, 1)
            inside += dP * tl.dot(q_.to(DOT), tl.trans(k_.to(DOT)), input_precision=PRECISION)
        dq_ += tl.dot(dP.to(DOT), k_.to(DOT), input_precision=PRECISION)
        dk_ += tl.dot(tl.trans(dP.to(DOT)), q_.to(DOT), input_precision=PRECISION)
        put(dq + (row * H + head) * K, H * K, tokens, keys, left, K, dq_)
    put(dk + (row * G + group) * K, G * K, tokens, keys, left, K, dk_)
    if dg is not None:
        dg_ = tl.sum(across_all, 0) * fall(all_coarse, all_fine)
        dg_ += tl.sum(tl.where(earlier >= later, asked[None, :], 0.0), 1)
        dg_ += tl.sum(tl.where(earlier < later, written[None, :] + tl.cumsum(inside, 0, reverse=True), 0.0), 1)
        part = (tl.program_id(0) % across).to(tl.int64) * tl.num_programs(0) // across // G * T * G
        tl.store(dg + part + (row + tokens) * G + group, dg_, mask=tokens < left)
