"""The kernel of Gated DeltaNet's step."""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.slots import slot_of


@triton.jit
def inputs(qkv, past, last, first, channels, inside, token, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """[BW, channels] the W inputs up to token `last`, zeros before `first`; what is before token 0 is in `past`."""
    ws = tl.arange(0, BW)
    times = last - (W - 1) + ws
    known = (times >= first) & (ws < W)
    new = (known & (times >= 0))[:, None] & inside[None, :]
    old = (known & (times < 0))[:, None] & inside[None, :]
    x = tl.load(qkv + times[:, None] * token + channels[None, :], mask=new, other=0.0).to(tl.float32)
    return x + tl.load(past + (W - 1 + times)[:, None] * C + channels[None, :], mask=old, other=0.0).to(tl.float32)


@triton.jit
def filtered(
    qkv, past, filters, last, first, channels, inside, token, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr
):
    """[channels] what the convolution makes of token `last`."""
    ws = tl.arange(0, BW)
    taps = tl.load(
        filters + channels[None, :] * W + ws[:, None], mask=(ws < W)[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)
    y = tl.sum(taps * inputs(qkv, past, last, first, channels, inside, token, C, W, BW), axis=0)
    return y * tl.sigmoid(y)


@triton.jit
def keep(qkv, past, last, first, channels, inside, token, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """Writes the W-1 inputs up to token `last` over those in `past`."""
    x = inputs(qkv, past, last, first, channels, inside, token, C, W, BW)
    tl.debug_barrier()  # all is read before any is written
    ws = tl.arange(0, BW) - 1  # the oldest of the W is let go
    places = past + ws[:, None] * C + channels[None, :]
    tl.store(places, x, mask=((ws >= 0) & (ws < W - 1))[:, None] & inside[None, :])


@triton.jit
def document(starts, t, W: tl.constexpr):
    """Where the document of token t begins: before all that is kept, where none begins in the step."""
    ts = tl.arange(0, 16)
    begins = ts < 0 if starts is None else tl.load(starts + ts, mask=ts <= t, other=0) != 0
    return tl.max(tl.where(begins, ts, -W), axis=0)


@triton.jit(
    do_not_specialize=["T", "slots", "qkv_row", "qkv_token", "ba_row", "ba_token", "gate_row", "gate_token"],
)
def delta_steps(
    qkv, ba, gate, filters, a_log, dt_bias, weight, conv_pool, pool, index, starts, read, y,
    T, slots, conv_slot, pool_slot, qkv_row, qkv_token, ba_row, ba_token, gate_row, gate_token, eps, beta_scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BW: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 2 * H * K + HV * V
    group: tl.constexpr = HV // H
    slices: tl.constexpr = (V + BV - 1) // BV
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    slot, live, nothing = slot_of(index, row, slots)
    ks, outs = tl.arange(0, BK), tl.arange(0, BO)
    in_k, in_o = ks < K, outs < V
    qs, values = head * K + ks, 2 * H * K + head * group * V  # channels
    qkv += row * qkv_row
    ba += row * ba_row + head * group
    gate += row * gate_row + head * group * V + outs
    read += (row * T * HV + head * group) * V
    y += (row * T * HV + head * group) * V + outs
    past = conv_pool + slot * conv_slot
    if starts is not None:
        starts += row * T
    if live:
        for piece in range(group * slices):
            n, vs = piece // slices, piece % slices * BV + tl.arange(0, BV)
            in_v = vs < V
            places = pool + slot * pool_slot + (head * group + n) * K * V + ks[:, None] * V + vs[None, :]
            state = tl.load(places, mask=in_k[:, None] & in_v[None, :], other=0.0)
            rate = -tl.exp(tl.load(a_log + head * group + n).to(tl.float32))
            bias = tl.load(dt_bias + head * group + n).to(tl.float32)
            for t in range(T):
                first = document(starts, t, W)
                if starts is not None:
                    state = tl.where(first == t, 0.0, state)
                a = tl.load(ba + t * ba_token + HV + n).to(tl.float32) + bias
                state *= tl.exp(rate * (tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))))
                k = filtered(qkv, past, filters, t, first, H * K + qs, in_k, qkv_token, C, W, BW)
                k *= 1.0 / tl.sqrt(tl.sum(k * k, axis=0) + 1e-6)
                v = filtered(qkv, past, filters, t, first, values + n * V + vs, in_v, qkv_token, C, W, BW)
                error = v - tl.sum(state * k[:, None], axis=0)
                beta = beta_scale * tl.sigmoid(tl.load(ba + t * ba_token + n).to(tl.float32))
                state += k[:, None] * (error * beta)[None, :]
                q = filtered(qkv, past, filters, t, first, qs, in_k, qkv_token, C, W, BW)
                q *= 1.0 / tl.sqrt((tl.sum(q * q, axis=0) + 1e-6) * K)
                tl.store(read + (t * HV + n) * V + vs, tl.sum(state * q[:, None], axis=0), mask=in_v)
            tl.store(places, state, mask=in_k[:, None] & in_v[None, :])
        tl.debug_barrier()  # the norm asks for all slices, whichever thread has them
        scale = tl.load(weight + outs, mask=in_o, other=0.0).to(tl.float32)
        for t in range(T):
            for n in range(group):
                o = tl.load(read + (t * HV + n) * V + outs, mask=in_o, other=0.0)
                z = tl.load(gate + t * gate_token + n * V, mask=in_o, other=0.0).to(tl.float32)
                o *= z * tl.sigmoid(z) * scale / tl.sqrt(tl.sum(o * o, axis=0) / V + eps)
                tl.store(y + (t * HV + n) * V, o, mask=in_o)
        first = document(starts, T - 1, W)
        keep(qkv, past, T - 1, first, qs, in_k, qkv_token, C, W, BW)
        keep(qkv, past, T - 1, first, H * K + qs, in_k, qkv_token, C, W, BW)
        for n in range(group):
            keep(qkv, past, T - 1, first, values + n * V + outs, in_o, qkv_token, C, W, BW)
    else:
        for t in range(T):
            for n in range(group):
                tl.store(y + (t * HV + n) * V, nothing + tl.zeros([BO], tl.float32), mask=in_o)
