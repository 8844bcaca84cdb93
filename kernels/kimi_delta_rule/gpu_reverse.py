"""Backward, the serial part: the memory before each chunk once more, and against time its gradient after each.

Neither needs the other, so one launch walks both ways at once, with twice the programs. Held transposed as in
`gpu_forward`; with U the gradient of Z, M of the memory after the chunk:

    U^T = d_O^T P + M^T writes^T    M^T = keep M^T + d_O^T reads - U^T erases
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import put, tile
from seqzoo.kernels.kimi_delta_rule.gpu_forward import after, written


@triton.jit(do_not_specialize=["T", "N"])
def both_ways(
    d_o, reads, writes, erases, values, P, keep, state, d_last, states, Z, d_states, U, d_state, T, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states, d_states [B, H, N, V, K]: the memory before each chunk, the gradient of that after it; Z, U [.., C, V].

    state, d_last, d_state [B, H, K, V]. Programs: twice the slices of V times B H.
    """
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (V + BV - 1) // BV
    memory = pid // 2 // slices
    batch, head = memory // H, memory % H
    tokens, keys = tl.arange(0, C), tl.arange(0, BK)
    columns = (pid // 2 % slices).to(tl.int32) * BV + tl.arange(0, BV)
    place = memory * K * V + columns[:, None] + keys[None, :] * V
    inside = (columns < V)[:, None] & (keys < K)[None, :]
    if pid % 2 == 0:
        S = tl.zeros([BV, BK], tl.float32)
        if state is not None:
            S += tl.load(state + place, mask=inside, other=0.0)
        for n in range(N):
            chunk = memory * N + n
            fades = tl.load(keep + chunk * K + keys, mask=keys < K, other=0.0)
            put(states + chunk * (V * K), K, columns, keys, V, K, S)
            Z_ = written(S, erases, values, chunk, tokens, keys, columns, C, K, V, DOT, PRECISION)
            put(Z + chunk * (C * V), V, tokens, columns, C, V, tl.trans(Z_))
            S = after(S, Z_, writes, fades, chunk, tokens, keys, C, K, DOT, PRECISION)
    else:
        M = tl.load(d_last + place, mask=inside, other=0.0)
        for i in range(N):
            n = N - 1 - i
            chunk, row, left = memory * N + n, batch * T + n * C, T - n * C
            fades = tl.load(keep + chunk * K + keys, mask=keys < K, other=0.0)
            put(d_states + chunk * (V * K), K, columns, keys, V, K, M)
            d_ = tl.trans(tile(d_o + (row * H + head) * V, H * V, tokens, columns, left, V)).to(DOT)
            P_ = tl.load(P + chunk * (C * C) + tokens[:, None] * C + tokens[None, :]).to(DOT)
            writes_ = tile(writes + chunk * (C * K), K, tokens, keys, C, K).to(DOT)
            U_ = tl.dot(M.to(DOT), tl.trans(writes_), input_precision=PRECISION)
            U_ = tl.dot(d_, P_, acc=U_, input_precision=PRECISION)
            put(U + chunk * (C * V), V, tokens, columns, C, V, tl.trans(U_))
            reads_ = tile(reads + chunk * (C * K), K, tokens, keys, C, K).to(DOT)
            M = tl.dot(d_, reads_, acc=M * fades[None, :], input_precision=PRECISION)
            erases_ = tile(erases + chunk * (C * K), K, tokens, keys, C, K).to(DOT)
            M = tl.dot((-U_).to(DOT), erases_, acc=M, input_precision=PRECISION)
        tl.store(d_state + place, M, mask=inside)
