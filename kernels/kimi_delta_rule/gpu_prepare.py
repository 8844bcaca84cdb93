"""All of a chunk that needs no memory, every chunk for itself: how its tokens fade, see and undo each other.

    A = (I + diag(beta) L)^-1 - I      P, L, e, f: `chunked.py`; its sums by halves: `kernels/gpu/tiles.py`
    reads = e Q      writes = f K      erases = (I + A) beta e K      values = (I + A) beta V

so that with the memory S at the chunk's start what its tokens write is Z = values - erases S.
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import channel_log, fall, halves, inverse, put, tile, two


@triton.jit
def sums(g, starts, row, head, left, tokens, keys, H: tl.constexpr, K: tl.constexpr):
    """Of a chunk's log decays as two numbers: sums up to each token [C, keys], and of all [keys]."""
    coarse, fine = two(channel_log(g, starts, row, head, left, tokens, keys, H, K))
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit(do_not_specialize=["T", "N"])
def prepare(
    q, k, v, g, beta, starts, A, P, reads, writes, erases, values, keep, T, N, q_step, k_step, v_step,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, INVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A, P [B, H, N, C, C]; reads, writes, erases [B, H, N, C, K]; values [B, H, N, C, V]; keep [B, H, N, K].

    A is made where INVERSE, else read. WIDE: the inverse's precision. Programs: B H N.
    """
    pid = tl.program_id(0).to(tl.int64)
    n, batch, head = pid % N, pid // N // H, pid // N % H
    tokens = tl.arange(0, C)
    later, earlier = tokens[:, None], tokens[None, :]
    row, left = batch * T + n * C, T - n * C
    q += row * q_step + head * K
    k += row * k_step + head * K
    v += row * v_step + head * V
    b = tl.load(beta + (row + tokens) * H + head, mask=tokens < left, other=0.0).to(tl.float32)[:, None]
    seen, undone = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for begin in range(0, K, BK):
        keys = begin + tl.arange(0, BK)
        coarse, fine, all_coarse, all_fine = sums(g, starts, row, head, left, tokens, keys, H, K)
        q_ = tile(q, q_step, tokens, keys, left, K).to(tl.float32)
        k_ = tile(k, k_step, tokens, keys, left, K).to(tl.float32)
        put(reads + pid * C * K, K, tokens, keys, C, K, q_ * fall(coarse, fine))
        rest = fall(all_coarse[None, :] - coarse, all_fine[None, :] - fine)
        put(writes + pid * C * K, K, tokens, keys, C, K, k_ * rest)
        tl.store(keep + pid * K + keys, fall(all_coarse, all_fine), mask=keys < K)
        seen += tl.where(later == earlier, tl.sum(q_ * k_, 1)[:, None], 0.0)
        for level in range(LEVELS):
            decay = halves(coarse, fine, tokens, level, BK)
            faded = k_ * decay
            x, y = tl.where((later >> level) & 1 != 0, q_ * decay, faded).to(DOT), faded.to(DOT)
            pairs = (later ^ earlier) >> level == 1
            seen += tl.where(pairs, tl.dot(x, tl.trans(y), input_precision=PRECISION), 0.0)
            if INVERSE:
                undone += tl.where(pairs, tl.dot(y, tl.trans(y), input_precision=PRECISION), 0.0)
    square = pid * (C * C) + later * C + earlier
    seen = tl.where(later >= earlier, seen, 0.0)  # above are products of other pairs
    tl.store(P + square, seen.to(P.dtype.element_ty))
    if INVERSE:
        A_ = inverse(tl.where(later > earlier, b * undone, 0.0), C, LEVELS, WIDE)
        tl.store(A + square, A_.to(A.dtype.element_ty))
    else:
        A_ = tl.load(A + square)
    A_ = A_.to(DOT)
    for begin in range(0, K, BK):
        keys = begin + tl.arange(0, BK)
        coarse, fine, _, _ = sums(g, starts, row, head, left, tokens, keys, H, K)
        x = b * fall(coarse, fine) * tile(k, k_step, tokens, keys, left, K).to(tl.float32)
        x = tl.dot(A_, x.to(DOT), acc=x, input_precision=PRECISION)
        put(erases + pid * C * K, K, tokens, keys, C, K, x)
    for begin in range(0, V, BV):
        columns = begin + tl.arange(0, BV)
        x = b * tile(v, v_step, tokens, columns, left, V).to(tl.float32)
        x = tl.dot(A_, x.to(DOT), acc=x, input_precision=PRECISION)
        put(values + pid * C * V, V, tokens, columns, C, V, x)
