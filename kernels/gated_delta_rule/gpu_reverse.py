"""Backward, the serial part: the memory before each chunk once more, and against time its gradient after each.

Neither needs the other, so one launch walks both ways at once, with twice the programs. Held transposed as in
`gpu_forward`; with E the gradient of R, d_M of the memory after the chunk:

    E^T = U^T + U^T A    U^T = d_O^T P + f (d_M^T K^T)    d_M^T = e_last d_M^T + (e d_O^T) Q - (e beta E^T) K
"""

import triton
import triton.language as tl

from seqzoo.kernels.gated_delta_rule.gpu_forward import after, written


@triton.jit
def _states(
    k_ptr, v_ptr, A_ptr, e_ptr, f_ptr, b_ptr, first_ptr, states_ptr, Z_ptr,
    T, N, begin, end, memory, x, HV: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, S_K: tl.constexpr, S_V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With time through chunks begin to end, from M [V, K] at first_ptr: S^T before each, and Z."""
    b, head = memory // HV, memory % HV
    h = head // (HV // H)
    c, w = tl.arange(0, C), tl.arange(0, BK)
    in_k, in_v, in_state = (w < K)[None, :], (x < V)[None, :], (x[:, None] < V) & (w[None, :] < K)
    if first_ptr is None:
        S = tl.full([BV, BK], 0.0, tl.float32)
    else:
        S = tl.load(first_ptr + x[:, None] * S_V + w[None, :] * S_K, mask=in_state, other=0.0).to(tl.float32)
    at_m = x[:, None] * K + w[None, :]
    tl.store(states_ptr + (memory * N + begin) * (V * K) + at_m, S.to(states_ptr.dtype.element_ty), mask=in_state)
    for n in range(begin, end):
        first, chunk, last = b * T + n * C, memory * N + n, tl.minimum(C, T - n * C) - 1
        keep = tl.load(e_ptr + chunk * C + last)
        row = tl.minimum(c, last)[:, None]
        k = tl.load(k_ptr + first * K_ROW + h * K + (row * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        v = tl.load(v_ptr + first * V_ROW + head * V + (row * V_ROW + x[None, :]), mask=in_v, other=0.0)
        Z = written(S, k, tl.trans(v), A_ptr, e_ptr, b_ptr, chunk, C, DOT, PRECISION)
        at_z = chunk * (C * V) + (c[:, None] * V + x[None, :])
        tl.store(Z_ptr + at_z, tl.trans(Z).to(Z_ptr.dtype.element_ty), mask=in_v)
        S = after(S, Z, k, keep, f_ptr, chunk, C, DOT, PRECISION)
        next_state = (x[:, None] < tl.where(n + 1 < end, V, 0)) & (w[None, :] < K)
        tl.store(states_ptr + (chunk + 1) * (V * K) + at_m, S.to(states_ptr.dtype.element_ty), mask=next_state)


@triton.jit
def _reverse(
    q_ptr, k_ptr, d_o_ptr, A_ptr, P_ptr, e_ptr, f_ptr, b_ptr, d_states_ptr, E_ptr, M,
    T, N, begin, end, memory, x, HV: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Against time through chunks end to begin, M = d_M^T after them: d_M^T after each, E; returns it before them."""
    b, head = memory // HV, memory % HV
    h = head // (HV // H)
    c, w = tl.arange(0, C), tl.arange(0, BK)
    in_k, in_v, in_state = (w < K)[None, :], (x < V)[None, :], (x[:, None] < V) & (w[None, :] < K)
    at_m = x[:, None] * K + w[None, :]
    if d_states_ptr is not None:
        last_ptr = d_states_ptr + (memory * N + end - 1) * (V * K)
        tl.store(last_ptr + at_m, M.to(d_states_ptr.dtype.element_ty), mask=in_state)
    for i in range(end - begin):
        n = end - 1 - i
        first, chunk, last = b * T + n * C, memory * N + n, tl.minimum(C, T - n * C) - 1
        keep = tl.load(e_ptr + chunk * C + last)
        row = tl.minimum(c, last)[:, None]
        k = tl.load(k_ptr + first * K_ROW + h * K + (row * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        q = tl.load(q_ptr + first * Q_ROW + h * K + (row * Q_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        o_at = first * (HV * V) + head * V + (row * (HV * V) + x[None, :])
        d_o = tl.trans(tl.load(d_o_ptr + o_at, mask=in_v, other=0.0)).to(DOT)
        square = chunk * (C * C) + (c[:, None] * C + c[None, :])
        A, P = tl.load(A_ptr + square), tl.load(P_ptr + square)
        U = tl.load(f_ptr + chunk * C + c)[None, :] * tl.dot(M.to(DOT), tl.trans(k), input_precision=PRECISION)
        U = tl.dot(d_o, P, acc=U, input_precision=PRECISION)
        e = tl.load(e_ptr + chunk * C + c)
        M = tl.dot((e[None, :] * d_o.to(tl.float32)).to(DOT), q, acc=keep * M, input_precision=PRECISION)
        E = tl.dot(U.to(DOT), A, acc=U, input_precision=PRECISION)
        if E_ptr is not None:
            at_z = chunk * (C * V) + (c[:, None] * V + x[None, :])
            tl.store(E_ptr + at_z, tl.trans(E).to(E_ptr.dtype.element_ty), mask=in_v)
        e *= -tl.load(b_ptr + chunk * C + c)
        M = tl.dot((e[None, :] * E).to(DOT), k, acc=M, input_precision=PRECISION)
        if d_states_ptr is not None:
            before = (x[:, None] < tl.where(n > begin, V, 0)) & (w[None, :] < K)
            tl.store(d_states_ptr + (chunk - 1) * (V * K) + at_m, M.to(d_states_ptr.dtype.element_ty), mask=before)
    return M


@triton.jit(do_not_specialize=["T", "N", "LENGTH", "PARTS"])
def _both_ways(
    q_ptr, k_ptr, v_ptr, d_o_ptr, A_ptr, P_ptr, e_ptr, f_ptr, b_ptr, first_ptr, after_ptr,
    states_ptr, Z_ptr, d_states_ptr, E_ptr, d_first_ptr,
    T, N, LENGTH, PARTS, HV: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, S_K: tl.constexpr, S_V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """first: the memory before each part, after: its gradient after each, by strides S_K, S_V; d_first [K, V]."""
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (V + BV - 1) // BV
    against, place = pid % 2, pid // 2
    part, memory = place // slices % PARTS, place // slices // PARTS
    w, x = tl.arange(0, BK), (place % slices).to(tl.int32) * BV + tl.arange(0, BV)
    begin, end = part * LENGTH, tl.minimum((part + 1) * LENGTH, N)
    if against == 0:
        if first_ptr is not None:
            first_ptr += (memory * PARTS + part) * K * V
        _states(
            k_ptr, v_ptr, A_ptr, e_ptr, f_ptr, b_ptr, first_ptr, states_ptr, Z_ptr, T, N, begin, end, memory, x,
            HV, H, K, V, K_ROW, V_ROW, S_K, S_V, C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
    else:
        in_state = (x[:, None] < V) & (w[None, :] < K)
        after_ptr += (memory * PARTS + part) * K * V
        M = tl.load(after_ptr + x[:, None] * S_V + w[None, :] * S_K, mask=in_state, other=0.0).to(tl.float32)
        M = _reverse(
            q_ptr, k_ptr, d_o_ptr, A_ptr, P_ptr, e_ptr, f_ptr, b_ptr, d_states_ptr, E_ptr, M, T, N, begin, end,
            memory, x, HV, H, K, V, Q_ROW, K_ROW, C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
        if part == 0:
            tl.store(d_first_ptr + memory * K * V + x[:, None] + w[None, :] * V, M, mask=in_state)


@triton.jit(do_not_specialize=["T", "N", "LENGTH", "PARTS"])
def _reverse_ends(
    q_ptr, k_ptr, d_o_ptr, A_ptr, P_ptr, e_ptr, f_ptr, b_ptr, d_last_ptr, ends_ptr,
    T, N, LENGTH, PARTS, HV: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_M^T [V, K] before each part but the first, from d_last [K, V] after the last part, and from 0 after the others.

    What really is after those, `_reverse_chain` adds.
    """
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (V + BV - 1) // BV
    part, memory = pid // slices % (PARTS - 1) + 1, pid // slices // (PARTS - 1)
    w, x = tl.arange(0, BK), (pid % slices).to(tl.int32) * BV + tl.arange(0, BV)
    in_state = (x[:, None] < V) & (w[None, :] < K)
    known = (x[:, None] < tl.where(part == PARTS - 1, V, 0)) & (w[None, :] < K)
    M = tl.load(d_last_ptr + memory * K * V + x[:, None] + w[None, :] * V, mask=known, other=0.0)
    M = _reverse(
        q_ptr, k_ptr, d_o_ptr, A_ptr, P_ptr, e_ptr, f_ptr, b_ptr, None, None, M, T, N,
        part * LENGTH, tl.minimum((part + 1) * LENGTH, N), memory, x,
        HV, H, K, V, Q_ROW, K_ROW, C, BK, BV, DOT, PRECISION,
    )  # fmt: skip
    tl.store(ends_ptr + (memory * (PARTS - 1) + part - 1) * V * K + x[:, None] * K + w[None, :], M, mask=in_state)


@triton.jit(do_not_specialize=["PARTS"])
def _reverse_chain(
    ends_ptr, d_ends_ptr, d_last_ptr, afters_ptr,
    PARTS, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_M^T [V, K] after each part, from `_reverse_ends` and the W of `gpu_forward._ends`."""
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (V + BV - 1) // BV
    memory = pid // slices
    w, x = tl.arange(0, BK), (pid % slices).to(tl.int32) * BV + tl.arange(0, BV)
    in_state, in_move = (x[:, None] < V) & (w[None, :] < K), (w[:, None] < K) & (w[None, :] < K)
    at = x[:, None] * K + w[None, :]
    ends_ptr += memory * (PARTS - 1) * (V + K) * K
    d_ends_ptr += memory * (PARTS - 1) * K * V
    afters_ptr += memory * PARTS * K * V
    M = tl.load(d_last_ptr + memory * K * V + x[:, None] + w[None, :] * V, mask=in_state, other=0.0)
    tl.store(afters_ptr + (PARTS - 1) * K * V + at, M, mask=in_state)
    M = tl.load(d_ends_ptr + (PARTS - 2) * K * V + at, mask=in_state, other=0.0)
    tl.store(afters_ptr + (PARTS - 2) * K * V + at, M, mask=in_state)
    for i in range(2, PARTS):
        part = PARTS - i
        U = tl.load(d_ends_ptr + (part - 1) * K * V + at, mask=in_state, other=0.0)
        W = tl.load(ends_ptr + (part * (V + K) + V + w[:, None]) * K + w[None, :], mask=in_move, other=0.0)
        M = tl.dot(M, tl.trans(W), acc=U, input_precision=PRECISION)
        tl.store(afters_ptr + (part - 1) * K * V + at, M, mask=in_state)
