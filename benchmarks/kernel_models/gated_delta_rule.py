"""What gated_delta_rule's kernels move and multiply, in chunks of 64.

fla's (0.6) and FlashQLA's (0.1.2) were read from their code. Ours: one sequence in one part, no first memory, and a
gradient of the last one; fp32 and bf16 alike, with `size` bytes for what kernels hand each other.
"""

from seqzoo.benchmarks.shapes import Model, Pass, Shape, per_token_and_head, step_shapes


def _least(s: Shape) -> list[Pass]:
    """Inputs and outputs once; products as a recurrence over chunks, q k^T and k k^T once for a group of heads."""
    flops = s.products(CK=2 * s.H / s.HV, CV=2, KV=3, CC=1)
    return [Pass("all", 2 * s.keys + 2 * s.values + 2 * s.gates + s.state, flops)]


def _least_backward(s: Shape) -> list[Pass]:
    flops = s.products(CK=6, CV=5, KV=8)
    return [Pass("all", 4 * s.keys + 3 * s.values + 4 * s.gates + s.state, flops)]


def _fla(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size  # per value head, as w and the gradients of q and k are
    return [
        Pass("cumsum", 2 * s.gates),
        Pass("kkt and solve", s.keys + 2 * s.gates + 2 * s.squares, s.products(CK=1, CC=1)),
        Pass("w, u", s.keys + s.values + s.squares + 2 * s.gates + wide + s.values, s.products(CK=1, CV=1)),
        Pass("states", s.keys + wide + 2 * s.values + s.gates + s.states(2) + s.state, s.products(KV=2)),
        Pass("output", 2 * s.keys + 2 * s.values + s.gates + s.states(2), s.products(KV=1, CK=1, CV=1)),
    ]


def _fla_backward(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size
    return [
        *_fla(s)[2:4],
        Pass("local dv", 2 * s.keys + 2 * s.values + s.gates, s.products(CK=1, CV=1)),
        Pass("dstates", 2 * s.keys + wide + 3 * s.values + s.gates + s.states(2) + s.state, s.products(KV=4)),
        Pass(
            "dq, dk, dw, dg",
            2 * s.keys + 3 * s.values + 2 * s.gates + 2 * s.states(2) + 3 * wide,
            s.products(KV=4, CV=1, CK=2),
        ),
        Pass(
            "w, u backward",  # dk is written, read again and written over
            s.keys + 3 * s.values + s.squares + 4 * s.gates + 3 * wide,
            s.products(CK=4, CV=3, CC=4),
        ),
        Pass("sums and cumsum", 5 * wide + 4 * s.gates + 2 * s.keys),
    ]


def _qla(s: Shape) -> list[Pass]:
    """Without its split of a sequence, which reads k, v and A once more where heads are few."""
    flops = s.products(CK=2, CV=2, KV=3)
    return [
        Pass("cumsum", 2 * s.gates),
        Pass("kkt and solve", s.keys + s.gates + s.squares, s.products(CK=1, CC=1)),
        Pass("all the rest", 2 * s.keys + 2 * s.values + s.squares + 2 * s.gates + s.state, flops),
    ]


def _qla_backward(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size
    inputs = s.keys + s.values + s.squares + 2 * s.gates
    return [
        Pass("states", inputs + s.states(2), s.products(KV=2, CK=0, CV=1)),
        Pass(
            "gradients",
            inputs + s.keys + s.values + s.states(2) + 2 * wide + s.values + 2 * s.gates + s.state,
            s.products(CK=6, CV=5, KV=7, CC=4),
        ),
        Pass("sums over a group", 2 * wide + 2 * s.keys if s.HV > s.H else 0),
        Pass("cumsum", 2 * s.gates),
    ]


def _ours(s: Shape) -> list[Pass]:
    """The inverse of a chunk of 64, by doubling, is what 4.375 CC are."""
    group = s.HV / s.H
    return [
        Pass("_prepare", 2 * s.keys + 5 * s.gates + 2 * s.squares, s.products(CK=2 / group, CC=4.375)),
        Pass(
            "_forward",
            2 * s.keys + 2 * s.values + 2 * s.squares + 3 * s.gates + s.state,
            s.products(KV=3, CV=2),
        ),
    ]


def _ours_backward(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size  # gradients of q or k, by value head
    kept = 2 * s.states(s.handed) + 2 * s.values // s.size * s.handed  # memories, Z, and gradients of both
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


def _step_least(s: Shape) -> list[Pass]:
    """Memories are read and written, and where they stand in the pool is read; nothing is a product of matrices."""
    return [Pass("all", 2 * s.keys + 2 * s.values + 2 * s.gates + 2 * s.state + 8 * s.B)]


def _step(s: Shape) -> list[Pass]:
    return [_step_least(s)[0]._replace(name="gated_delta_rule_steps")]


def _step_fla(s: Shape) -> list[Pass]:
    """fused_recurrent_gated_delta_rule knows no pool: memories are gathered before it and scattered after it."""
    kernel = 2 * s.keys + 2 * s.values + 2 * s.gates + 2 * s.state
    return [
        Pass("torch gather", 2 * s.state + 8 * s.B),
        Pass("fused recurrent", kernel),
        Pass("torch scatter", 2 * s.state + 8 * s.B),
    ]


# The shapes, and fla's and FlashQLA's times on an H200, that FlashQLA publishes (its benchmark_results_H200.txt).
SHAPES = {
    "1x32768, 16/32 heads": Shape(1, 32768, 16, 32),
    "1x8192, 16/32 heads": Shape(1, 8192, 16, 32),
    "4x8192, 16/32 heads": Shape(4, 8192, 16, 32),
    "1x32768, 4/8 heads": Shape(1, 32768, 4, 8),
    "1x32768, 2/8 heads": Shape(1, 32768, 2, 8),
}
FORWARD = {
    "1x32768, 16/32 heads": dict(fla=1.890, FlashQLA=0.877),
    "1x8192, 16/32 heads": dict(fla=0.472, FlashQLA=0.280),
    "4x8192, 16/32 heads": dict(fla=1.898, FlashQLA=0.611),
    "1x32768, 2/8 heads": dict(fla=0.902, FlashQLA=0.320),
}
BACKWARD = {
    "1x32768, 16/32 heads": dict(fla=5.697, FlashQLA=2.515),
    "1x8192, 16/32 heads": dict(fla=1.444, FlashQLA=0.789),
    "1x32768, 4/8 heads": dict(fla=2.743, FlashQLA=0.887),
}
UNIT = "token and head", per_token_and_head
MODELS = [
    Model(
        "gated_delta_rule", "forward", *UNIT, SHAPES,
        dict(least=_least, seqzoo=_ours, fla=_fla, FlashQLA=_qla), FORWARD,
    ),
    Model(
        "gated_delta_rule", "backward", *UNIT, SHAPES,
        dict(least=_least_backward, seqzoo=_ours_backward, fla=_fla_backward, FlashQLA=_qla_backward), BACKWARD,
    ),
    Model(
        "gated_delta_rule", "step", *UNIT, step_shapes((16, 32), (8, 8)),
        dict(least=_step_least, seqzoo=_step, fla=_step_fla),
    ),
]  # fmt: skip
