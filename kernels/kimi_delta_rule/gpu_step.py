"""A few tokens of the Kimi delta rule on a GPU: every program keeps some columns of one memory in registers."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "q_row", "q_token", "k_row", "k_token", "v_row", "v_token"])
def steps(
    q, k, v, g, beta, starts, state, o, last, T, q_row, q_token, k_row, k_token, v_row, v_token,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] and the last memory [B, H, K, V], token by token. Programs: slices of V times B H."""
    slices: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    memory = pid // slices
    row, head = memory // H, memory % H
    keys, columns = tl.arange(0, BK), (pid % slices).to(tl.int32) * BV + tl.arange(0, BV)
    in_k, in_v = keys < K, columns < V
    place, inside = memory * K * V + keys[:, None] * V + columns[None, :], in_k[:, None] & in_v[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += tl.load(state + place, mask=inside, other=0.0)
    for t in range(T):
        at = (row * T + t) * H + head
        if starts is not None:
            S = tl.where(tl.load(starts + row * T + t), 0.0, S)
        S *= tl.exp(tl.load(g + at * K + keys, mask=in_k, other=0.0))[:, None]
        key = tl.load(k + row * k_row + t * k_token + head * K + keys, mask=in_k, other=0.0).to(tl.float32)
        value = tl.load(v + row * v_row + t * v_token + head * V + columns, mask=in_v, other=0.0).to(tl.float32)
        error = tl.load(beta + at) * (value - tl.sum(S * key[:, None], 0))
        S += key[:, None] * error[None, :]
        query = tl.load(q + row * q_row + t * q_token + head * K + keys, mask=in_k, other=0.0).to(tl.float32)
        tl.store(o + at * V + columns, tl.sum(S * query[:, None], 0), mask=in_v)
    tl.store(last + place, S, mask=inside)
