"""The momentum delta rule's step on a GPU: every program keeps some columns of a memory and of what it gathers."""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.slots import slot_of


@triton.jit(
    do_not_specialize=["T", "slots", "q_row", "q_token", "k_row", "k_token", "v_row", "v_token", "p_row", "p_token"]
)
def momentum_delta_rule_steps(
    q, k, v, p, log_alpha, log_mu, beta, eta, pool, index, starts, o,
    T, slots, pool_slot, q_row, q_token, k_row, k_token, v_row, v_token, p_row, p_token,
    H: tl.constexpr, HP: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    slices: tl.constexpr = (V + BV - 1) // BV
    here = tl.program_id(0)
    head, row = here // slices % HV, (here // slices // HV).to(tl.int64)
    ks, vs = tl.arange(0, BK), here % slices * BV + tl.arange(0, BV)
    slot, live, nothing = slot_of(index, row, slots)
    o += (row * T * HV + head) * V + vs
    q += row * q_row + head // (HV // H) * K + ks
    k += row * k_row + head // (HV // H) * K + ks
    p += row * p_row + head // (HV // HP) * K + ks
    v += row * v_row + head * V + vs
    if live:
        in_k, in_v = ks < K, vs < V
        inside = in_k[:, None] & in_v[None, :]
        places = pool + slot * pool_slot + head * 2 * K * V + ks[:, None] * V + vs[None, :]
        memory = tl.load(places, mask=inside, other=0.0)
        errors = tl.load(places + K * V, mask=inside, other=0.0)
        for t in range(T):
            token = (row * T + t) * HV + head
            if starts is not None:
                new = tl.load(starts + row * T + t)
                memory, errors = tl.where(new, 0.0, memory), tl.where(new, 0.0, errors)
            asked = tl.load(p + t * p_token, mask=in_k, other=0.0).to(tl.float32)
            w = tl.sum(memory * asked[:, None], axis=0) - tl.load(v + t * v_token, mask=in_v, other=0.0).to(tl.float32)
            key = tl.load(k + t * k_token, mask=in_k, other=0.0).to(tl.float32)
            key *= tl.load(eta + token).to(tl.float32)
            errors = tl.exp(tl.load(log_mu + token).to(tl.float32)) * errors + key[:, None] * w[None, :]
            memory *= tl.exp(tl.load(log_alpha + token).to(tl.float32))
            memory -= tl.load(beta + token).to(tl.float32) * errors
            query = tl.load(q + t * q_token, mask=in_k, other=0.0).to(tl.float32)
            tl.store(o + t * HV * V, tl.sum(memory * query[:, None], axis=0), mask=in_v)
        tl.store(places, memory, mask=inside)
        tl.store(places + K * V, errors, mask=inside)
    else:
        for t in range(T):
            tl.store(o + t * HV * V, nothing + tl.zeros([BV], tl.float32), mask=vs < V)
