"""Backward, the parallel part: the gradients of a chunk's inputs from the memory before it, that after it, Z and U.

With E = (I + A)^T U the gradient of the errors times beta, H = E S^T and W = E Z^T below the diagonal, d_P = d_O Z^T up
to it; `over D` is a sum over pairs of tokens with the decay between them, made by halves as P and L are:

    d_V = beta E      d_beta = E . V - (e K) . H - K . (W over D) K      `.` sums a row's products
    d_Q = e (d_O S^T) + (d_P over D) K
    d_K = f (Z M^T) - beta e H - beta (W over D) K - (W^T over D) beta K + (d_P^T over D) Q

The gradient of a log decay is the sum over all pairs that it lies between, of a token that writes and a later one that
reads: both outside the chunk, one outside, or in the two halves of a block. Sums only, nothing is subtracted.
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import fall, halves, put, tile
from seqzoo.kernels.kimi_delta_rule.gpu_prepare import sums


@triton.jit(do_not_specialize=["T", "N"])
def squares(
    v, beta, d_o, A, Z, U, E, W, d_P, dv, d_beta, T, N, v_step,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E [B, H, N, C, V], W and d_P [B, H, N, C, C] with their transposes above the diagonal, dv, and of d_beta
    [B, T, H] the first term. Programs: B H N.
    """
    pid = tl.program_id(0).to(tl.int64)
    n, batch, head = pid % N, pid // N // H, pid // N % H
    tokens = tl.arange(0, C)
    later, earlier = tokens[:, None], tokens[None, :]
    row, left = batch * T + n * C, T - n * C
    A, W, d_P, square = A + pid * (C * C), W + pid * (C * C), d_P + pid * (C * C), later * C + earlier
    A_ = tl.trans(tl.load(A + square)).to(DOT)
    at = (row + tokens) * H + head
    b = tl.load(beta + at, mask=tokens < left, other=0.0).to(tl.float32)
    taken, seen, corrected = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for begin in range(0, V, BV):
        columns = begin + tl.arange(0, BV)
        U_ = tile(U + pid * (C * V), V, tokens, columns, C, V)
        E_ = tl.dot(A_, U_.to(DOT), acc=U_.to(tl.float32), input_precision=PRECISION)
        put(E + pid * (C * V), V, tokens, columns, C, V, E_)
        put(dv + (row * H + head) * V, H * V, tokens, columns, left, V, b[:, None] * E_)
        v_ = tile(v + row * v_step + head * V, v_step, tokens, columns, left, V).to(tl.float32)
        corrected += tl.sum(E_ * v_, 1)
        Z_ = tl.trans(tile(Z + pid * (C * V), V, tokens, columns, C, V)).to(DOT)
        d_ = tile(d_o + (row * H + head) * V, H * V, tokens, columns, left, V).to(DOT)
        taken = tl.dot(E_.to(DOT), Z_, acc=taken, input_precision=PRECISION)
        seen = tl.dot(d_, Z_, acc=seen, input_precision=PRECISION)
    taken = tl.where(later > earlier, taken, 0.0)
    tl.store(W + square, (taken + tl.trans(taken)).to(W.dtype.element_ty))
    seen = tl.where(later >= earlier, seen, 0.0)
    seen = tl.where(later >= earlier, seen, tl.trans(seen))
    tl.store(d_P + square, seen.to(d_P.dtype.element_ty))
    tl.store(d_beta + at, corrected, mask=tokens < left)


@triton.jit(do_not_specialize=["T", "N"])
def gradients(
    q, k, g, beta, starts, d_o, states, Z, d_states, E, W, d_P, dq, dk, dg, d_beta, T, N, q_step, k_step,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of a chunk and BK key channels, and their share of d_beta [slices of K, B, T, H].

    Programs: slices of K times B H N.
    """
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (K + BK - 1) // BK
    part, chunk = pid % slices, pid // slices
    n, batch, head = chunk % N, chunk // N // H, chunk // N % H
    tokens, keys = tl.arange(0, C), part.to(tl.int32) * BK + tl.arange(0, BK)
    later, earlier = tokens[:, None], tokens[None, :]
    row, left = batch * T + n * C, T - n * C
    q += row * q_step + head * K
    k += row * k_step + head * K
    d_o += (row * H + head) * V
    W, d_P, square = W + chunk * (C * C), d_P + chunk * (C * C), later * C + earlier
    coarse, fine, all_coarse, all_fine = sums(g, starts, row, head, left, tokens, keys, H, K)
    b = tl.load(beta + (row + tokens) * H + head, mask=tokens < left, other=0.0).to(tl.float32)[:, None]
    dq_, dk_, read = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    across = tl.zeros([BK], tl.float32)
    for begin in range(0, V, BV):
        columns = begin + tl.arange(0, BV)
        S_ = tile(states + chunk * (V * K), K, columns, keys, V, K)
        M_ = tile(d_states + chunk * (V * K), K, columns, keys, V, K)
        across += tl.sum(S_.to(tl.float32) * M_.to(tl.float32), 0)
        d_ = tile(d_o, H * V, tokens, columns, left, V).to(DOT)
        dq_ = tl.dot(d_, S_.to(DOT), acc=dq_, input_precision=PRECISION)
        E_ = tile(E + chunk * (C * V), V, tokens, columns, C, V).to(DOT)
        read = tl.dot(E_, S_.to(DOT), acc=read, input_precision=PRECISION)
        Z_ = tile(Z + chunk * (C * V), V, tokens, columns, C, V).to(DOT)
        dk_ = tl.dot(Z_, M_.to(DOT), acc=dk_, input_precision=PRECISION)
    q_ = tile(q, q_step, tokens, keys, left, K).to(tl.float32)
    k_ = tile(k, k_step, tokens, keys, left, K).to(tl.float32)
    fades = fall(coarse, fine)
    dq_ *= fades
    read *= -fades
    dk_ *= fall(all_coarse[None, :] - coarse, all_fine[None, :] - fine)
    stepped = tl.sum(k_ * read, 1)
    read *= b
    dg_ = tl.zeros([C, BK], tl.float32) + (across * fall(all_coarse, all_fine))[None, :]
    dg_ = tl.dot((earlier < later).to(DOT), (k_ * dk_).to(DOT), acc=dg_, input_precision=PRECISION)
    asked = (q_ * dq_ + k_ * read).to(DOT)
    dg_ = tl.dot((earlier >= later).to(DOT), asked, acc=dg_, input_precision=PRECISION)
    dk_ += read
    same = tl.load(d_P + tokens * (C + 1)).to(tl.float32)[:, None]
    dq_ += same * k_
    dk_ += same * q_
    for level in range(LEVELS):
        decay = halves(coarse, fine, tokens, level, BK)
        second, pairs = (later >> level) & 1 != 0, (later ^ earlier) >> level == 1
        q_ = tile(q, q_step, tokens, keys, left, K).to(tl.float32)  # again: registers are short
        k_ = tile(k, k_step, tokens, keys, left, K).to(tl.float32)
        mine = tl.where(second, q_, k_)
        seen = tl.where(pairs, tl.load(d_P + square), 0.0).to(DOT)
        more = tl.dot(seen, (mine * decay).to(DOT), input_precision=PRECISION) * decay
        dq_ += tl.where(second, more, 0.0)
        dk_ += tl.where(second, 0.0, more)
        passed = mine * more
        weight = tl.where(second, b, 1.0)
        taken = tl.where(pairs, tl.load(W + square), 0.0).to(DOT)
        more = tl.dot(taken, (weight * k_ * decay).to(DOT), input_precision=PRECISION) * -decay
        stepped += tl.sum(tl.where(second, k_ * more, 0.0), 1)
        dk_ += weight * more
        passed += weight * k_ * more
        between = (later >> level == earlier >> level) & tl.where(second, earlier >= later, earlier < later)
        dg_ = tl.dot(between.to(DOT), passed.to(DOT), acc=dg_, input_precision=PRECISION)
    put(dq + (row * H + head) * K, H * K, tokens, keys, left, K, dq_)
    put(dk + (row * H + head) * K, H * K, tokens, keys, left, K, dk_)
    put(dg + (row * H + head) * K, H * K, tokens, keys, left, K, dg_)
    share = part * (tl.num_programs(0) // slices // N) * T
    tl.store(d_beta + share + (row + tokens) * H + head, stepped, mask=tokens < left)
