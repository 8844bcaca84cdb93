"""Through the chunks with the memory: what is read of it, and its ends where the sequence is split.

A program has BV of the value's columns. It holds the memory transposed, S^T [BV, K], so that in every product

    X^T = S^T K^T    Z^T = R^T + R^T A^T    O^T = e (S^T Q^T) + Z^T P^T    S^T = e_last S^T + (f Z^T) K

the left operand is what the program itself has computed and still has in registers, its warps share nothing but what
they load, and none waits for another.
"""

import triton
import triton.language as tl


@triton.jit
def written(S, k, v, A_ptr, e_ptr, b_ptr, chunk, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Z^T [BV, C] that a chunk's tokens write. v^T [BV, C]; chunk: its number among those of A, e and b."""
    c = tl.arange(0, C)
    A = tl.load(A_ptr + chunk * (C * C) + (c[:, None] * C + c[None, :]))
    e, b = tl.load(e_ptr + chunk * C + c), tl.load(b_ptr + chunk * C + c)
    X = tl.dot(S.to(DOT), tl.trans(k), input_precision=PRECISION)
    R = b[None, :] * (v.to(tl.float32) - e[None, :] * X)
    return tl.dot(R.to(DOT), tl.trans(A), acc=R, input_precision=PRECISION)


@triton.jit
def after(S, Z, k, keep, f_ptr, chunk, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """S^T after the chunk; keep: e of its last token, asked for early, since a number is not loaded ahead by itself."""
    f = tl.load(f_ptr + chunk * C + tl.arange(0, C))
    return tl.dot((f[None, :] * Z).to(DOT), k, acc=keep * S, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N", "LENGTH", "PARTS"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    A_ptr,
    P_ptr,
    e_ptr,
    f_ptr,
    b_ptr,
    state_ptr,
    o_ptr,
    last_ptr,
    T,
    N,
    LENGTH,
    PARTS,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    S_K: tl.constexpr,
    S_V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o, and after the last part the memory. A part is LENGTH chunks from its state, which has strides S_K, S_V."""
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (V + BV - 1) // BV
    part, memory = pid // slices % PARTS, pid // slices // PARTS
    b, head = memory // HV, memory % HV
    h = head // (HV // H)
    c, w, x = tl.arange(0, C), tl.arange(0, BK), (pid % slices).to(tl.int32) * BV + tl.arange(0, BV)
    in_k, in_v, in_state = (w < K)[None, :], (x < V)[None, :], (x[:, None] < V) & (w[None, :] < K)
    if state_ptr is None:
        S = tl.full([BV, BK], 0.0, tl.float32)
    else:
        state_ptr += (memory * PARTS + part) * K * V
        S = tl.load(state_ptr + x[:, None] * S_V + w[None, :] * S_K, mask=in_state, other=0.0).to(tl.float32)
    for n in range(part * LENGTH, tl.minimum((part + 1) * LENGTH, N)):
        first, chunk, last = b * T + n * C, memory * N + n, tl.minimum(C, T - n * C) - 1
        keep = tl.load(e_ptr + chunk * C + last)
        row = tl.minimum(c, last)[:, None]  # what comes after the last token has no weight in A, P, e, f and b
        q = tl.load(q_ptr + first * Q_ROW + h * K + (row * Q_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        k = tl.load(k_ptr + first * K_ROW + h * K + (row * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        v = tl.load(v_ptr + first * V_ROW + head * V + (row * V_ROW + x[None, :]), mask=in_v, other=0.0)
        P = tl.load(P_ptr + chunk * (C * C) + (c[:, None] * C + c[None, :]))
        Z = written(S, k, tl.trans(v), A_ptr, e_ptr, b_ptr, chunk, C, DOT, PRECISION)
        Y = tl.load(e_ptr + chunk * C + c)[None, :] * tl.dot(S.to(DOT), tl.trans(q), input_precision=PRECISION)
        O = tl.trans(tl.dot(Z.to(DOT), tl.trans(P), acc=Y, input_precision=PRECISION))
        S = after(S, Z, k, keep, f_ptr, chunk, C, DOT, PRECISION)
        o_at = first * (HV * V) + head * V + (c[:, None] * (HV * V) + x[None, :])
        tl.store(o_ptr + o_at, O.to(o_ptr.dtype.element_ty), mask=(c <= last)[:, None] & in_v)
    if part == PARTS - 1:
        last_ptr += memory * K * V
        tl.store(last_ptr + x[:, None] + w[None, :] * V, S, mask=in_state)


@triton.jit(do_not_specialize=["T", "N", "LENGTH", "PARTS"])
def _ends(
    k_ptr,
    v_ptr,
    A_ptr,
    e_ptr,
    f_ptr,
    b_ptr,
    state_ptr,
    ends_ptr,
    T,
    N,
    LENGTH,
    PARTS,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each part but the last makes of its first memory M: U + W M. U^T [V, K] and W^T [K, K], one below the other.

    W is what becomes of the identity where nothing is written. The first part's M is known: U is all, W is left out.
    """
    pid = tl.program_id(0).to(tl.int64)
    values: tl.constexpr = (V + BV - 1) // BV
    slices: tl.constexpr = values + (K + BV - 1) // BV
    part, memory = pid // slices % (PARTS - 1), pid // slices // (PARTS - 1)
    b, head = memory // HV, memory % HV
    h = head // (HV // H)
    moves = pid % slices >= values  # this program's columns are the identity's
    c, w = tl.arange(0, C), tl.arange(0, BK)
    x = (pid % slices).to(tl.int32) * BV + tl.arange(0, BV)
    written_to = tl.where(moves, 0, V)
    in_k, in_v = (w < K)[None, :], (x < written_to)[None, :]
    S = tl.where(w[None, :] == x[:, None] - values * BV, 1.0, 0.0)
    if state_ptr is not None:
        known = (x[:, None] < tl.where(part == 0, written_to, 0)) & (w[None, :] < K)
        S += tl.load(state_ptr + memory * K * V + x[:, None] + w[None, :] * V, mask=known, other=0.0).to(tl.float32)
    for n in range(part * LENGTH, tl.where(moves & (part == 0), 0, part + 1) * LENGTH):
        first = b * T + n * C
        keep = tl.load(e_ptr + (memory * N + n) * C + (C - 1))
        k = tl.load(k_ptr + first * K_ROW + h * K + (c[:, None] * K_ROW + w[None, :]), mask=in_k, other=0.0).to(DOT)
        v = tl.load(v_ptr + first * V_ROW + head * V + (c[:, None] * V_ROW + x[None, :]), mask=in_v, other=0.0)
        Z = written(S, k, tl.trans(v), A_ptr, e_ptr, b_ptr, memory * N + n, C, DOT, PRECISION)
        S = after(S, Z, k, keep, f_ptr, memory * N + n, C, DOT, PRECISION)
    ends_ptr += (memory * (PARTS - 1) + part) * (V + K) * K
    x -= tl.where(moves, values * BV - V, 0)  # where the program's columns are among the V + K
    in_end = (x[:, None] < tl.where(moves, V + K, V)) & (w[None, :] < K)
    tl.store(ends_ptr + x[:, None] * K + w[None, :], S, mask=in_end)


@triton.jit(do_not_specialize=["PARTS"])
def _chain(
    ends_ptr,
    state_ptr,
    firsts_ptr,
    PARTS,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The memory M^T [V, K] at the start of each part, from `_ends`' U and W: M' = U + W M. state is [K, V]."""
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (V + BV - 1) // BV
    memory = pid // slices
    w, x = tl.arange(0, BK), (pid % slices).to(tl.int32) * BV + tl.arange(0, BV)
    in_state, in_move = (x[:, None] < V) & (w[None, :] < K), (w[:, None] < K) & (w[None, :] < K)
    at = x[:, None] * K + w[None, :]
    if state_ptr is None:
        M = tl.full([BV, BK], 0.0, tl.float32)
    else:
        M = tl.load(state_ptr + memory * K * V + x[:, None] + w[None, :] * V, mask=in_state, other=0.0).to(tl.float32)
    ends_ptr += memory * (PARTS - 1) * (V + K) * K
    firsts_ptr += memory * PARTS * K * V
    tl.store(firsts_ptr + at, M, mask=in_state)
    M = tl.load(ends_ptr + at, mask=in_state, other=0.0)
    tl.store(firsts_ptr + K * V + at, M, mask=in_state)
    for part in range(1, PARTS - 1):
        end_ptr = ends_ptr + part * (V + K) * K
        U = tl.load(end_ptr + at, mask=in_state, other=0.0)
        W = tl.load(end_ptr + V * K + w[:, None] * K + w[None, :], mask=in_move, other=0.0)
        M = tl.dot(M, W, acc=U, input_precision=PRECISION)
        tl.store(firsts_ptr + (part + 1) * K * V + at, M, mask=in_state)
