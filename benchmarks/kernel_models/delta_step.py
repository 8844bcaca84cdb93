"""What delta_step's kernel moves, and what its parts' four would; nothing is a product of matrices.

Filters of 4 taps; a_log and dt_bias are fp32.
"""

from seqzoo.benchmarks.kernel_models import delta_inputs, gated_delta_rule, rms_norm, short_conv
from seqzoo.benchmarks.shapes import Model, Pass, Rows, Shape, per_token_and_head, step_shapes

TAPS = 4


def _channels(s: Shape) -> int:
    return 2 * s.H * s.K + s.HV * s.V


def _least(s: Shape) -> list[Pass]:
    """qkv, gate and y; b and a; filters and weights; both states read and written, and where they stand in pools."""
    C = _channels(s)
    time = s.rows * C * s.size + 2 * s.values + 2 * s.rows * s.HV * s.size
    constant = (TAPS * C + s.V) * s.size + 2 * s.HV * 4
    return [Pass("all", time + constant + 2 * s.B * (TAPS - 1) * C * s.size + 2 * s.state + 8 * s.B)]


def _ours(s: Shape) -> list[Pass]:
    """What is read stands in memory in fp32 until the norm has seen all of it: where y is fp32, it is y's place."""
    (least,) = _least(s)
    return [Pass("delta_steps", least.moved + (s.values if s.size == 4 else 2 * s.values // s.size * 4))]


def _parts(s: Shape) -> list[Pass]:
    """Ours one after the other, as layers call them where the step does not run: q and k are fp32 between them."""
    keys = s.keys // s.size * 4
    (rule,) = gated_delta_rule.MODELS[2].sides["seqzoo"](s)
    norm = Rows(s.rows * s.HV, s.V, s.size)
    return [
        *short_conv.MODELS[2].sides["seqzoo"](short_conv.Conv(s.B, s.T, _channels(s), TAPS, s.size)),
        *delta_inputs.MODELS[0].sides["seqzoo"](s),
        rule._replace(moved=rule.moved + 2 * (keys - s.keys)),
        *rms_norm.MODELS[2].sides["seqzoo"](norm),
    ]


MODELS = [
    Model(
        "delta_step", "step", "token and head", per_token_and_head, step_shapes((16, 32), (8, 8)),
        {"least": _least, "seqzoo": _ours, "parts": _parts},
    ),
]  # fmt: skip
