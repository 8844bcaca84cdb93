"""The Kimi delta rule's step on a GPU: every program keeps some columns of one memory in registers."""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.slots import slot_of


@triton.jit(do_not_specialize=["T", "slots", "q_row", "q_token", "k_row", "k_token", "v_row", "v_token"])
def kimi_delta_rule_steps(
    q, k, v, g, beta, pool, index, starts, o,
    T, slots, pool_slot, q_row, q_token, k_row, k_token, v_row, v_token,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    slices: tl.constexpr = (V + BV - 1) // BV
    here = tl.program_id(0)
    head, row = here // slices % H, (here // slices // H).to(tl.int64)
    ks, vs = tl.arange(0, BK), here % slices * BV + tl.arange(0, BV)
    slot, live, nothing = slot_of(index, row, slots)
    o += (row * T * H + head) * V + vs
    q += row * q_row + head * K + ks
    k += row * k_row + head * K + ks
    v += row * v_row + head * V + vs
    if live:
        in_k, in_v = ks < K, vs < V
        places = pool + slot * pool_slot + head * K * V + ks[:, None] * V + vs[None, :]
        state = tl.load(places, mask=in_k[:, None] & in_v[None, :], other=0.0)
        for t in range(T):
            token = (row * T + t) * H + head
            if starts is not None:
                state = tl.where(tl.load(starts + row * T + t), 0.0, state)
            state *= tl.exp(tl.load(g + token * K + ks, mask=in_k, other=0.0).to(tl.float32))[:, None]
            key = tl.load(k + t * k_token, mask=in_k, other=0.0).to(tl.float32)
            error = tl.load(v + t * v_token, mask=in_v, other=0.0).to(tl.float32) - tl.sum(state * key[:, None], axis=0)
            error *= tl.load(beta + token).to(tl.float32)
            state += key[:, None] * error[None, :]
            query = tl.load(q + t * q_token, mask=in_k, other=0.0).to(tl.float32)
            tl.store(o + t * H * V, tl.sum(state * query[:, None], axis=0), mask=in_v)
        tl.store(places, state, mask=in_k[:, None] & in_v[None, :])
    else:
        for t in range(T):
            tl.store(o + t * H * V, nothing + tl.zeros([BV], tl.float32), mask=vs < V)
