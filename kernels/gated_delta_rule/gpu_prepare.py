"""All of a chunk that needs no memory, every chunk for itself: how its tokens fade, see and undo each other.

A = (I + diag(beta) L)^-1 - I      P = Q K^T * D      and e, f, beta by head     (letters: `chunked.py`)
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import inverse


@triton.jit
def documents(starts_ptr, first, inside, C: tl.constexpr):
    """Of a chunk's tokens: whether a document starts there, and how many have started in the chunk up to there."""
    c = tl.arange(0, C)
    begins = c < 0
    if starts_ptr is not None:
        begins = tl.load(starts_ptr + first + c, mask=inside, other=0).to(tl.int32) > 0
    return begins, tl.cumsum(begins.to(tl.int32), 0)


@triton.jit
def decays(g_ptr, inside, begins, document, C: tl.constexpr):
    """The running sum of log decays, in two parts of which differences are exact; e; f. After the last token 0."""
    g = tl.load(g_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(begins, 0.0, tl.where(g < -1000.0, -1000.0, g))  # a start forgets; exp(-1000) is 0 as well
    c = tl.arange(0, C)
    opening = tl.sum(tl.where(c == 0, g, 0.0), 0)  # apart, as only e has it: the rest has the same bits after a start
    total = tl.cumsum(tl.where(c == 0, 0.0, g).to(tl.float64), 0)
    coarse = total.to(tl.float32)
    fine = (total - coarse.to(tl.float64)).to(tl.float32)
    end = tl.sum(tl.where(c == C - 1, total, 0.0), 0)
    e = tl.exp(tl.where(inside & (document == 0), (total + opening).to(tl.float32), float("-inf")))
    f = tl.exp(tl.where(inside & (document == tl.max(document, 0)), (end - total).to(tl.float32), float("-inf")))
    return coarse, fine, e, f


@triton.jit
def fading(coarse, fine, document, C: tl.constexpr):
    """D [C, C]."""
    c = tl.arange(0, C)
    seen = (c[:, None] >= c[None, :]) & (document[:, None] == document[None, :])
    change = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.exp(tl.where(seen, change, float("-inf")))


@triton.jit(do_not_specialize=["T", "N"])
def _prepare(
    q_ptr,
    k_ptr,
    g_ptr,
    beta_ptr,
    starts_ptr,
    A_ptr,
    P_ptr,
    e_ptr,
    f_ptr,
    b_ptr,
    T,
    N,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    INVERSE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One chunk of one key head, for all its value heads; A only where INVERSE. WIDE: the inverse's precision."""
    pid = tl.program_id(0).to(tl.int64)
    n, b, h = pid % N, pid // N // H, pid // N % H
    c, w = tl.arange(0, C), tl.arange(0, BK)
    first = b * T + n * C  # the chunk's first token
    inside = n * C + c < T
    begins, document = documents(starts_ptr, first, inside, C)
    in_k = inside[:, None] & (w[None, :] < K)
    q = tl.load(q_ptr + first * Q_ROW + h * K + (c[:, None] * Q_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
    k = tl.load(k_ptr + first * K_ROW + h * K + (c[:, None] * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if INVERSE:
        kk = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    for j in range(HV // H):
        head = h * (HV // H) + j
        at = first * HV + head + c * HV
        coarse, fine, e, f = decays(g_ptr + at, inside, begins, document, C)
        D = fading(coarse, fine, document, C)
        beta = tl.load(beta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        chunk = (b * HV + head) * N + n
        tl.store(e_ptr + chunk * C + c, e)
        tl.store(f_ptr + chunk * C + c, f)
        tl.store(b_ptr + chunk * C + c, beta)
        square = chunk * (C * C) + (c[:, None] * C + c[None, :])
        tl.store(P_ptr + square, (qk * D).to(P_ptr.dtype.element_ty))
        if INVERSE:
            L = tl.where(c[:, None] > c[None, :], kk * D, 0.0)
            tl.store(A_ptr + square, inverse(beta[:, None] * L, C, LEVELS, WIDE).to(A_ptr.dtype.element_ty))
