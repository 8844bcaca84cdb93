"""Strict linear attention's step on a GPU: every program keeps one tile of a memory in registers.

What is read is a sum over the memory's N rows, and nothing else joins them: each tile goes through all tokens alone. A
second kernel adds what the tiles have read, always in the same order.
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.slots import slot_of


@triton.jit(do_not_specialize=["T", "slots", "r_row", "r_token", "v_row", "v_token"])
def strict_linear_attention_steps(
    r, v, decay, pool, index, starts, o,
    T, slots, pool_slot, r_row, r_token, v_row, v_token,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (N + BN - 1) // BN
    slices: tl.constexpr = (D + BD - 1) // BD
    here = tl.program_id(0)
    tile, head = here // slices % tiles, here // (slices * tiles) % H
    row = (here // (slices * tiles * H)).to(tl.int64)
    ns, ds = tile * BN + tl.arange(0, BN), here % slices * BD + tl.arange(0, BD)
    slot, live, nothing = slot_of(index, row, slots)
    o += ((row * T * H + head) * tiles + tile) * D + ds
    r += row * r_row + head * N + ns
    v += row * v_row + head // (H // G) * D + ds
    if live:
        in_n, in_d = ns < N, ds < D
        places = pool + slot * pool_slot + head.to(tl.int64) * (N * D) + ns[:, None] * D + ds[None, :]
        state = tl.load(places, mask=in_n[:, None] & in_d[None, :], other=0.0)
        fade = 1.0
        if decay is not None:
            fade = tl.exp(tl.load(decay + head).to(tl.float32))
        for t in range(T):
            if starts is not None:
                state = tl.where(tl.load(starts + row * T + t), 0.0, state)
            key = tl.load(r + t * r_token, mask=in_n, other=0.0).to(tl.float32)
            tl.store(o + t * H * tiles * D, tl.sum(state * key[:, None], axis=0), mask=in_d)
            value = tl.load(v + t * v_token, mask=in_d, other=0.0).to(tl.float32)
            state = fade * (state + key[:, None] * value[None, :])
        tl.store(places, state, mask=in_n[:, None] & in_d[None, :])
    else:
        for t in range(T):
            tl.store(o + t * H * tiles * D, nothing + tl.zeros([BD], tl.float32), mask=ds < D)


@triton.jit
def strict_linear_attention_sum(parts, o, TILES: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """parts [rows, TILES, D] fp32 -> o [rows, D]."""
    slices: tl.constexpr = (D + BD - 1) // BD
    row = (tl.program_id(0) // slices).to(tl.int64)
    ds = tl.program_id(0) % slices * BD + tl.arange(0, BD)
    parts += row * TILES * D
    whole = tl.zeros([BD], tl.float32)
    for first in range(0, TILES, BT):
        tiles = first + tl.arange(0, BT)
        part = tl.load(
            parts + tiles[:, None] * D + ds[None, :], mask=(tiles < TILES)[:, None] & (ds < D)[None, :], other=0.0
        )
        whole += tl.sum(part, axis=0)
    tl.store(o + row * D + ds, whole, mask=ds < D)
