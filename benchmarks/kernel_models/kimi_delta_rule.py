"""What kimi_delta_rule's kernels move and multiply, in chunks of 64. q, k, v have as many heads; ours with no first
memory, and a gradient of the last one, as sm_90's table cuts; `size` bytes for what kernels hand each other.
"""

from seqzoo.benchmarks.shapes import Model, Pass, Shape, cut, per_token_and_head, step_shapes


def _parts(s: Shape) -> tuple[float, float, float, float]:
    """[bytes] All log decays; of what kernels hand each other: one as wide as K, one as V, what chunks keep."""
    heads = s.rows * s.HV
    return heads * s.K * 4, heads * s.K * s.handed, heads * s.V * s.handed, s.chunks * s.HV * s.K * 4


def _least(s: Shape) -> list[Pass]:
    """Inputs and outputs once; products as a recurrence over chunks, as of the gated delta rule."""
    decays, *_ = _parts(s)
    flops = s.products(CK=2, CV=2, KV=3, CC=1)
    return [Pass("all", 2 * s.keys + 2 * s.values + decays + s.gates + s.state, flops)]


def _least_backward(s: Shape) -> list[Pass]:
    decays, *_ = _parts(s)
    flops = s.products(CK=6, CV=5, KV=8)
    return [Pass("all", 4 * s.keys + 3 * s.values + 2 * decays + 2 * s.gates + s.state, flops)]


def _prepare(s: Shape, inverse: bool) -> Pass:
    """The inverse of a chunk of 64, by doubling, is what 4.375 CC are."""
    decays, wide, valued, keep = _parts(s)
    flops = s.products(CK=13 if inverse else 7, CV=1, CC=4.375 if inverse else 0)
    made = 2 * s.squares + 3 * wide + valued + keep
    return Pass("prepare", 2 * s.keys + s.values + decays + s.gates + made, flops)


def _ours(s: Shape) -> list[Pass]:
    _, wide, valued, keep = _parts(s)
    moved = 3 * wide + valued + s.squares + keep + s.values + s.state
    return [_prepare(s, inverse=True), Pass("forward", moved, s.products(KV=3, CV=1))]


def _ours_backward(s: Shape) -> list[Pass]:
    decays, wide, valued, keep = _parts(s)
    slices = -(-s.K // cut("kimi_delta_rule", "gradients", s.size, K=s.K, V=s.V)["BK"])
    memories = 2 * s.states(s.handed)
    return [
        _prepare(s, inverse=False),
        Pass(
            "both_ways",
            s.values + 3 * (wide + valued) + s.squares + keep + 2 * s.state + memories,
            s.products(KV=5, CV=1),
        ),
        Pass("squares", 3 * (s.values + valued + s.squares) + 2 * s.gates, s.products(CV=3)),
        Pass(
            "gradients",
            4 * s.keys + 2 * decays + (1 + slices) * s.gates + s.values + memories + 2 * (valued + s.squares),
            s.products(KV=3, CK=20),
        ),
        Pass("torch sum of slices", (2 + slices) * s.gates),
    ]


def _step_least(s: Shape) -> list[Pass]:
    """Memories are read and written, and where they stand in the pool is read; nothing is a product of matrices."""
    decays, *_ = _parts(s)
    return [Pass("all", 2 * s.keys + 2 * s.values + decays + s.gates + 2 * s.state + 8 * s.B)]


def _step(s: Shape) -> list[Pass]:
    return [_step_least(s)[0]._replace(name="kimi_delta_rule_steps")]


SHAPES = {
    "1x32768, 32 heads": Shape(1, 32768, 32, 32),  # Kimi-Linear-48B-A3B's
    "4x8192, 32 heads": Shape(4, 8192, 32, 32),
}
UNIT = "token and head", per_token_and_head
MODELS = [
    Model("kimi_delta_rule", "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model("kimi_delta_rule", "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
    Model("kimi_delta_rule", "step", *UNIT, step_shapes((32, 32)), dict(least=_step_least, seqzoo=_step)),
]
