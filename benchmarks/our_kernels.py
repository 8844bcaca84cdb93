"""What our Triton kernels move and multiply, kernel by kernel: formulas, in bf16 as on sm_90, one sequence in one part.

tests/test_roofline.py holds each of them against the loads, stores and products that the interpreter counts. A pass has
the name of its kernel, and `size` bytes for what kernels hand each other.
"""

from seqzoo.benchmarks.shapes import C, Pass, Shape

SLICE = 64  # columns of a program where linear attention's parallel kernels cut K and V


def delta(s: Shape) -> list[Pass]:
    """gated_delta_rule, forward."""
    group = s.HV / s.H
    return [
        Pass("_prepare", 2 * s.keys + 5 * s.gates + 2 * s.squares, s.products(CK=2 / group, CC=4.375)),
        Pass(
            "_forward",
            2 * s.keys + 2 * s.values + 2 * s.squares + 3 * s.gates + s.state,
            s.products(KV=3, CV=2),
        ),
    ]


def delta_backward(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size  # gradients of q or k, by value head
    kept = 2 * s.states(s.size) + 2 * s.values  # memories, Z, and the gradients of both
    return [
        Pass("_prepare", 2 * s.keys + 5 * s.gates + s.squares, s.products(CK=s.H / s.HV)),
        Pass(
            "_both_ways",
            2 * s.keys + 2 * s.values + 2 * s.squares + 3 * s.gates + 2 * s.state + kept,
            s.products(KV=5, CV=3),
        ),
        Pass(
            "_gradients",
            2 * s.keys + 3 * s.values + kept + 4 * s.gates + 2 * wide,
            s.products(CK=6, CV=2, KV=3),
        ),
        *([Pass("_sum_groups", 2 * wide + 2 * s.keys)] if s.HV > s.H else []),
    ]


def _linear(s: Shape) -> tuple[float, ...]:
    """[bytes] q, k, v, decays of each memory, all chunks' memories. HV query heads read H memories."""
    read, kept = s.rows * s.HV * s.size, s.rows * s.H * s.size
    return read * s.K, kept * s.K, kept * s.V, s.rows * s.H * 4, s.chunks * s.H * s.K * s.V * s.size


def _slices(width: int, slice: int = SLICE) -> int:
    return -(-width // slice)


def linear(s: Shape) -> list[Pass]:
    """linear_attention with a decay per head, forward: one pass, or for grouped heads two."""
    (q, k, v, g, memories), share = _linear(s), s.H / s.HV
    if s.H == s.HV:
        return [Pass("scan", q + k + v + g + s.values + s.state, s.products(CK=1, CV=1, KV=2))]
    return [
        Pass("states", k + v + g + memories + s.state * share, s.products(KV=share)),
        Pass("outputs", q + k + v + g + memories + s.values, s.products(CK=_slices(s.V), CV=1, KV=1)),
    ]


def linear_backward(s: Shape) -> list[Pass]:
    (q, k, v, g, memories), share = _linear(s), s.H / s.HV
    return [
        Pass("states", q + k + v + s.values + 2 * g + 2 * memories + s.state * share, s.products(KV=1 + share)),
        Pass(
            "value_gradients",
            q + k + g + s.values + memories + v,
            s.products(CK=_slices(s.V), CV=1, KV=share),
        ),
        Pass(
            "gradients",
            2 * (q + k + g) + v + s.values + 2 * memories,
            s.products(CK=3, CV=_slices(s.K), KV=1 + share),
        ),
    ]


def channel(s: Shape) -> list[Pass]:
    """linear_attention with a decay per key channel, forward."""
    (q, k, v, g, memories), share = _linear(s), s.H / s.HV
    g, keep = g * s.K, s.chunks * s.H * s.K * 4
    prepare = Pass("prepare", 2 * (q + k) + g + s.squares + keep, s.products(CK=6))
    if s.H == s.HV:
        scan = Pass("scan", q + k + v + s.squares + keep + s.values + s.state, s.products(CV=1, KV=2))
        return [prepare, scan]
    return [
        prepare,
        Pass("states", k + v + keep + memories + s.state * share, s.products(KV=share)),
        Pass("outputs", q + v + s.squares + memories + s.values, s.products(CV=1, KV=1)),
    ]


def channel_backward(s: Shape) -> list[Pass]:
    (q, k, v, g, memories), share = _linear(s), s.H / s.HV
    g, keep = g * s.K, s.chunks * s.H * s.K * 4
    return [
        channel(s)[0],
        Pass("states", q + k + v + s.values + 2 * keep + 2 * memories + s.state * share, s.products(KV=1 + share)),
        Pass("value_gradients", k + s.squares + s.values + memories + v, s.products(CV=1, KV=share)),
        Pass(
            "channel_gradients",
            2 * (q + k + g) + v + s.values + 2 * memories,
            s.products(CK=13 + share, CV=_slices(s.K, 32), KV=1 + share),
        ),
    ]


assert C == 64  # the formulas of products say so where an inverse is made by doubling
