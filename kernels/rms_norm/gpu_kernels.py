"""The norms on a GPU: a program has whole rows in registers; every input is read once, every result written once."""

import triton
import triton.language as tl


@triton.jit
def _starts(rows, length, outer, inner):
    """Where rows begin [elements]: `inner` apart, `length` of them in every `outer`; None: as if it were one."""
    if outer is None:
        starts = rows.to(tl.int64) * inner
    else:
        starts = (rows // length).to(tl.int64) * outer + (rows % length).to(tl.int64) * inner
    return starts[:, None]


@triton.jit
def _normed(x, eps, W: tl.constexpr):
    """Rows over their root mean square, and 1 over that."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / W + eps)[:, None]
    return x * scale, scale


@triton.jit(do_not_specialize=["n", "x_length", "gate_length"])
def rms_norm_forward(
    x, gate, weight, y, n, eps, offset, x_length, x_outer, x_inner, gate_length, gate_outer, gate_inner,
    W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """BETWEEN: the dtype of the weighted norm before its gate."""
    rows, columns = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BW)[None]
    inside = (rows < n)[:, None] & (columns < W)
    x = tl.load(x + _starts(rows, x_length, x_outer, x_inner) + columns, mask=inside, other=0.0)
    scaled, _ = _normed(x.to(tl.float32), eps, W)
    weight = tl.load(weight + columns, mask=columns < W, other=0.0).to(tl.float32)
    if gate is None:
        result = (weight + offset) * scaled
    else:
        gate += _starts(rows, gate_length, gate_outer, gate_inner) + columns
        gate = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
        weighted = (weight * scaled.to(x.dtype).to(tl.float32)).to(BETWEEN).to(tl.float32)
        result = gate / (1.0 + tl.exp(-gate)) * weighted
    tl.store(y + rows.to(tl.int64)[:, None] * W + columns, result, mask=inside)


@triton.jit(do_not_specialize=["n", "share", "x_length", "gate_length"])
def rms_norm_backward(
    x, gate, weight, dy, dx, dgate, dweights, n, share, eps, offset,
    x_length, x_outer, x_inner, gate_length, gate_outer, gate_inner,
    W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """dx and dgate of the program's share of the rows, and dweights [programs, W], what these add to dweight."""
    first, columns = tl.program_id(0) * share, tl.arange(0, BW)[None]
    weight = tl.load(weight + columns, mask=columns < W, other=0.0).to(tl.float32)
    total = tl.zeros([BR, BW], tl.float32)
    for start in range(first, tl.minimum(first + share, n), BR):
        rows = start + tl.arange(0, BR)
        inside = (rows < n)[:, None] & (columns < W)
        at = rows.to(tl.int64)[:, None] * W + columns
        given = tl.load(x + _starts(rows, x_length, x_outer, x_inner) + columns, mask=inside, other=0.0)
        change = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        scaled, scale = _normed(given.to(tl.float32), eps, W)
        if gate is None:
            total += change * scaled
            change *= weight + offset
        else:
            opens = gate + _starts(rows, gate_length, gate_outer, gate_inner) + columns
            opens = tl.load(opens, mask=inside, other=0.0).to(tl.float32)
            rounded = scaled.to(given.dtype).to(tl.float32)
            weighted = (weight * rounded).to(BETWEEN).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp(-opens))
            tl.store(dgate + at, change * weighted * s * (1.0 + opens * (1.0 - s)), mask=inside)
            change *= opens * s
            total += change * rounded
            change *= weight
        mean = tl.sum(change * scaled, axis=1)[:, None] / W
        tl.store(dx + at, scale * (change - scaled * mean), mask=inside)
    columns = tl.arange(0, BW)
    dweights += tl.program_id(0).to(tl.int64) * W + columns
    tl.store(dweights, tl.sum(total, axis=0), mask=columns < W)
