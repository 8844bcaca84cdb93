"""What linear_attention's kernels move and multiply, in chunks of 64: with a decay per head, or per key channel.

HV query heads read the memories of H. fla's (0.6) were read from its code. Ours: as sm_90's table cuts bf16, one
sequence in one part, no first memory, and a gradient of the last one; `size` bytes for what kernels hand each other.
"""

from seqzoo.benchmarks.shapes import Model, Pass, Shape, per_token_and_head, step_shapes

SLICE = 64  # columns of a program where our parallel kernels cut K and V


def _parts(s: Shape) -> tuple[float, ...]:
    """[bytes] q, k, v, decays of each memory, all chunks' memories. HV query heads read H memories."""
    read, kept = s.rows * s.HV * s.size, s.rows * s.H * s.size
    return read * s.K, kept * s.K, kept * s.V, s.rows * s.H * 4, s.chunks * s.H * s.K * s.V * s.handed


def _slices(width: int, slice: int = SLICE) -> int:
    return -(-width // slice)


def _least(s: Shape) -> list[Pass]:
    q, k, v, g, _ = _parts(s)
    return [Pass("all", q + k + v + s.values + g + s.state / s.HV * s.H, s.products(CK=1, CV=1, KV=1 + s.H / s.HV))]


def _least_backward(s: Shape) -> list[Pass]:
    q, k, v, g, _ = _parts(s)
    flops = s.products(CK=3, CV=2, KV=2 + 3 * s.H / s.HV)
    return [Pass("all", 2 * (q + k + v + g) + s.values + s.state / s.HV * s.H, flops)]


def _fla(s: Shape) -> list[Pass]:
    """simple_gla, which has no groups: k and v repeated for every query head, as its layers do."""
    s = s._replace(H=s.HV)
    q, k, v, g, h = _parts(s)
    return [
        Pass("cumsum", 2 * g),
        Pass("states", k + v + g + h / 2 + s.state, s.products(KV=1)),
        Pass("output", q + k + v + g + h / 2 + s.values, s.products(KV=1, CK=1, CV=1)),
    ]


def _fla_backward(s: Shape) -> list[Pass]:
    s = s._replace(H=s.HV)
    q, k, v, g, h = _parts(s)
    return [
        Pass("states", k + v + g + h, s.products(KV=1)),
        Pass("dstates", q + s.values + g + h, s.products(KV=1)),
        Pass("dq, dk, dg", q + k + v + s.values + g + 2 * h + q + k + g, s.products(KV=2, CV=1, CK=3)),
        Pass("dv", q + k + s.values + g + h + v, s.products(KV=1, CK=1, CV=1)),
        Pass("cumsum", 2 * g),
    ]


def _channel_least(s: Shape) -> list[Pass]:
    (least,), more = _least(s), s.rows * s.H * 4 * (s.K - 1)
    return [least._replace(moved=least.moved + more)]


def _channel_least_backward(s: Shape) -> list[Pass]:
    (least,), more = _least_backward(s), s.rows * s.H * 4 * (s.K - 1)
    return [least._replace(moved=least.moved + 2 * more)]


def _ours(s: Shape) -> list[Pass]:
    """With a decay per head: one pass, or for grouped heads two."""
    (q, k, v, g, memories), share = _parts(s), s.H / s.HV
    if s.H == s.HV:
        return [Pass("scan", q + k + v + g + s.values + s.state, s.products(CK=_slices(s.V, 32), CV=1, KV=2))]
    return [
        Pass("states", k + v + g + memories + s.state * share, s.products(KV=share)),
        Pass("outputs", q + k + v + g + memories + s.values, s.products(CK=_slices(s.V), CV=1, KV=1)),
    ]


def _ours_backward(s: Shape) -> list[Pass]:
    (q, k, v, g, memories), share, slices = _parts(s), s.H / s.HV, _slices(s.K)
    return [
        Pass("states", q + k + v + s.values + 2 * g + 2 * memories + s.state * share, s.products(KV=1 + share)),
        Pass(
            "value_gradients",
            q + k + g + s.values + memories + v,
            s.products(CK=_slices(s.V), CV=1, KV=share),
        ),
        Pass(
            "gradients",
            2 * (q + k) + (1 + slices) * g + v + s.values + 2 * memories,
            s.products(CK=3, CV=slices, KV=1 + share),
        ),
        *([Pass("torch sum of slices", (slices + 1) * g)] if slices > 1 else []),
    ]


def _channel(s: Shape) -> list[Pass]:
    """With a decay per key channel."""
    (q, k, v, g, memories), share = _parts(s), s.H / s.HV
    g, keep = g * s.K, s.chunks * s.H * s.K * 4
    reads, writes = (x // s.size * s.handed for x in (q, k))  # faded queries and keys
    prepare = Pass("prepare", q + k + g + reads + writes + s.squares + keep, s.products(CK=6))
    if s.H == s.HV:
        scan = Pass("scan", reads + writes + v + s.squares + keep + s.values + s.state, s.products(CV=1, KV=2))
        return [prepare, scan]
    return [
        prepare,
        Pass("states", writes + v + keep + memories + s.state * share, s.products(KV=share)),
        Pass("outputs", reads + v + s.squares + memories + s.values, s.products(CV=1, KV=1)),
    ]


def _channel_backward(s: Shape) -> list[Pass]:
    (q, k, v, g, memories), share = _parts(s), s.H / s.HV
    g, keep = g * s.K, s.chunks * s.H * s.K * 4
    reads, writes = (x // s.size * s.handed for x in (q, k))
    return [
        _channel(s)[0],
        Pass(
            "states",
            reads + writes + v + s.values + 2 * keep + 2 * memories + s.state * share,
            s.products(KV=1 + share),
        ),
        Pass("value_gradients", writes + s.squares + s.values + memories + v, s.products(CV=1, KV=share)),
        Pass(
            "channel_gradients",
            2 * (q + k + g) + v + s.values + 2 * memories,
            s.products(CK=13 + share, CV=_slices(s.K, 32), KV=1 + share),
        ),
    ]


def _step_least(s: Shape) -> list[Pass]:
    """Memories are read and written, and where they stand in the pool is read; nothing is a product of matrices."""
    q, k, v, g, _ = _parts(s)
    return [Pass("all", q + k + v + g + s.values + 2 * s.state / s.HV * s.H + 8 * s.B)]


def _step(s: Shape) -> list[Pass]:
    return [_step_least(s)[0]._replace(name="linear_attention_steps")]


def _channel_step_least(s: Shape) -> list[Pass]:
    (least,) = _step_least(s)
    return [least._replace(moved=least.moved + s.rows * s.H * 4 * (s.K - 1))]


def _channel_step(s: Shape) -> list[Pass]:
    return [_channel_step_least(s)[0]._replace(name="linear_attention_steps")]


SHAPES = {
    "1x32768, 32/32 heads": Shape(1, 32768, 32, 32),
    "1x32768, 16/32 heads": Shape(1, 32768, 16, 32),
    "1x8192, 28 heads on 4 memories": Shape(1, 8192, 4, 28),  # SpikingBrain-7B's
}
STEPS = step_shapes((32, 32), (4, 28))
UNIT = "token and head", per_token_and_head
CHANNEL = "linear_attention by channel"
MODELS = [
    Model("linear_attention", "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours, fla=_fla)),
    Model(
        "linear_attention", "backward", *UNIT, SHAPES,
        dict(least=_least_backward, seqzoo=_ours_backward, fla=_fla_backward),
    ),
    Model("linear_attention", "step", *UNIT, STEPS, dict(least=_step_least, seqzoo=_step)),
    Model(CHANNEL, "forward", *UNIT, SHAPES, dict(least=_channel_least, seqzoo=_channel)),
    Model(CHANNEL, "backward", *UNIT, SHAPES, dict(least=_channel_least_backward, seqzoo=_channel_backward)),
    Model(CHANNEL, "step", *UNIT, STEPS, dict(least=_channel_step_least, seqzoo=_channel_step)),
]  # fmt: skip
