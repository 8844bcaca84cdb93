"""Rows of tokens to their experts and back, and the gate between the experts' matrices, each read and written once.

No two programs write the same row, since each slot of each token has one place among the sorted rows: no atomics, and
sums always in one order.

R rows, one for each slot of each token, sorted by expert   N tokens   SLOTS of each   D width   I width inside
"""

import triton
import triton.language as tl


@triton.jit
def _tile(size, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """This program's rows (int64) and columns, and which of them there are."""
    strips: tl.constexpr = (C + BC - 1) // BC
    here = tl.program_id(0)
    rows = (here // strips).to(tl.int64) * BR + tl.arange(0, BR)
    columns = here % strips * BC + tl.arange(0, BC)
    return rows, columns, rows < size, (rows < size)[:, None] & (columns < C)[None]


@triton.jit(do_not_specialize=["R"])
def spread_rows(x, order, out, R, SLOTS: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out[r] = x[order[r] // SLOTS]: each token once for each of its slots."""
    rows, columns, there, inside = _tile(R, D, BR, BC)
    token = tl.load(order + rows, mask=there, other=0) // SLOTS
    values = tl.load(x + token[:, None] * D + columns[None], mask=inside, other=0.0)
    tl.store(out + rows[:, None] * D + columns[None], values, mask=inside)


@triton.jit(do_not_specialize=["N"])
def collect_rows(rows_in, place, out, N, SLOTS: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out[n] = sum_j rows_in[place[n, j]], in the order of the slots, in fp32."""
    rows, columns, there, inside = _tile(N, D, BR, BC)
    total = tl.zeros((BR, BC), tl.float32)
    for j in tl.static_range(SLOTS):
        row = tl.load(place + rows * SLOTS + j, mask=there, other=0).to(tl.int64)
        total += tl.load(rows_in + row[:, None] * D + columns[None], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * D + columns[None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def gate_rows(gates, weight, order, out, R, I: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out = silu(gate) * up * the slot's weight, for gates [R, 2 I]."""
    rows, columns, there, inside = _tile(R, I, BR, BC)
    slot = tl.load(order + rows, mask=there, other=0)
    share = tl.load(weight + slot, mask=there, other=0.0).to(tl.float32)
    at = gates + rows[:, None] * (2 * I) + columns[None]
    gate, up = (
        tl.load(at, mask=inside, other=0.0).to(tl.float32),
        tl.load(at + I, mask=inside, other=0.0).to(tl.float32),
    )
    values = gate * tl.sigmoid(gate) * up * share[:, None]
    tl.store(out + rows[:, None] * I + columns[None], values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def gate_rows_backward(
    gates, weight, order, given, between, d_gates, d_weight, R, I: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Of `given`, what comes back for gate_rows' output, the gradients; and that output, `between`, once more."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = rows < R
    slot = tl.load(order + rows, mask=there, other=0)
    share = tl.load(weight + slot, mask=there, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((BR,), tl.float32)
    for first in range(0, I, BC):
        columns = first + tl.arange(0, BC)
        inside = there[:, None] & (columns < I)[None]
        at, single = rows[:, None] * (2 * I) + columns[None], rows[:, None] * I + columns[None]
        gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gates + at + I, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(given + single, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        act = gate * s
        total += tl.sum(d * act * up, axis=1)
        d_gate = d * share * up * (s + act * (1.0 - s))
        tl.store(between + single, (act * up * share).to(between.dtype.element_ty), mask=inside)
        tl.store(d_gates + at, d_gate.to(d_gates.dtype.element_ty), mask=inside)
        tl.store(d_gates + at + I, (d * share * act).to(d_gates.dtype.element_ty), mask=inside)
    tl.store(d_weight + slot, total, mask=there)
