"""Triton kernels of the momentum delta rule: what a chunk holds before any memory, and the pass in time.

Letters are those of `chunked.py`, of a chunk's tokens i, j, s from 0: with a_i, u_i the decays of S and N from the
chunk's start through token i, A_is those over tokens s + 1 .. i - 1 (what a token meets) and U_sj over j + 1 .. s,

    before_ij = sum_s A_is beta_s U_sj          after_ij = alpha_i before_ij + beta_i U_ij

At a start both logs are -inf, and nowhere else. All decays are exponents of sums of logs, never of differences of sums.
"""

import triton
import triton.language as tl


@triton.jit
def fading(log_alpha, log_mu, beta, b, h, begin, T, HV: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """A, U and before [C, C]; and [C]: alpha, beta, a before each token, u, before of N, and 0 at starts, else 1."""
    i, j, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], tl.arange(0, C)
    at, inside = (b * T + begin) * HV + h + c * HV, begin + c < T
    la, lm = tl.load(log_alpha + at, mask=inside, other=0.0), tl.load(log_mu + at, mask=inside, other=0.0)
    past = tl.load(log_alpha + at - HV, mask=(c > 0) & (begin + c <= T), other=0.0)  # of the token before
    beta_ = tl.load(beta + at, mask=inside, other=0.0)
    A = tl.where(j < i, tl.exp(tl.cumsum(tl.where(j < i - 1, past[:, None], 0.0), 0)), 0.0)
    U = tl.where(j <= i, tl.exp(tl.cumsum(tl.where(j < i, lm[:, None], 0.0), 0)), 0.0)
    before = tl.dot(A, beta_[:, None] * U, input_precision=EXACT)
    a, u = tl.exp(tl.cumsum(past, 0)), tl.exp(tl.cumsum(lm, 0))
    before_N = tl.sum(A * tl.expand_dims(beta_ * u, 0), 1)
    return A, U, before, tl.exp(la), beta_, a, u, before_N, tl.where(la == float("-inf"), 0.0, 1.0)


@triton.jit(do_not_specialize=["T"])
def prepare(
    q, k, p, log_alpha, log_mu, beta, eta, inverse, scores, coefficients, T,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, SQ: tl.constexpr, SK: tl.constexpr,
    SP: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """inverse, scores [B, HV, chunks, C, C] and coefficients [B, HV, chunks, 7, C] of a chunk.

    Coefficients: of asking S and N, of reading S and N, of writing to S and to N until the chunk's end, and u.
    inverse: (I + diag(eta) L)^-1, by blocks of 2, 4, .. C tokens, STEPS = log2(C). SQ, SK, SP: strides of a token.
    """
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, chunks, c = bh // HV, bh % HV, tl.cdiv(T, C), tl.arange(0, C)
    i, j, valid, token = c[:, None], c[None, :], n * C + c < T, b * T + n * C
    A, U, before, alpha, beta_, a, u, before_N, goes_on = fading(log_alpha, log_mu, beta, b, h, n * C, T, HV, C, EXACT)
    eta_ = tl.load(eta + token * HV + h + c * HV, mask=valid, other=0.0)
    q += token * SQ + (h // (HV // H)) * K
    k += token * SK + (h // (HV // H)) * K
    p += token * SP + (h // (HV // HP)) * K
    L, P = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for x in range(0, K, BK):
        kk = x + tl.arange(0, BK)
        seen = valid[:, None] & (kk < K)[None, :]
        keys = tl.trans(tl.load(k + c[:, None] * SK + kk[None, :], mask=seen, other=0.0).to(DOT))
        q_ = tl.load(q + c[:, None] * SQ + kk[None, :], mask=seen, other=0.0).to(DOT)
        p_ = tl.load(p + c[:, None] * SP + kk[None, :], mask=seen, other=0.0).to(DOT)
        P = tl.dot(q_, keys, P, input_precision=PRECISION)
        L = tl.dot(p_, keys, L, input_precision=PRECISION)
    after = alpha[:, None] * before + beta_[:, None] * U
    P *= after
    L *= before * (eta_ * goes_on)[:, None]
    W = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -L, 0.0))
    for step in tl.static_range(1, STEPS):
        below = tl.where((i >> (step + 1) == j >> (step + 1)) & (i >> step != j >> step), L, 0.0)
        W -= tl.dot(tl.dot(W, below, input_precision=EXACT), W, input_precision=EXACT)
    at, chunk = i * C + j, bh * chunks + n
    tl.store(inverse + chunk * C * C + at, W.to(inverse.dtype.element_ty))
    tl.store(scores + chunk * C * C + at, P.to(scores.dtype.element_ty))
    to, last = coefficients + chunk * 7 * C + tl.arange(0, C), i == C - 1
    tl.store(to, a * goes_on)
    tl.store(to + C, before_N * goes_on)
    tl.store(to + 2 * C, alpha * a)
    tl.store(to + 3 * C, alpha * before_N + beta_ * u)
    tl.store(to + 4 * C, tl.sum(tl.where(last, after, 0.0), 0))
    tl.store(to + 5 * C, tl.sum(tl.where(last, U, 0.0), 0))
    tl.store(to + 6 * C, u)


@triton.jit(do_not_specialize=["T"])
def scan(
    q, k, v, p, eta, inverse, scores, coefficients, first, out, last, kept, written, T,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SQ: tl.constexpr,
    SK: tl.constexpr, SV: tl.constexpr, SP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of both memories through all chunks.

    out [B, T, HV, V] and last [B, HV, 2, K, V], where they are wanted; or kept [B, HV, chunks, 2, K, V], S and N at
    each chunk's start, and written = Z [B, T, HV, V].
    """
    d, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, chunks = bh // HV, bh % HV, tl.cdiv(T, C)
    c, kk, vv = tl.arange(0, C), tl.arange(0, BK), d * BV + tl.arange(0, BV)
    memory, fits = kk[:, None] * V + vv[None, :], (kk < K)[:, None] & (vv < V)[None, :]
    at, square = c[:, None] * (HV * V) + vv[None, :], c[:, None] * C + c[None, :]
    q += b * T * SQ + (h // (HV // H)) * K
    k += b * T * SK + (h // (HV // H)) * K
    p += b * T * SP + (h // (HV // HP)) * K
    v += b * T * SV + h * V
    eta += b * T * HV + h
    if first is None:
        S, N = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32)
    else:
        S = tl.load(first + bh * 2 * K * V + memory, mask=fits, other=0.0)
        N = -tl.load(first + (bh * 2 + 1) * K * V + memory, mask=fits, other=0.0)
    for n in range(0, chunks):
        token, chunk = b * 0 + n * C, bh * chunks + n  # in 64 bits
        valid = n * C + c < T
        seen, here = valid[:, None] & (kk < K)[None, :], valid[:, None] & (vv < V)[None, :]
        k_ = tl.load(k + token * SK + (c[:, None] * SK + kk[None, :]), mask=seen, other=0.0).to(DOT)
        p_ = tl.load(p + token * SP + (c[:, None] * SP + kk[None, :]), mask=seen, other=0.0).to(DOT)
        v_ = tl.load(v + token * SV + (c[:, None] * SV + vv[None, :]), mask=here, other=0.0).to(tl.float32)
        W = tl.load(inverse + chunk * C * C + square).to(DOT)
        eta_ = tl.load(eta + token * HV + c * HV, mask=valid, other=0.0)[:, None]
        from_ = coefficients + chunk * 7 * C
        to_S, to_N = tl.load(from_ + 4 * C + c)[:, None], tl.load(from_ + 5 * C + c)[:, None]
        S_, N_ = S.to(DOT), N.to(DOT)
        if kept is not None:
            tl.store(kept + chunk * 2 * K * V + memory, S_, mask=fits)
            tl.store(kept + (chunk * 2 + 1) * K * V + memory, N_, mask=fits)
        X = tl.load(from_ + c)[:, None] * tl.dot(p_, S_, input_precision=PRECISION)
        X += tl.load(from_ + C + c)[:, None] * tl.dot(p_, N_, input_precision=PRECISION)
        Z = tl.dot(W, (eta_ * (v_ - X)).to(DOT), input_precision=PRECISION)
        to = ((b * T + n * C) * HV + h) * V
        if kept is not None:
            tl.store(written + to + at, Z.to(written.dtype.element_ty), mask=here)
        else:
            q_ = tl.load(q + token * SQ + (c[:, None] * SQ + kk[None, :]), mask=seen, other=0.0).to(DOT)
            P = tl.load(scores + chunk * C * C + square).to(DOT)
            o = tl.load(from_ + 2 * C + c)[:, None] * tl.dot(q_, S_, input_precision=PRECISION)
            o += tl.load(from_ + 3 * C + c)[:, None] * tl.dot(q_, N_, input_precision=PRECISION)
            o = tl.dot(P, Z.to(DOT), o, input_precision=PRECISION)
            tl.store(out + to + at, o.to(out.dtype.element_ty), mask=here)
        a, g, u = tl.load(from_ + 3 * C - 1), tl.load(from_ + 4 * C - 1), tl.load(from_ + 7 * C - 1)
        keys = tl.trans(k_)
        S = tl.dot(keys, (to_S * Z).to(DOT), a * S + g * N, input_precision=PRECISION)
        N = tl.dot(keys, (to_N * Z).to(DOT), u * N, input_precision=PRECISION)
    if last is not None:
        tl.store(last + bh * 2 * K * V + memory, S, mask=fits)
        tl.store(last + (bh * 2 + 1) * K * V + memory, -N, mask=fits)


@triton.jit(do_not_specialize=["T"])
def outputs(
    q, scores, coefficients, kept, written, out, T,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SQ: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, T, HV, V] of one chunk and BV columns, from what `scan` kept and wrote."""
    n, bh, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h, chunk = bh // HV, bh % HV, bh * tl.cdiv(T, C) + n
    c, vv = tl.arange(0, C), d * BV + tl.arange(0, BV)
    token, valid = b * T + n * C, (n * C + c < T)[:, None]
    at, here = c[:, None] * (HV * V) + vv[None, :], valid & (vv < V)[None, :]
    q += token * SQ + (h // (HV // H)) * K
    kept += chunk * 2 * K * V
    from_S, from_N = tl.zeros([C, BV], tl.float32), tl.zeros([C, BV], tl.float32)
    for x in range(0, K, BK):
        kk = x + tl.arange(0, BK)
        memory, fits = kk[:, None] * V + vv[None, :], (kk < K)[:, None] & (vv < V)[None, :]
        q_ = tl.load(q + c[:, None] * SQ + kk[None, :], mask=valid & (kk < K)[None, :], other=0.0).to(DOT)
        S, N = tl.load(kept + memory, mask=fits, other=0.0), tl.load(kept + K * V + memory, mask=fits, other=0.0)
        from_S = tl.dot(q_, S.to(DOT), from_S, input_precision=PRECISION)
        from_N = tl.dot(q_, N.to(DOT), from_N, input_precision=PRECISION)
    P = tl.load(scores + chunk * C * C + c[:, None] * C + c[None, :]).to(DOT)
    Z = tl.load(written + (token * HV + h) * V + at, mask=here, other=0.0).to(DOT)
    read = coefficients + chunk * 7 * C + 2 * C + c
    o = tl.load(read)[:, None] * from_S + tl.load(read + C)[:, None] * from_N
    o = tl.dot(P, Z, o, input_precision=PRECISION)
    tl.store(out + (token * HV + h) * V + at, o.to(out.dtype.element_ty), mask=here)
