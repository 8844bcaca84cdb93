"""What delta_inputs' kernels move: v stays where it is; nothing is a product of matrices.

q, k, g and beta are fp32 whatever the inputs are, and so are their gradients, a_log and dt_bias. Backward as sm_90's
table cuts.
"""

from seqzoo.benchmarks.shapes import Model, Pass, Shape, cut


def _inputs(s: Shape) -> tuple[int, int]:
    """[bytes] b and a of each value head; a_log and dt_bias."""
    return 2 * s.rows * s.HV * s.size, 2 * s.HV * 4


def _least(s: Shape) -> list[Pass]:
    ba, heads = _inputs(s)
    return [Pass("all", 2 * s.keys + ba + heads + 2 * s.keys // s.size * 4 + 2 * s.gates)]


def _ours(s: Shape) -> list[Pass]:
    return [_least(s)[0]._replace(name="delta_inputs_forward")]


def _least_backward(s: Shape) -> list[Pass]:
    """Gradients of q, k and v side by side, as qkv was: so v's is copied."""
    ba, heads = _inputs(s)
    return [Pass("all", 4 * s.keys + 2 * ba + 2 * heads + 2 * s.keys // s.size * 4 + 2 * s.gates + 2 * s.values)]


def _ours_backward(s: Shape) -> list[Pass]:
    """Each program has a block of key heads and writes its tokens' share of the gradients of a_log and dt_bias."""
    (least,), (_, heads) = _least_backward(s), _inputs(s)
    shares = -(-s.rows * s.H // cut("delta_inputs", "backward", s.size, K=s.K)["BR"]) * heads
    return [
        Pass("delta_inputs_backward", least.moved - heads + shares),
        Pass("torch sum of shares", shares + heads),
        Pass("torch copies", 2 * heads),
    ]


SHAPES = {"2x4096, 16/32 heads": Shape(2, 4096, 16, 32), "1x32768, 16/32 heads": Shape(1, 32768, 16, 32)}
OP, UNIT = "delta_inputs", ("token", lambda s: s.rows)
MODELS = [
    Model(OP, "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model(OP, "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
]
