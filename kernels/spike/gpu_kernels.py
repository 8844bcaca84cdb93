"""Spikes on a GPU: rows whole in registers up to BW channels, and beyond that read twice, block by block.

Counts are to the bit those of the definition: the mean is summed in fp64, divisions are rounded as IEEE 754 has it.
"""

import triton
import triton.language as tl


@triton.jit
def _block(x, rows, columns, n, W):
    """Where a block's elements are, which of them there are, and x there."""
    at, inside = rows.to(tl.int64)[:, None] * W + columns, (rows < n)[:, None] & (columns < W)
    return at, inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _threshold(total, DIVISOR: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Of rows whose absolute values add up to this, and whether it moves with them."""
    mean = (total / tl.full([1], DIVISOR, tl.float64)).to(tl.float32)
    threshold = tl.where(mean < LOWEST, LOWEST, tl.where(mean > HIGHEST, HIGHEST, mean))  # NaN stays
    return threshold[:, None], ((mean >= LOWEST) & (mean <= HIGHEST))[:, None]


@triton.jit
def _counts(x, threshold):
    """Whole counts, ties to even, and what they were rounded from. Beyond 2^23 all numbers are whole."""
    u = tl.div_rn(x, tl.broadcast_to(threshold, x.shape))
    size = tl.abs(u)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(u < 0, -whole, whole), u


@triton.jit(do_not_specialize=["n"])
def spike_forward(
    x, y, n, W: tl.constexpr, DIVISOR: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BW)[None]
    if W <= BW:
        at, inside, values = _block(x, rows, columns, n, W)
        threshold, moves = _threshold(tl.sum(tl.abs(values).to(tl.float64), axis=1), DIVISOR, LOWEST, HIGHEST)
        counts, u = _counts(values, threshold)
        tl.store(y + at, threshold * counts, mask=inside)
    else:
        total = tl.zeros([BR], tl.float64)
        for first in range(0, W, BW):
            at, inside, values = _block(x, rows, first + columns, n, W)
            total += tl.sum(tl.abs(values).to(tl.float64), axis=1)
        threshold, moves = _threshold(total, DIVISOR, LOWEST, HIGHEST)
        for first in range(0, W, BW):
            at, inside, values = _block(x, rows, first + columns, n, W)
            counts, u = _counts(values, threshold)
            tl.store(y + at, threshold * counts, mask=inside)


@triton.jit(do_not_specialize=["n"])
def spike_backward(
    x, dy, dx, n, W: tl.constexpr, DIVISOR: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Through the threshold, too: dx = dy + sign(x) / (k n) sum (s - x / V) dy, where V is not clamped."""
    rows, columns = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BW)[None]
    if W <= BW:
        at, inside, values = _block(x, rows, columns, n, W)
        threshold, moves = _threshold(tl.sum(tl.abs(values).to(tl.float64), axis=1), DIVISOR, LOWEST, HIGHEST)
        counts, u = _counts(values, threshold)
        change = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        moved = tl.where(moves, tl.sum((counts - u) * change, axis=1)[:, None] / DIVISOR, 0.0)
        sign = tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))
        tl.store(dx + at, change + sign * moved, mask=inside)
    else:
        total = tl.zeros([BR], tl.float64)
        for first in range(0, W, BW):
            at, inside, values = _block(x, rows, first + columns, n, W)
            total += tl.sum(tl.abs(values).to(tl.float64), axis=1)
        threshold, moves = _threshold(total, DIVISOR, LOWEST, HIGHEST)
        summed = tl.zeros([BR], tl.float32)
        for first in range(0, W, BW):
            at, inside, values = _block(x, rows, first + columns, n, W)
            counts, u = _counts(values, threshold)
            summed += tl.sum((counts - u) * tl.load(dy + at, mask=inside, other=0.0).to(tl.float32), axis=1)
        moved = tl.where(moves, summed[:, None] / DIVISOR, 0.0)
        for first in range(0, W, BW):
            at, inside, values = _block(x, rows, first + columns, n, W)
            change = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            sign = tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))
            tl.store(dx + at, change + sign * moved, mask=inside)
