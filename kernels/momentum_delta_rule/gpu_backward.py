"""Triton kernels of the momentum delta rule's backward: the pass against time, and what is left, chunk by chunk.

With E = W^T (P^T dO + to_S k dS' + to_N k dN') of a chunk, ' after it, the error's gradient is dV = eta E, and the rest
are products of E, Z and dO with the memories and their gradients. Derivation: `chunked.py`.
"""

import triton
import triton.language as tl

from seqzoo.kernels.momentum_delta_rule.gpu_forward import fading


@triton.jit(do_not_specialize=["T"])
def back(
    q, k, p, d_o, eta, inverse, scores, coefficients, d_last, d_first, d_kept, errors, T,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SQ: tl.constexpr,
    SK: tl.constexpr, SP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of both memories' gradients against time.

    d_kept [B, HV, chunks, 2, K, V]: those after each chunk. errors = E [B, T, HV, V]. d_first [B, HV, 2, K, V].
    """
    d, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, chunks = bh // HV, bh % HV, tl.cdiv(T, C)
    c, kk, vv = tl.arange(0, C), tl.arange(0, BK), d * BV + tl.arange(0, BV)
    memory, fits = kk[:, None] * V + vv[None, :], (kk < K)[:, None] & (vv < V)[None, :]
    at, square = c[:, None] * (HV * V) + vv[None, :], c[:, None] * C + c[None, :]
    q += b * T * SQ + (h // (HV // H)) * K
    k += b * T * SK + (h // (HV // H)) * K
    p += b * T * SP + (h // (HV // HP)) * K
    eta += b * T * HV + h
    if d_last is None:
        S, N = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32)
    else:
        S = tl.load(d_last + bh * 2 * K * V + memory, mask=fits, other=0.0)
        N = -tl.load(d_last + (bh * 2 + 1) * K * V + memory, mask=fits, other=0.0)
    for m in range(0, chunks):
        n = chunks - 1 - m
        token, chunk = b * 0 + n * C, bh * chunks + n  # in 64 bits
        valid, to = n * C + c < T, ((b * T + n * C) * HV + h) * V
        seen, here = valid[:, None] & (kk < K)[None, :], valid[:, None] & (vv < V)[None, :]
        q_ = tl.load(q + token * SQ + (c[:, None] * SQ + kk[None, :]), mask=seen, other=0.0).to(DOT)
        k_ = tl.load(k + token * SK + (c[:, None] * SK + kk[None, :]), mask=seen, other=0.0).to(DOT)
        p_ = tl.load(p + token * SP + (c[:, None] * SP + kk[None, :]), mask=seen, other=0.0).to(DOT)
        from_o = tl.load(d_o + to + at, mask=here, other=0.0)
        W = tl.load(inverse + chunk * C * C + square).to(DOT)
        P = tl.load(scores + chunk * C * C + square).to(DOT)
        eta_ = tl.load(eta + token * HV + c * HV, mask=valid, other=0.0)[:, None]
        from_ = coefficients + chunk * 7 * C
        ask_S, ask_N = tl.load(from_ + c)[:, None], tl.load(from_ + C + c)[:, None]
        read_S, read_N = tl.load(from_ + 2 * C + c)[:, None], tl.load(from_ + 3 * C + c)[:, None]
        to_S, to_N = tl.load(from_ + 4 * C + c)[:, None], tl.load(from_ + 5 * C + c)[:, None]
        S_, N_ = S.to(DOT), N.to(DOT)
        tl.store(d_kept + chunk * 2 * K * V + memory, S_, mask=fits)
        tl.store(d_kept + (chunk * 2 + 1) * K * V + memory, N_, mask=fits)
        E = to_S * tl.dot(k_, S_, input_precision=PRECISION) + to_N * tl.dot(k_, N_, input_precision=PRECISION)
        E = tl.dot(tl.trans(P), from_o.to(DOT), E, input_precision=PRECISION)
        E = tl.dot(tl.trans(W), E.to(DOT), input_precision=PRECISION)
        tl.store(errors + to + at, E.to(errors.dtype.element_ty), mask=here)
        a, g, u = tl.load(from_ + 3 * C - 1), tl.load(from_ + 4 * C - 1), tl.load(from_ + 7 * C - 1)
        queries, asked, from_v = tl.trans(q_), tl.trans(p_), -eta_ * E
        N = tl.dot(queries, (read_N * from_o).to(DOT), g * S + u * N, input_precision=PRECISION)
        N = tl.dot(asked, (ask_N * from_v).to(DOT), N, input_precision=PRECISION)
        S = tl.dot(queries, (read_S * from_o).to(DOT), a * S, input_precision=PRECISION)
        S = tl.dot(asked, (ask_S * from_v).to(DOT), S, input_precision=PRECISION)
    tl.store(d_first + bh * 2 * K * V + memory, S, mask=fits)
    tl.store(d_first + (bh * 2 + 1) * K * V + memory, -N, mask=fits)


@triton.jit
def _spanned(x, shift: tl.constexpr, C: tl.constexpr):
    """Gradient of log decays over tokens j + 1 .. i - shift [C, C] -> of each token's [C]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    of_next = tl.sum(tl.where(i > j + shift, tl.cumsum(x, 1), 0.0), 0)  # of token j + 1
    return tl.sum(tl.where(i == j + 1, tl.expand_dims(of_next, 0), 0.0), 1)


@triton.jit(do_not_specialize=["T"])
def pairs(
    q, k, p, log_alpha, log_mu, beta, eta, d_o, written, errors, out, T,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SQ: tl.constexpr,
    SK: tl.constexpr, SP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of a chunk's pairs of tokens, out [B, HV, chunks, 4, C, C]: gradients of P K^T and of Q K^T, each after dV or dO
    Z^T times the decays; and for `gates` E Z^T times P K^T, and dO Z^T times Q K^T.
    """
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, chunk = bh // HV, bh % HV, bh * tl.cdiv(T, C) + n
    c = tl.arange(0, C)
    token, inside = b * T + n * C, n * C + c < T
    valid, rows = inside[:, None], c[:, None] * (HV * V)
    for_V, for_keys = (token * HV + h) * V, (h // (HV // H)) * K
    errors, written, d_o = errors + for_V, written + for_V, d_o + for_V
    q, k, p = q + token * SQ + for_keys, k + token * SK + for_keys, p + token * SP + (h // (HV // HP)) * K
    EZ, OZ = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for y in range(0, V, BV):
        vv = y + tl.arange(0, BV)
        here = valid & (vv < V)[None, :]
        Z = tl.trans(tl.load(written + rows + vv[None, :], mask=here, other=0.0).to(DOT))
        E = tl.load(errors + rows + vv[None, :], mask=here, other=0.0).to(DOT)
        from_o = tl.load(d_o + rows + vv[None, :], mask=here, other=0.0).to(DOT)
        EZ = tl.dot(E, Z, EZ, input_precision=PRECISION)
        OZ = tl.dot(from_o, Z, OZ, input_precision=PRECISION)
    pk, qk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for x in range(0, K, BK):
        kk = x + tl.arange(0, BK)
        seen = valid & (kk < K)[None, :]
        keys = tl.trans(tl.load(k + c[:, None] * SK + kk[None, :], mask=seen, other=0.0).to(DOT))
        p_ = tl.load(p + c[:, None] * SP + kk[None, :], mask=seen, other=0.0).to(DOT)
        q_ = tl.load(q + c[:, None] * SQ + kk[None, :], mask=seen, other=0.0).to(DOT)
        pk = tl.dot(p_, keys, pk, input_precision=PRECISION)
        qk = tl.dot(q_, keys, qk, input_precision=PRECISION)
    out += chunk * 4 * C * C + c[:, None] * C + c[None, :]
    tl.store(out + 2 * C * C, (EZ * pk).to(out.dtype.element_ty))
    tl.store(out + 3 * C * C, (OZ * qk).to(out.dtype.element_ty))
    A, U, before, alpha, beta_, a, u, before_N, goes_on = fading(log_alpha, log_mu, beta, b, h, n * C, T, HV, C, EXACT)
    eta_ = tl.load(eta + token * HV + h + c * HV, mask=inside, other=0.0) * goes_on
    tl.store(out, (-eta_[:, None] * before * EZ).to(out.dtype.element_ty))
    tl.store(out + C * C, ((alpha[:, None] * before + beta_[:, None] * U) * OZ).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def gradients(
    q, k, p, eta, coefficients, pairs, d_o, kept, d_kept, written, errors, d_q, d_k, d_p, met, T,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SQ: tl.constexpr,
    SK: tl.constexpr, SP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk: d_q, d_k, d_p [B, T, HV, K] by value head, and met [B, HV, chunks, 7, C] for `gates`.

    met: of each token p . E S^T, p . E N^T, q . dO S^T, q . dO N^T, k . Z dS^T, k . Z dN^T; and at 0, 1 and 2 of the
    last row the sums of dS S, dS N and dN N.
    """
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, chunk = bh // HV, bh % HV, bh * tl.cdiv(T, C) + n
    c = tl.arange(0, C)
    token, inside = b * T + n * C, n * C + c < T
    valid, rows = inside[:, None], c[:, None] * (HV * V)
    for_V, for_K, for_keys = (token * HV + h) * V, (token * HV + h) * K, (h // (HV // H)) * K
    errors, written, d_o = errors + for_V, written + for_V, d_o + for_V
    q, k, p = q + token * SQ + for_keys, k + token * SK + for_keys, p + token * SP + (h // (HV // HP)) * K
    kept, d_kept, pairs = kept + chunk * 2 * K * V, d_kept + chunk * 2 * K * V, pairs + chunk * 4 * C * C
    d_q, d_k, d_p, square = d_q + for_K, d_k + for_K, d_p + for_K, c[:, None] * C + c[None, :]
    from_ = coefficients + chunk * 7 * C + c
    from_v = -tl.load(eta + token * HV + h + c * HV, mask=inside, other=0.0)
    ask_S, ask_N, read_S = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    read_N, write_S, write_N = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    keep_SS, keep_SN, keep_NN = 0.0, 0.0, 0.0
    for x in range(0, K, BK):
        kk = x + tl.arange(0, BK)
        seen = valid & (kk < K)[None, :]
        ES, EN = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        OS, ON = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        ZS, ZN = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for y in range(0, V, BV):
            vv = y + tl.arange(0, BV)
            here = valid & (vv < V)[None, :]
            memory, fits = kk[None, :] * V + vv[:, None], (kk < K)[None, :] & (vv < V)[:, None]  # transposed
            E = tl.load(errors + rows + vv[None, :], mask=here, other=0.0).to(DOT)
            Z = tl.load(written + rows + vv[None, :], mask=here, other=0.0).to(DOT)
            from_o = tl.load(d_o + rows + vv[None, :], mask=here, other=0.0).to(DOT)
            S = tl.load(kept + memory, mask=fits, other=0.0)
            N = tl.load(kept + K * V + memory, mask=fits, other=0.0)
            d_S = tl.load(d_kept + memory, mask=fits, other=0.0)
            d_N = tl.load(d_kept + K * V + memory, mask=fits, other=0.0)
            ES = tl.dot(E, S.to(DOT), ES, input_precision=PRECISION)
            EN = tl.dot(E, N.to(DOT), EN, input_precision=PRECISION)
            OS = tl.dot(from_o, S.to(DOT), OS, input_precision=PRECISION)
            ON = tl.dot(from_o, N.to(DOT), ON, input_precision=PRECISION)
            ZS = tl.dot(Z, d_S.to(DOT), ZS, input_precision=PRECISION)
            ZN = tl.dot(Z, d_N.to(DOT), ZN, input_precision=PRECISION)
            keep_SS += tl.sum(d_S.to(tl.float32) * S.to(tl.float32))
            keep_SN += tl.sum(d_S.to(tl.float32) * N.to(tl.float32))
            keep_NN += tl.sum(d_N.to(tl.float32) * N.to(tl.float32))
        to = c[:, None] * (HV * K) + kk[None, :]
        q_ = tl.load(q + c[:, None] * SQ + kk[None, :], mask=seen, other=0.0)
        k_ = tl.load(k + c[:, None] * SK + kk[None, :], mask=seen, other=0.0)
        p_ = tl.load(p + c[:, None] * SP + kk[None, :], mask=seen, other=0.0)
        ask_S += tl.sum(ES * p_, 1)
        ask_N += tl.sum(EN * p_, 1)
        read_S += tl.sum(OS * q_, 1)
        read_N += tl.sum(ON * q_, 1)
        write_S += tl.sum(ZS * k_, 1)
        write_N += tl.sum(ZN * k_, 1)
        q_, k_, p_ = q_.to(DOT), k_.to(DOT), p_.to(DOT)
        # Products inside the chunk are masked before they are added: added to at once, they would dictate to all the
        # sums above how these lie in registers, with each number held by two warps.
        d_qk = tl.load(pairs + C * C + square).to(DOT)
        g = tl.where(seen, tl.dot(d_qk, k_, input_precision=PRECISION), 0.0)
        g += tl.load(from_ + 2 * C)[:, None] * OS + tl.load(from_ + 3 * C)[:, None] * ON
        tl.store(d_q + to, g.to(d_q.dtype.element_ty), mask=seen)
        d_pk = tl.load(pairs + square).to(DOT)
        g = tl.where(seen, tl.dot(d_pk, k_, input_precision=PRECISION), 0.0)
        g += (from_v * tl.load(from_))[:, None] * ES + (from_v * tl.load(from_ + C))[:, None] * EN
        tl.store(d_p + to, g.to(d_p.dtype.element_ty), mask=seen)
        g = tl.dot(tl.trans(d_pk), p_, input_precision=PRECISION)
        g = tl.where(seen, tl.dot(tl.trans(d_qk), q_, g, input_precision=PRECISION), 0.0)
        g += tl.load(from_ + 4 * C)[:, None] * ZS + tl.load(from_ + 5 * C)[:, None] * ZN
        tl.store(d_k + to, g.to(d_k.dtype.element_ty), mask=seen)
    met += chunk * 7 * C + c
    tl.store(met, ask_S)
    tl.store(met + C, ask_N)
    tl.store(met + 2 * C, read_S)
    tl.store(met + 3 * C, read_N)
    tl.store(met + 4 * C, write_S)
    tl.store(met + 5 * C, write_N)
    tl.store(met + 6 * C, tl.where(c == 0, keep_SS, tl.where(c == 1, keep_SN, keep_NN)))


@triton.jit(do_not_specialize=["T"])
def gates(
    v, log_alpha, log_mu, beta, eta, errors, pairs, met, d_v, d_log_alpha, d_log_mu, d_beta, d_eta, T,
    HV: tl.constexpr, V: tl.constexpr, SV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of one chunk: d_v [B, T, HV, V], and d_log_alpha, d_log_mu, d_beta and d_eta [B, T, HV].

    Two programs do it: one for alpha, eta and v, the other for mu and beta.
    """
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h, chunk = bh // HV, bh % HV, bh * tl.cdiv(T, C) + n
    c = tl.arange(0, C)
    token, inside, end = b * T + n * C, n * C + c < T, c == C - 1
    where, i, j = token * HV + h + c * HV, c[:, None], c[None, :]
    met += chunk * 7 * C
    pairs += chunk * 4 * C * C + 2 * C * C + i * C + j
    ask_S, ask_N = tl.load(met + c), tl.load(met + C + c)
    asked, d_after = tl.load(pairs).to(tl.float32), tl.load(pairs + C * C).to(tl.float32)
    A, U, before, alpha, beta_, a, u, before_N, goes_on = fading(log_alpha, log_mu, beta, b, h, n * C, T, HV, C, EXACT)
    eta_ = tl.load(eta + where, mask=inside, other=0.0)
    # Of what a token leaves: alpha times what it met, and beta U. At the chunk's end also of what is kept and written.
    d_after += tl.where(end[:, None], tl.load(met + 4 * C + c)[None, :], 0.0)
    d_after_N = tl.load(met + 3 * C + c) + tl.where(end, tl.load(met + 6 * C + 1), 0.0)
    d_before = d_after * alpha[:, None] - asked * (eta_ * goes_on)[:, None]
    d_before_N = d_after_N * alpha - eta_ * goes_on * ask_N
    # What it met: sums over s of A beta U.
    if tl.program_id(2) == 0:
        d_eta_ = -goes_on * (a * ask_S + before_N * ask_N + tl.sum(asked * before, 1))
        errors, d_v, v = errors + (token * HV + h) * V, d_v + (token * HV + h) * V, v + token * SV + h * V
        for y in range(0, V, BV):
            vv = y + tl.arange(0, BV)
            at, here = i * (HV * V) + vv[None, :], inside[:, None] & (vv < V)[None, :]
            E = tl.load(errors + at, mask=here, other=0.0).to(tl.float32)
            d_eta_ += tl.sum(E * tl.load(v + i * SV + vv[None, :], mask=here, other=0.0).to(tl.float32), 1)
            tl.store(d_v + at, (eta_[:, None] * E).to(d_v.dtype.element_ty), mask=here)
        tl.store(d_eta + where, d_eta_, mask=inside)
        d_a = tl.load(met + 2 * C + c) + tl.where(end, tl.load(met + 6 * C), 0.0)
        d_la = alpha * (tl.sum(d_after * before, 1) + d_a * a + d_after_N * before_N)  # a start's alpha is 0
        through_a = (d_a * alpha - eta_ * goes_on * ask_S) * a
        d_la += tl.sum(tl.where(i < j, tl.expand_dims(through_a, 0), 0.0), 1)
        d_A = tl.dot(d_before, tl.trans(beta_[:, None] * U), input_precision=EXACT)
        d_A += d_before_N[:, None] * tl.expand_dims(beta_ * u, 0)
        d_la += _spanned(d_A * A, 1, C)
        tl.store(d_log_alpha + where, tl.where(goes_on == 0.0, 0.0, d_la), mask=inside)
    else:
        d_written = tl.dot(tl.trans(A), d_before, input_precision=EXACT)
        d_written_N = tl.sum(A * d_before_N[:, None], 0)
        d_u = d_after_N + d_written_N
        tl.store(d_beta + where, tl.sum((d_after + d_written) * U, 1) + d_u * u, mask=inside)
        d_U = beta_[:, None] * (d_after + d_written) + tl.where(end[:, None], tl.load(met + 5 * C + c)[None, :], 0.0)
        d_u = beta_ * d_u + tl.where(end, tl.load(met + 6 * C + 2), 0.0)
        d_lm = tl.sum(tl.where(i <= j, tl.expand_dims(d_u * u, 0), 0.0), 1) + _spanned(d_U * U, 0, C)
        tl.store(d_log_mu + where, tl.where(goes_on == 0.0, 0.0, d_lm), mask=inside)
