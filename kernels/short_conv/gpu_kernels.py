"""The short convolution on a GPU: a program goes through a segment of time, its channels' last inputs in registers.

Every input is read once, but for W - 1 tokens beside a segment. U tokens are loaded before the first is used, which
hides the memory's latency where warps are few.

Each sum of products is written as fused multiply-adds, in one order: left to itself a compiler rounds a * b + c * d one
way in one variant of a kernel, another way in the next, and a document's bits would change with who is beside it.
"""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.slots import slot_of


@triton.jit
def _place(T, C, S: tl.constexpr, BC: tl.constexpr):
    """This program's row and first token (int64), its channels, whether they are there, and its number as a segment."""
    strips, segments, here = tl.cdiv(C, BC), tl.cdiv(T, S), tl.program_id(0)
    segment, cs = here // strips, here % strips * BC + tl.arange(0, BC)
    return (segment // segments).to(tl.int64), (segment % segments * S).to(tl.int64), cs, cs < C, segment


@triton.jit
def _taps(weight, cs, inside, W: tl.constexpr):
    """W filter taps, the oldest first, fp32 [BC] each."""
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + cs * W + w, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _kept(values, begun, N: tl.constexpr):
    """N values, or zeros where a document has begun."""
    kept = ()
    for n in tl.static_range(N):
        kept = kept + (tl.where(begun, 0.0, values[n]),)
    return kept


@triton.jit
def _filtered(taps, window, W: tl.constexpr):
    """The sum of W products."""
    z = taps[0] * window[0]
    for w in tl.static_range(1, W):
        z = tl.fma(taps[w], window[w], z)
    return z


@triton.jit
def _before(x, past, starts, t, x_token, past_token, inside, W: tl.constexpr):
    """The W - 1 inputs before token t, the oldest first, fp32; zeros for those of another document than t - 1's."""
    window = ()
    for w in tl.static_range(W - 1):
        at = t - (W - 1) + w
        value = tl.load(x + at * x_token, mask=tl.where(at >= 0, inside, False), other=0.0).to(tl.float32)
        if past is not None:
            older = past + (at + W - 1) * past_token
            older = tl.load(older, mask=tl.where(at < 0, inside, False), other=0.0).to(tl.float32)
            value = tl.where(at < 0, older, value)
        if starts is not None:
            window = _kept(window, tl.load(starts + at, mask=at >= 0, other=0) != 0, w)
        window = window + (value,)
    return window


@triton.jit(do_not_specialize=["T", "slots"])
def short_conv_forward(
    x, weight, past, starts, index, y, following,
    T, C, slots, x_row, x_token, past_row, past_token, next_row, next_token,
    W: tl.constexpr, U: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y, and by each row's last segment what follows `past`, which may be `past` itself where one segment is all."""
    row, first, cs, inside, _ = _place(T, C, S, BC)
    slot, live, nothing = slot_of(index, row, slots)
    here = tl.where(live, inside, False)
    x, y, following = x + row * x_row + cs, y + row * T * C + cs, following + slot * next_row + cs
    if past is not None:
        past += slot * past_row + cs
    if starts is not None:
        starts += row * T
    taps, window = _taps(weight, cs, inside, W), _before(x, past, starts, first, x_token, past_token, here, W)
    for t0 in range(first, tl.minimum(first + S, T), U):
        fresh = ()
        for u in tl.static_range(U):
            t = t0 + u
            fresh = fresh + (tl.load(x + t * x_token, mask=tl.where(t < T, here, False), other=0.0),)
        for u in tl.static_range(U):
            t = t0 + u
            if starts is not None:
                window = _kept(window, tl.load(starts + t, mask=t < T, other=0) != 0, W - 1)
            window = window + (fresh[u].to(tl.float32),)
            z = _filtered(taps, window, W)
            if index is not None:
                z += nothing
            tl.store(y + t * C, z / (1.0 + tl.exp(-z)), mask=tl.where(t < T, inside, False))
            window = window[1:]
    if first + S >= T:
        last = _before(x, past, starts, first * 0 + T, x_token, past_token, here, W)
        tl.debug_barrier()  # all of past is read before any is written over
        for w in tl.static_range(W - 1):
            tl.store(following + w * next_token, last[w], mask=here)


@triton.jit(do_not_specialize=["T"])
def short_conv_backward(
    x, weight, past, starts, dy, dnext, dx, dpast, dtaps,
    T, C, x_row, x_token, past_row, past_token,
    W: tl.constexpr, U: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of a segment, dpast of a row's first, and dtaps [segments, W, C], each segment's share of dweight.

    What tokens t - W + 1 .. t - 1 have gathered is pending; with what token t adds, the oldest of them is done. So we
    read W - 1 tokens beyond the segment's end.
    """
    row, first, cs, inside, segment = _place(T, C, S, BC)
    end = tl.minimum(first + S, T)
    x, dy, dx = x + row * x_row + cs, dy + row * T * C + cs, dx + row * T * C + cs
    dnext += row * (W - 1) * C + cs
    if past is not None:
        past, dpast = past + row * past_row + cs, dpast + row * (W - 1) * C + cs
    if starts is not None:
        starts += row * T
    taps, window = _taps(weight, cs, inside, W), _before(x, past, starts, first, x_token, past_token, inside, W)
    zero, none = tl.zeros([BC], tl.float32), first < 0
    pending, begun, shares = (), (), (zero,)  # begun: has a document, since the token that is pending
    for _ in tl.static_range(W - 1):
        pending, begun, shares = pending + (zero,), begun + (none,), shares + (zero,)
    for n in tl.static_range(W - 1):  # the tokens done here stand before the segment
        t = first + n
        there = tl.where(t < T, inside, False)
        beside = tl.load(x + t * x_token, mask=there, other=0.0), tl.load(dy + t * C, mask=there, other=0.0)
        done, window, pending, begun, shares = _token(
            beside, t, T, end, window, pending, begun, shares, taps, starts, dnext, C, inside, W
        )
        if past is not None:
            tl.store(dpast + n * C, done, mask=tl.where(first == 0, inside, False))
    for t0 in range(first + W - 1, end + W - 1, U):
        given = ()
        for u in tl.static_range(U):
            t = t0 + u
            there = tl.where(t < T, inside, False)
            given = given + (
                (tl.load(x + t * x_token, mask=there, other=0.0), tl.load(dy + t * C, mask=there, other=0.0)),
            )
        for u in tl.static_range(U):
            t = t0 + u
            done, window, pending, begun, shares = _token(
                given[u], t, T, end, window, pending, begun, shares, taps, starts, dnext, C, inside, W
            )
            tl.store(dx + (t - (W - 1)) * C, done, mask=tl.where(t - (W - 1) < end, inside, False))
    dtaps += segment.to(tl.int64) * W * C + cs
    for w in tl.static_range(W):
        tl.store(dtaps + w * C, shares[w], mask=inside)


@triton.jit
def _token(given, t, T, end, window, pending, begun, shares, taps, starts, dnext, C, inside, W: tl.constexpr):
    """The gradient of input t - W + 1, and all that is carried on to token t + 1."""
    if starts is not None:
        now, after = tl.load(starts + t, mask=t < T, other=0) != 0, ()
        for n in tl.static_range(W - 1):
            after = after + (begun[n] | now,)
        begun, window = after, _kept(window, now, W - 1)
    window, pending = window + (given[0].to(tl.float32),), pending + (tl.zeros_like(taps[0]),)
    z = _filtered(taps, window, W)
    open = 1.0 / (1.0 + tl.exp(-z))
    dz = given[1].to(tl.float32) * open * tl.fma(z, 1.0 - open, tl.full(z.shape, 1.0, tl.float32))
    ours = tl.where(t < end, dz, 0.0)  # what is beyond belongs to the next segment
    gathered, summed = (), ()
    for w in tl.static_range(W):
        more = tl.fma(taps[w], dz, pending[w])
        if starts is not None and w < W - 1:
            more = tl.where(begun[w], pending[w], more)
        gathered, summed = gathered + (more,), summed + (tl.fma(ours, window[w], shares[w]),)
    done = gathered[0]
    if W > 1:  # an input near the end is in the next past, too
        s = t - (W - 1)
        kept = tl.where((s >= T - (W - 1)) & (s < T), inside, False)
        copy = tl.load(dnext + (s - T + W - 1) * C, mask=kept, other=0.0).to(tl.float32)
        if starts is not None:
            copy = tl.where(begun[0], 0.0, copy)
        done += copy
    return done, window[1:], gathered[1:], (begun + (t < 0,))[1:], summed
