"""Grouped matrix products in Triton: each expert's rows by its own matrix, for GPUs and dtypes of which torch's product
would wait for the host.

Rows are sorted by expert. A program finds its expert by comparing its number with where each expert's tiles end.

R rows   E experts, EP the next power of two   A width of rows   C width of results
"""

import triton
import triton.language as tl


@triton.jit
def _expert(tile, tile_ends, ends, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """The expert of a tile (E where none is left), the tile's first row, and the row behind its expert's last."""
    e = tl.arange(0, EP)
    until = tl.load(tile_ends + e, mask=e < E, other=2147483647)
    expert = tl.sum((until <= tile).to(tl.int32))
    last = tl.minimum(expert, E - 1)
    before = tl.load(ends + last - 1, mask=last > 0, other=0)
    tiles_before = tl.load(tile_ends + last - 1, mask=last > 0, other=0)
    return expert, before + (tile - tiles_before) * BM, tl.load(ends + last)


@triton.jit
def product_rows(
    rows, matrices, out, tile_ends, ends, e_step, c_step, a_step,
    E: tl.constexpr, EP: tl.constexpr, A: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[r] = matrix[c, a] rows[r, a], the matrix of r's expert."""
    strips: tl.constexpr = (C + BN - 1) // BN
    here = tl.program_id(0)
    expert, first, end = _expert(here // strips, tile_ends, ends, E, EP, BM)
    if expert == E:
        return
    row = first + tl.arange(0, BM)
    there, row = row < end, row.to(tl.int64)
    c, a = here % strips * BN + tl.arange(0, BN), tl.arange(0, BK)
    matrix = matrices + expert.to(tl.int64) * e_step
    total = tl.zeros((BM, BN), tl.float32)
    for n in range(0, A, BK):
        inside = a < A - n
        x = tl.load(rows + row[:, None] * A + (a + n)[None], mask=there[:, None] & inside[None], other=0.0)
        at = matrix + (a + n)[:, None] * a_step + c[None] * c_step
        w = tl.load(at, mask=inside[:, None] & (c < C)[None], other=0.0)
        total = tl.dot(x.to(DOT), w.to(DOT), total, input_precision=PRECISION)
    inside = there[:, None] & (c < C)[None]
    tl.store(out + row[:, None] * C + c[None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product_matrices(
    given, rows, out, ends, A: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e, c, a] = sum of given[r, c] rows[r, a] over the expert's rows, in their order; zeros where it has none."""
    across: tl.constexpr = (A + BN - 1) // BN
    down: tl.constexpr = (C + BM - 1) // BM
    here = tl.program_id(0)
    expert = (here // (across * down)).to(tl.int64)
    c, a = here // across % down * BM + tl.arange(0, BM), here % across * BN + tl.arange(0, BN)
    first, end = tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)
    total = tl.zeros((BM, BN), tl.float32)
    for n in range(first, end, BK):
        row = n + tl.arange(0, BK)
        there, row = row < end, row.to(tl.int64)
        d = tl.load(given + row[None] * C + c[:, None], mask=there[None] & (c < C)[:, None], other=0.0)
        x = tl.load(rows + row[:, None] * A + a[None], mask=there[:, None] & (a < A)[None], other=0.0)
        total = tl.dot(d.to(DOT), x.to(DOT), total, input_precision=PRECISION)
    at = out + (expert * C + c[:, None]) * A + a[None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(c < C)[:, None] & (a < A)[None])
