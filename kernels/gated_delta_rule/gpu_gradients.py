"""Backward, the parallel part: the gradients of a chunk's inputs from the memory before it, that after it, Z and E.

With H = E S^T and W = E Z^T, neither the reading K S nor the error is needed:

    d_beta = E . V - e (K . H) - L . W                      the error is V - e K S - L Z; `.` sums a row's products
    d_L = -beta tril(W, -1)      d_P = tril(d_O Z^T)        of log D: d_L * L + d_P * P
    d_q = e (d_O S^T) + (d_P * D) K
    d_k = f (Z d_M^T) - e beta H + (d_L * D + its transpose) K + (d_P * D)^T Q
"""

import triton
import triton.language as tl

from seqzoo.kernels.gated_delta_rule.gpu_prepare import decays, documents, fading


@triton.jit(do_not_specialize=["T", "N"])
def _gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, starts_ptr, d_o_ptr, states_ptr, Z_ptr, d_states_ptr, E_ptr,
    d_q_ptr, d_k_ptr, d_v_ptr, d_g_ptr, d_beta_ptr,
    T, N, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head; d_q and d_k are [B, T, HV, K]. First what is [C, C], then BK columns after others.

    What is as wide as K is made transposed, so that its rows suffice for many warps.
    """
    pid = tl.program_id(0).to(tl.int64)
    n, b, head = pid % N, pid // N // HV, pid // N % HV
    h, chunk, first = head // (HV // H), (b * HV + head) * N + n, b * T + n * C
    q_ptr += first * Q_ROW + h * K
    k_ptr += first * K_ROW + h * K
    v_ptr += first * V_ROW + head * V
    d_o_ptr += (first * HV + head) * V
    d_v_ptr += (first * HV + head) * V
    d_q_ptr += (first * HV + head) * K
    d_k_ptr += (first * HV + head) * K
    Z_ptr += chunk * (C * V)
    E_ptr += chunk * (C * V)
    c = tl.arange(0, C)
    inside, last = n * C + c < T, tl.minimum(C, T - n * C) - 1
    row = tl.minimum(c, last)  # what comes after the last token is read as that, and has no weight
    begins, document = documents(starts_ptr, first, inside, C)
    at = first * HV + head + c * HV
    coarse, fine, e, f = decays(g_ptr + at, inside, begins, document, C)
    beta = tl.load(beta_ptr + at, mask=inside, other=0.0).to(tl.float32)

    W, L = tl.full([C, C], 0.0, tl.float32), tl.full([C, C], 0.0, tl.float32)
    d_beta = tl.full([C], 0.0, tl.float32)
    for begin in range(0, V, BV):
        x = begin + tl.arange(0, BV)
        in_v = (x < V)[None, :]
        E = tl.load(E_ptr + (c[:, None] * V + x[None, :]), mask=in_v, other=0.0)
        Z = tl.load(Z_ptr + (c[:, None] * V + x[None, :]), mask=in_v, other=0.0)
        W = tl.dot(E, tl.trans(Z), acc=W, input_precision=PRECISION)
        v = tl.load(v_ptr + (row[:, None] * V_ROW + x[None, :]), mask=in_v, other=0.0)
        d_beta += tl.sum(E.to(tl.float32) * v.to(tl.float32), 1)
        d_v = (beta[:, None] * E.to(tl.float32)).to(d_v_ptr.dtype.element_ty)
        tl.store(d_v_ptr + (c[:, None] * (HV * V) + x[None, :]), d_v, mask=inside[:, None] & in_v)
    for begin in range(0, K, BK):
        w = begin + tl.arange(0, BK)
        in_k = inside[:, None] & (w[None, :] < K)
        k = tl.load(k_ptr + (row[:, None] * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        L = tl.dot(k, tl.trans(k), acc=L, input_precision=PRECISION)
    W *= tl.where(c[:, None] > c[None, :], fading(coarse, fine, document, C), 0.0)
    L *= W
    d_beta -= tl.sum(L, 1)
    d_total = tl.sum(beta[:, None] * L, 0) - beta * tl.sum(L, 1)
    d_L = (-beta[:, None] * W).to(DOT)

    d_P, P = tl.full([C, C], 0.0, tl.float32), tl.full([C, C], 0.0, tl.float32)
    for begin in range(0, V, BV):
        x = begin + tl.arange(0, BV)
        in_v = (x < V)[None, :]
        d_o = tl.load(d_o_ptr + (row[:, None] * (HV * V) + x[None, :]), mask=in_v, other=0.0).to(DOT)
        Z = tl.load(Z_ptr + (c[:, None] * V + x[None, :]), mask=in_v, other=0.0)
        d_P = tl.dot(d_o, tl.trans(Z), acc=d_P, input_precision=PRECISION)
    for begin in range(0, K, BK):
        w = begin + tl.arange(0, BK)
        in_k = inside[:, None] & (w[None, :] < K)
        q = tl.load(q_ptr + (row[:, None] * Q_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        k = tl.load(k_ptr + (row[:, None] * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        P = tl.dot(q, tl.trans(k), acc=P, input_precision=PRECISION)
    d_P *= fading(coarse, fine, document, C)
    P *= d_P
    d_total += tl.sum(P, 1) - tl.sum(P, 0)
    d_P = d_P.to(DOT)

    # of all columns: e (K . H) with a minus; what g's running sum gets; and parts of it summed over the tokens
    erased, d_sum = tl.full([C], 0.0, tl.float32), tl.full([C], 0.0, tl.float32)
    fades, d_opening, d_end = 0.0, 0.0, 0.0
    for begin_k in range(0, K, BK):
        w = begin_k + tl.arange(0, BK)
        in_k, in_kt = inside[:, None] & (w[None, :] < K), inside[None, :] & (w[:, None] < K)
        d_q, faced = tl.full([BK, C], 0.0, tl.float32), tl.full([BK, C], 0.0, tl.float32)
        for begin in range(0, V, BV):
            x = begin + tl.arange(0, BV)
            in_v, in_m = (x < V)[None, :], (x[:, None] < V) & (w[None, :] < K)
            at_m = chunk * (V * K) + (x[:, None] * K + w[None, :])
            S = tl.load(states_ptr + at_m, mask=in_m, other=0.0)
            fades += tl.sum(S.to(tl.float32) * tl.load(d_states_ptr + at_m, mask=in_m, other=0.0).to(tl.float32))
            d_o = e[:, None] * tl.load(d_o_ptr + (row[:, None] * (HV * V) + x[None, :]), mask=in_v, other=0.0)
            E = -e[:, None] * tl.load(E_ptr + (c[:, None] * V + x[None, :]), mask=in_v, other=0.0)
            d_q = tl.dot(tl.trans(S), tl.trans(d_o.to(DOT)), acc=d_q, input_precision=PRECISION)
            faced = tl.dot(tl.trans(S), tl.trans(E.to(DOT)), acc=faced, input_precision=PRECISION)
        # k and q once more at each use: in registers throughout they would be too many
        kt = tl.load(k_ptr + (row[None, :] * K_ROW + w[:, None]), mask=in_kt, other=0.0).to(tl.float32)
        part = tl.sum(faced * kt, 0)
        erased += part
        qt = tl.load(q_ptr + (row[None, :] * Q_ROW + w[:, None]), mask=in_kt, other=0.0).to(tl.float32)
        part = tl.sum(d_q * qt, 0) + beta * part
        d_opening += tl.sum(part, 0)
        d_sum += part
        k = tl.load(k_ptr + (row[:, None] * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        d_q = tl.dot(tl.trans(k), tl.trans(d_P), acc=d_q, input_precision=PRECISION)
        at_k = c[:, None] * (HV * K) + w[None, :]
        tl.store(d_q_ptr + at_k, tl.trans(d_q).to(d_q_ptr.dtype.element_ty), mask=in_k)

        carry = tl.full([BK, C], 0.0, tl.float32)
        for begin in range(0, V, BV):
            x = begin + tl.arange(0, BV)
            in_v, in_m = (x < V)[None, :], (x[:, None] < V) & (w[None, :] < K)
            d_M = tl.load(d_states_ptr + chunk * (V * K) + (x[:, None] * K + w[None, :]), mask=in_m, other=0.0)
            Z = f[:, None] * tl.load(Z_ptr + (c[:, None] * V + x[None, :]), mask=in_v, other=0.0)
            carry = tl.dot(tl.trans(d_M), tl.trans(Z.to(DOT)), acc=carry, input_precision=PRECISION)
        kt = tl.load(k_ptr + (row[None, :] * K_ROW + w[:, None]), mask=in_kt, other=0.0).to(tl.float32)
        part = tl.sum(carry * kt, 0)
        d_end += tl.sum(part, 0)
        d_sum -= part
        d_k = carry + beta[None, :] * faced
        q = tl.load(q_ptr + (row[:, None] * Q_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        d_k = tl.dot(tl.trans(q), d_P, acc=d_k, input_precision=PRECISION)
        k = tl.load(k_ptr + (row[:, None] * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        d_k = tl.dot(tl.trans(k), d_L, acc=d_k, input_precision=PRECISION)
        d_k = tl.dot(tl.trans(k), tl.trans(d_L), acc=d_k, input_precision=PRECISION)
        tl.store(d_k_ptr + at_k, tl.trans(d_k).to(d_k_ptr.dtype.element_ty), mask=in_k)

    fades *= tl.sum(tl.where(c == last, e, 0.0), 0)
    d_total += d_sum + tl.where(c == last, d_end + fades, 0.0)
    d_opening += fades  # of the first g, which only the memory from before feels
    from_here = (c[:, None] >= c[None, :]) & (document[:, None] == document[None, :])  # to the document's end
    d_g = tl.where(c == 0, d_opening, tl.sum(tl.where(from_here, d_total[:, None], 0.0), 0))
    tl.store(d_g_ptr + at, tl.where(begins, 0.0, d_g).to(d_g_ptr.dtype.element_ty), mask=inside)
    tl.store(d_beta_ptr + at, (d_beta + erased).to(d_beta_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["SIZE"])
def _sum_groups(
    d_q_ptr, d_k_ptr, q_ptr, k_ptr, SIZE, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """d_q and d_k [B, T, HV, K] -> those of the key heads, [B, T, H, K], of SIZE elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = i // K * (HV // H * K) + i % K
    d_q, d_k = tl.full([BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
    for j in range(HV // H):
        d_q += tl.load(d_q_ptr + at + j * K, mask=i < SIZE, other=0.0).to(tl.float32)
        d_k += tl.load(d_k_ptr + at + j * K, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(q_ptr + i, d_q.to(q_ptr.dtype.element_ty), mask=i < SIZE)
    tl.store(k_ptr + i, d_k.to(k_ptr.dtype.element_ty), mask=i < SIZE)
