"""What the norms' kernels move, rms_norm's and gated_rms_norm's; nothing is a product of matrices."""

from seqzoo.benchmarks.shapes import Model, Pass, Rows, cut


def _least(s: Rows, gated: bool = False) -> list[Pass]:
    return [Pass("all", (2 + gated) * s.all + s.W * s.size)]


def _ours(s: Rows, gated: bool = False) -> list[Pass]:
    return [_least(s, gated)[0]._replace(name="rms_norm_forward")]


def _least_backward(s: Rows, gated: bool = False) -> list[Pass]:
    return [Pass("all", (3 + 2 * gated) * s.all + 2 * s.W * s.size)]


def _ours_backward(s: Rows, gated: bool = False) -> list[Pass]:
    """Each program writes its rows' share of the weight's gradient, in fp32; a block is as sm_90's table says."""
    blocks = -(-s.n // cut("rms_norm", "backward", s.size, W=s.W)["BR"])
    programs = -(-blocks // -(-blocks // min(1024, 2**20 // s.W)))  # at most 1024, and 4 MiB
    shares = programs * s.W * 4
    return [
        Pass("rms_norm_backward", (3 + 2 * gated) * s.all + s.W * s.size + shares),
        Pass("torch sum of shares", shares + s.W * 4),
        *([Pass("torch cast", s.W * (4 + s.size))] if s.size < 4 else []),
    ]


def _with_gate(side):
    return lambda s: side(s, gated=True)


SHAPES = {"8192 rows of 2048": Rows(8192, 2048), "8192 rows of 4096": Rows(8192, 4096)}
HEADS = {"262144 rows of 128": Rows(2 * 4096 * 32, 128)}  # heads of a Gated DeltaNet
UNIT = "row", lambda s: s.n
MODELS = [
    Model("rms_norm", "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model("rms_norm", "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
    Model("gated_rms_norm", "forward", *UNIT, HEADS, dict(least=_with_gate(_least), seqzoo=_with_gate(_ours))),
    Model(
        "gated_rms_norm", "backward", *UNIT, HEADS,
        dict(least=_with_gate(_least_backward), seqzoo=_with_gate(_ours_backward)),
    ),
]  # fmt: skip
