"""Triton kernels of strict linear attention: four products of matrices, each with its tiles in fast memory.

A segment has L tokens, S is the memory at its start and f_ij, e_i, w_j and keep are those of `chunked.py`:

    scores   P = R R^T * f, summed over all neurons once; backward Q = dA V^T * f, and Q + Q^T of it
    states   S of every segment, one program a tile of [N, D], in time; backward dS' of every segment, against time
    read     A = e (R S) + P V, one program the rows of a block; backward dV = w (R dS') + P^T dA
    pull     dR = (Q + Q^T) R + (e dA) S^T + (w V) dS'^T

`documents` counts the starts up to each token; tokens with another count do not see each other.
"""

import triton
import triton.language as tl


@triton.jit
def _first(b, h, T, H: tl.constexpr, W: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """Where the first token of a head is, in [B, H, T, W] or else in [B, T, H, W]."""
    if HEADS_FIRST:
        return (b * H + h) * T * W
    else:
        return (b * T * H + h) * W


@triton.jit
def _tile(x, rows, T, columns, stride, W: tl.constexpr, BW: tl.constexpr):
    """x[rows, columns], 0 beyond T rows and W columns. BW: a width that columns are a multiple of."""
    seen = (rows < T)[:, None]
    if W % BW:
        seen = seen & (columns < W)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=seen, other=0.0)


@triton.jit
def _document(documents, t):
    """How many starts there were up to token t, which may be -1."""
    return tl.load(documents + t, mask=t >= 0, other=0)


@triton.jit
def _weights(apart, rows, T, edge, documents, fade):
    """What is left after so many tokens, 0 in another document than the `edge`."""
    weight = tl.full(rows.shape, 1.0, tl.float32)
    if fade is not None:
        weight = tl.exp(fade * apart.to(tl.float32))
    if documents is not None:
        weight = tl.where(tl.load(documents + rows, mask=rows < T, other=-1) == edge, weight, 0.0)
    return weight


@triton.jit(do_not_specialize=["T"])
def scores(
    x, y, out, documents, decay, T,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, L: tl.constexpr, HEADS_FIRST: tl.constexpr,
    SYMMETRIC: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x of H heads, y of G, both of width W -> out [B, H, T, L]: x_i . y_j f_ij, j from the start of i's segment.

    Blocks beyond the diagonal are not written, unless SYMMETRIC: then with what is on the other side.
    """
    pair, segment, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, j, b, h = pair // (L // BT), pair % (L // BT), bh // H, bh % H
    begin = segment * L
    if (j > i) | (begin + i * BT >= T):
        return
    rows, columns = begin + i * BT + tl.arange(0, BT), begin + j * BT + tl.arange(0, BT)
    x += _first(b, h, T, H, W, HEADS_FIRST)
    y += _first(b, h // (H // G), T, G, W, HEADS_FIRST)
    s = tl.zeros([BT, BT], tl.float32)
    for n in range(0, W, BK):
        at = n + tl.arange(0, BK)
        left = _tile(x, rows, T, at, W if HEADS_FIRST else H * W, W, BK).to(DOT)
        right = _tile(y, columns, T, at, W if HEADS_FIRST else G * W, W, BK).to(DOT)
        s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
    apart = rows[:, None] - columns[None, :]
    seen = apart > 0
    if decay is not None:
        s *= tl.exp(tl.load(decay + h) * tl.maximum(apart, 0).to(tl.float32))
    if documents is not None:
        documents += b * T
        left = tl.load(documents + rows, mask=rows < T, other=-1)
        seen = seen & (left[:, None] == tl.load(documents + columns, mask=columns < T, other=-2)[None, :])
    s = tl.where(seen, s, 0.0)
    if SYMMETRIC and i == j:
        s += tl.trans(s)
    out += bh * T * L
    to = out + rows.to(tl.int64)[:, None] * L + (columns - begin)[None, :]
    tl.store(to, s.to(out.dtype.element_ty), mask=(rows < T)[:, None])
    if SYMMETRIC and i != j:
        to = out + columns.to(tl.int64)[:, None] * L + (rows - begin)[None, :]
        tl.store(to, tl.trans(s).to(out.dtype.element_ty), mask=(columns < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def states(
    r, x, first, kept, last, documents, decay, T,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, L: tl.constexpr, HEADS_FIRST: tl.constexpr,
    REVERSE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the memories: kept [B, H, segments, N, D] at each segment's start, last [B, H, N, D] after all.

    REVERSE: their gradients from x = dA, those after each segment are kept, and last is that before all.
    """
    d, n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h, segments = bh // H, bh % H, tl.cdiv(T, L)
    neurons, ds = n * BN + tl.arange(0, BN), d * BD + tl.arange(0, BD)
    r += _first(b, h, T, H, N, HEADS_FIRST)
    x += _first(b, h // (H // G), T, G, D, False)
    fade = None if decay is None else tl.load(decay + h)
    marks = None if documents is None else documents + b * T
    at, inside = neurons[:, None] * D + ds[None, :], (neurons < N)[:, None] & (ds < D)[None, :]
    if first is None:
        S = tl.zeros([BN, BD], tl.float32)
    else:
        S = tl.load(first + bh * N * D + at, mask=inside, other=0.0).to(tl.float32)
    for m in range(0, segments):
        segment = segments - 1 - m if REVERSE else m
        begin = segment * L
        end = tl.minimum(begin + L, T)
        if first is not None or m > 0:
            tl.store(kept + (bh * segments + segment) * N * D + at, S.to(kept.dtype.element_ty), mask=inside)
        edge = 0
        if fade is not None:
            S *= tl.exp(fade * (end - begin).to(tl.float32))
        if marks is not None:
            before, after = _document(marks, begin - 1), _document(marks, end - 1)
            S = tl.where(before == after, S, 0.0)
            edge = before if REVERSE else after
        for t in range(begin, end, BT):
            rows = t + tl.arange(0, BT)
            keys = _tile(r, rows, T, neurons, N if HEADS_FIRST else H * N, N, BN)
            values = _tile(x, rows, T, ds, G * D, D, BD)
            if fade is not None or marks is not None:
                apart = tl.maximum(rows - begin if REVERSE else end - rows, 0)  # rows past the end hold zeros
                values = values * _weights(apart, rows, T, edge, marks, fade)[:, None]
            S = tl.dot(tl.trans(keys.to(DOT)), values.to(DOT), S, input_precision=PRECISION)
    tl.store(last + bh * N * D + at, S, mask=inside)


@triton.jit(do_not_specialize=["T"])
def read(
    r, kept, p, x, out, documents, decay, T,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, L: tl.constexpr, HEADS_FIRST: tl.constexpr,
    FRESH: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, D]: what a block of rows reads from its segment's memory, and from the scores p times x.

    REVERSE: with dS' for the memory and p transposed. FRESH: the segment that comes first has no memory.
    """
    i, d, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h, segments, segment = bh // H, bh % H, tl.cdiv(T, L), i * BT // L
    begin = segment * L
    end = tl.minimum(begin + L, T)
    rows, ds = i * BT + tl.arange(0, BT), d * BD + tl.arange(0, BD)
    r += _first(b, h, T, H, N, HEADS_FIRST)
    x += _first(b, h // (H // G), T, G, D, False)
    p += bh * T * L
    acc = tl.zeros([BT, BD], tl.float32)
    if not FRESH or segment != (segments - 1 if REVERSE else 0):
        kept += (bh * segments + segment) * N * D
        for n in range(0, N, BK):
            at = n + tl.arange(0, BK)
            S = _tile(kept, at, N, ds, D, D, BD)
            keys = _tile(r, rows, T, at, N if HEADS_FIRST else H * N, N, BK)
            acc = tl.dot(keys.to(DOT), S.to(DOT), acc, input_precision=PRECISION)
        if decay is not None or documents is not None:
            marks = None if documents is None else documents + b * T
            edge = 0 if documents is None else _document(marks, end - 1 if REVERSE else begin - 1)
            fade = None if decay is None else tl.load(decay + h)
            apart = tl.maximum(end - rows if REVERSE else rows - begin, 0)
            acc *= _weights(apart, rows, T, edge, marks, fade)[:, None]
    for t in range(i * BT if REVERSE else begin, end if REVERSE else tl.minimum(i * BT + BT, T), BK):
        at = t + tl.arange(0, BK)
        part = _tile(p, at, T, rows - begin, L, L, BT) if REVERSE else _tile(p, rows, T, at - begin, L, L, BK)
        part, values = tl.trans(part) if REVERSE else part, _tile(x, at, T, ds, G * D, D, BD)
        acc = tl.dot(part.to(DOT), values.to(DOT), acc, input_precision=PRECISION)
    out += (b * T * H + h) * D
    to = out + rows.to(tl.int64)[:, None] * (H * D) + ds[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(rows < T)[:, None] & (ds < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def pull(
    r, v, d_a, kept, d_kept, q, out, documents, decay, T,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, L: tl.constexpr, HEADS_FIRST: tl.constexpr,
    FRESH: tl.constexpr, UNUSED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, as r: gradients of r, a tile of rows and neurons. q [B, H, T, L]: Q + Q^T.

    FRESH: no memory came in. UNUSED: no gradient of the last memory.
    """
    i, n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h, segments, segment = bh // H, bh % H, tl.cdiv(T, L), i * BT // L
    begin = segment * L
    end = tl.minimum(begin + L, T)
    rows, neurons = i * BT + tl.arange(0, BT), n * BN + tl.arange(0, BN)
    stride = N if HEADS_FIRST else H * N
    r += _first(b, h, T, H, N, HEADS_FIRST)
    out += _first(b, h, T, H, N, HEADS_FIRST)
    d_a += _first(b, h, T, H, D, False)
    v += _first(b, h // (H // G), T, G, D, False)
    kept += (bh * segments + segment) * N * D
    d_kept += (bh * segments + segment) * N * D
    fade = None if decay is None else tl.load(decay + h)
    marks = None if documents is None else documents + b * T
    acc = tl.zeros([BT, BN], tl.float32)
    if not FRESH or segment > 0:
        edge = 0 if documents is None else _document(marks, begin - 1)
        weight = _weights(rows - begin, rows, T, edge, marks, fade)[:, None]
        for d in range(0, D, BK):
            ds = d + tl.arange(0, BK)
            from_a, S = _tile(d_a, rows, T, ds, H * D, D, BK), _tile(kept, neurons, N, ds, D, D, BK)
            acc = tl.dot((from_a * weight).to(DOT), tl.trans(S.to(DOT)), acc, input_precision=PRECISION)
    if not UNUSED or segment < segments - 1:
        edge = 0 if documents is None else _document(marks, end - 1)
        weight = _weights(tl.maximum(end - rows, 0), rows, T, edge, marks, fade)[:, None]
        for d in range(0, D, BK):
            ds = d + tl.arange(0, BK)
            values, d_S = _tile(v, rows, T, ds, G * D, D, BK), _tile(d_kept, neurons, N, ds, D, D, BK)
            acc = tl.dot((values * weight).to(DOT), tl.trans(d_S.to(DOT)), acc, input_precision=PRECISION)
    q += bh * T * L
    for t in range(begin, end, BK):
        at = t + tl.arange(0, BK)
        part, keys = _tile(q, rows, T, at - begin, L, L, BK), _tile(r, at, T, neurons, stride, N, BN)
        acc = tl.dot(part.to(DOT), keys.to(DOT), acc, input_precision=PRECISION)
    to = out + rows.to(tl.int64)[:, None] * stride + neurons[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(rows < T)[:, None] & (neurons < N)[None, :])
