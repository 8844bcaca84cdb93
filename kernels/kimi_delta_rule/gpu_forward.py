"""Through the chunks with the memory, and what is read of it. Inputs: `gpu_prepare.py`.

A program has BV of the value's columns. It holds the memory transposed, S^T [BV, K], so that in every product

    Z^T = values^T - S^T erases^T    O^T = S^T reads^T + Z^T P^T    S^T = keep S^T + Z^T writes

the left operand is what the program itself has computed and still has in registers, and its warps share nothing.
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import tile


@triton.jit
def written(S, erases, values, chunk, tokens, keys, columns, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
            DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Z^T [BV, C] that a chunk's tokens write; chunk: its number."""
    values_ = tile(values + chunk * (C * V), V, tokens, columns, C, V)
    erases_ = tile(erases + chunk * (C * K), K, tokens, keys, C, K)
    taken = tl.dot(S.to(DOT), tl.trans(erases_.to(DOT)), input_precision=PRECISION)
    return tl.trans(values_).to(tl.float32) - taken


@triton.jit
def after(S, Z, writes, fades, chunk, tokens, keys, C: tl.constexpr, K: tl.constexpr,
          DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """S^T after the chunk; fades [BK]: what the memory keeps over it, asked for early."""
    writes_ = tile(writes + chunk * (C * K), K, tokens, keys, C, K)
    return tl.dot(Z.to(DOT), writes_.to(DOT), acc=S * fades[None, :], input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N"])
def forward(
    reads, writes, erases, values, P, keep, state, o, last, T, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] and the last memory [B, H, K, V]. Programs: slices of V times B H."""
    pid = tl.program_id(0).to(tl.int64)
    slices: tl.constexpr = (V + BV - 1) // BV
    memory = pid // slices
    batch, head = memory // H, memory % H
    tokens, keys = tl.arange(0, C), tl.arange(0, BK)
    columns = (pid % slices).to(tl.int32) * BV + tl.arange(0, BV)
    place = memory * K * V + columns[:, None] + keys[None, :] * V
    inside = (columns < V)[:, None] & (keys < K)[None, :]
    S = tl.zeros([BV, BK], tl.float32)
    if state is not None:
        S += tl.load(state + place, mask=inside, other=0.0)
    for n in range(N):
        chunk, row, left = memory * N + n, batch * T + n * C, T - n * C
        fades = tl.load(keep + chunk * K + keys, mask=keys < K, other=0.0)
        reads_ = tile(reads + chunk * (C * K), K, tokens, keys, C, K).to(DOT)
        P_ = tl.load(P + chunk * (C * C) + tokens[:, None] * C + tokens[None, :]).to(DOT)
        Z = written(S, erases, values, chunk, tokens, keys, columns, C, K, V, DOT, PRECISION)
        O = tl.dot(S.to(DOT), tl.trans(reads_), input_precision=PRECISION)
        O = tl.trans(tl.dot(Z.to(DOT), tl.trans(P_), acc=O, input_precision=PRECISION))
        S = after(S, Z, writes, fades, chunk, tokens, keys, C, K, DOT, PRECISION)
        to = (row * H + head) * V + tokens[:, None] * (H * V) + columns[None, :]
        tl.store(o + to, O.to(o.dtype.element_ty), mask=(tokens < left)[:, None] & (columns < V)[None, :])
    tl.store(last + place, S, mask=inside)
