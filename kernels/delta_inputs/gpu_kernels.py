"""The rule's inputs on a GPU: one launch each way, whose programs have q, k, the gates or, backward, dv as their part.

A program of q or k has BR heads of it, whole, in registers; one of the gates has BT tokens, so many that together they
have them all.
"""

import triton
import triton.language as tl


@triton.jit
def _heads(n, T, row_step, token_step, H, K, BR: tl.constexpr, BK: tl.constexpr):
    """Of this program's BR heads: which there are, where they are among all, and where they are in rows of tokens."""
    heads, ks = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BK)[None]
    token, head = heads // H, heads % H
    at = (token // T).to(tl.int64) * row_step + (token % T).to(tl.int64) * token_step + head * K
    return (token < n)[:, None] & (ks < K), heads.to(tl.int64)[:, None] * K + ks, at[:, None] + ks


@triton.jit
def _gates(ba, a_log, dt_bias, n, T, ba_row, ba_token, HV, BT: tl.constexpr, BH: tl.constexpr):
    """Of this program's tokens: which gates there are, where each is among all, b, a + dt_bias, and exp(a_log)."""
    tokens, heads = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BH)[None]
    inside = (tokens < n)[:, None] & (heads < HV)
    ba += ((tokens // T).to(tl.int64) * ba_row + (tokens % T).to(tl.int64) * ba_token)[:, None] + heads
    b = tl.load(ba, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(ba + HV, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(dt_bias + heads, mask=heads < HV, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(a_log + heads, mask=heads < HV, other=0.0).to(tl.float32))
    return inside, tokens.to(tl.int64)[:, None], heads, b, a, rate


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e), e = exp(-|x|), as 2 artanh(e / (2 + e)): to the last bit or two where e is tiny, too."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    s2 = s * s
    series = 1.0 / 13 + s2 / 15
    for n in tl.static_range(6):
        series = 1.0 / (11 - 2 * n) + s2 * series
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _unit(qkv, out, part, n, T, row_step, token_step, scale, H, K, BR: tl.constexpr, BK: tl.constexpr):
    inside, at, where = _heads(n, T, row_step, token_step, H, K, BR, BK)
    x = tl.load(qkv + part * H * K + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, x * (scale * tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6))[:, None], mask=inside)


@triton.jit
def _open(ba, a_log, dt_bias, g, beta, scale, n, T, ba_row, ba_token, HV, BT: tl.constexpr, BH: tl.constexpr):
    inside, token, head, b, a, rate = _gates(ba, a_log, dt_bias, n, T, ba_row, ba_token, HV, BT, BH)
    tl.store(g + token * HV + head, -rate * _softplus(a), mask=inside)
    tl.store(beta + token * HV + head, scale / (1.0 + tl.exp(-b)), mask=inside)


@triton.jit(do_not_specialize=["n", "T"])
def delta_inputs_forward(
    qkv, ba, a_log, dt_bias, q, k, g, beta, beta_scale, n, T, qkv_row, qkv_token, ba_row, ba_token,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    if part == 0:
        _unit(qkv, q, part, n, T, qkv_row, qkv_token, SCALE, H, K, BR, BK)
    elif part == 1:
        _unit(qkv, k, part, n, T, qkv_row, qkv_token, 1.0, H, K, BR, BK)
    else:
        _open(ba, a_log, dt_bias, g, beta, beta_scale, n, T, ba_row, ba_token, HV, BT, BH)


@triton.jit
def _unit_backward(
    qkv, dout, dqkv, part, n, T, row_step, token_step, scale, C, H, K, BR: tl.constexpr, BK: tl.constexpr
):
    inside, at, where = _heads(n, T, row_step, token_step, H, K, BR, BK)
    x = tl.load(qkv + part * H * K + where, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32) * scale
    norm = tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6)[:, None]
    x *= norm
    change = norm * (change - x * tl.sum(change * x, axis=1)[:, None])
    _, _, where = _heads(n, T, T.to(tl.int64) * C, C, H, K, BR, BK)
    tl.store(dqkv + part * H * K + where, change, mask=inside)


@triton.jit
def _open_backward(
    ba, a_log, dt_bias, dg, dbeta, dba, dheads, scale, n, T, ba_row, ba_token, HV, BT: tl.constexpr, BH: tl.constexpr
):
    inside, token, head, b, a, rate = _gates(ba, a_log, dt_bias, n, T, ba_row, ba_token, HV, BT, BH)
    change = tl.load(dg + token * HV + head, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-b))
    db = tl.load(dbeta + token * HV + head, mask=inside, other=0.0).to(tl.float32)
    db *= scale * share * (1.0 - share)
    change *= -rate
    da = change / (1.0 + tl.exp(-a))
    tl.store(dba + token * (2 * HV) + head, db, mask=inside)
    tl.store(dba + token * (2 * HV) + HV + head, da, mask=inside)
    heads = tl.arange(0, BH)
    dheads += tl.program_id(0).to(tl.int64) * (2 * HV) + heads
    tl.store(dheads, tl.sum(change * _softplus(a), axis=0), mask=heads < HV)
    tl.store(dheads + HV, tl.sum(da, axis=0), mask=heads < HV)


@triton.jit
def _copy(dv, dqkv, n, C, H, K, HV, V, BR: tl.constexpr, BV: tl.constexpr):
    times, vs = (HV + H - 1) // H, tl.arange(0, BV)[None]  # a block of key heads stands for so many of value heads
    for m in range(times):
        heads = (tl.program_id(0) * times + m).to(tl.int64) * BR + tl.arange(0, BR)
        inside = (heads < n.to(tl.int64) * HV)[:, None] & (vs < V)
        change = tl.load(dv + heads[:, None] * V + vs, mask=inside, other=0.0)
        where = heads // HV * C + 2 * H * K + heads % HV * V
        tl.store(dqkv + where[:, None] + vs, change, mask=inside)


@triton.jit(do_not_specialize=["n", "T"])
def delta_inputs_backward(
    qkv, ba, a_log, dt_bias, dq, dk, dv, dg, dbeta, dqkv, dba, dheads, beta_scale, n, T,
    qkv_row, qkv_token, ba_row, ba_token,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dqkv, dba, and dheads [programs, 2, HV], what the program's tokens add to the gradients of a_log and dt_bias."""
    part = tl.program_id(1)
    if part == 0:
        _unit_backward(qkv, dq, dqkv, part, n, T, qkv_row, qkv_token, SCALE, C, H, K, BR, BK)
    elif part == 1:
        _unit_backward(qkv, dk, dqkv, part, n, T, qkv_row, qkv_token, 1.0, C, H, K, BR, BK)
    elif part == 2:
        _open_backward(ba, a_log, dt_bias, dg, dbeta, dba, dheads, beta_scale, n, T, ba_row, ba_token, HV, BT, BH)
    else:
        _copy(dv, dqkv, n, C, H, K, HV, V, BR, BV)
