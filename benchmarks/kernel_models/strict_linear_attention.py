"""What strict_linear_attention's kernels move and multiply: K neurons of each of H heads, v of one head, V wide.

Ours: as sm_90's table cuts, whole segments, no first memory, no decay, and a gradient of the last memory. Between
kernels, memories and scores are bf16 where r is, else fp32. A segment's scores are made and read by blocks; those
beyond the diagonal are left out, but for backward's symmetric ones.
"""

from typing import NamedTuple

from seqzoo.benchmarks.shapes import Model, Pass, Shape, cut, per_token_and_head

TILE = 128  # neurons of a step's program


class _Cut(NamedTuple):
    """How a call is cut in time: tokens of a segment, segments, and scores made of each token, on average."""

    L: int
    n: int
    lower: float


def _cut(s: Shape) -> _Cut:
    L = min(max(64, 2 << (max(16, s.V) - 1).bit_length()), 1024)
    block = min(L, cut("strict_linear_attention", "scores", s.size, D=s.V)["BT"])
    return _Cut(L, -(-s.T // L), (L + block) / 2)


def _value(s: Shape) -> int:
    """[bytes] v, of one head."""
    return s.rows * s.V * s.size


def _least(s: Shape) -> list[Pass]:
    """Inputs and outputs once; products in chunks of C tokens, the first of which reads no memory."""
    return [Pass("all", s.keys + _value(s) + s.values + s.state, s.products(CK=1, CV=1, KV=2 - s.C / s.T))]


def _least_backward(s: Shape) -> list[Pass]:
    """As if memories and scores of the forward pass were at hand for nothing."""
    moved = 2 * s.keys + 2 * _value(s) + s.values + s.state
    return [Pass("all", moved, s.products(CK=1, CV=2, KV=4 - s.C / s.T))]


def _flops(s: Shape, KV: float, K: float = 0, V: float = 0) -> float:
    """Memories of K x V multiplied so often; and how many scores of each token times K neurons, and times V."""
    return 2.0 * s.rows * s.H * (KV * s.K * s.V + K * s.K + V * s.V)


def _ours(s: Shape) -> list[Pass]:
    (_, n, lower), memory = _cut(s), s.B * s.H * s.K * s.V * s.handed
    scores = s.rows * s.H * lower * s.handed
    later = 1 - 1 / n  # segments that have a memory to read
    return [
        Pass("states", s.keys + _value(s) + (n - 1) * memory + s.state, _flops(s, KV=1)),
        Pass("scores", s.keys + scores, _flops(s, KV=0, K=lower)),
        Pass(
            "read",
            later * s.keys + (n - 1) * memory + scores + _value(s) + s.values,
            _flops(s, KV=later, V=lower),
        ),
    ]


def _ours_backward(s: Shape) -> list[Pass]:
    (L, n, lower), memory = _cut(s), s.B * s.H * s.K * s.V * s.handed
    half, whole = s.rows * s.H * lower * s.handed, s.rows * s.H * L * s.handed
    later = 1 - 1 / n
    each = s.rows * s.H * s.V * (s.size if s.H == 1 else 4)  # a gradient of v for each head
    return [
        Pass("states", s.keys + s.values + n * memory + 2 * s.state, _flops(s, KV=1)),
        Pass("scores", s.values + _value(s) + whole, _flops(s, KV=0, V=lower)),
        Pass(
            "pull",
            2 * s.keys + s.values * later + _value(s) + (2 * n - 1) * memory + whole,
            _flops(s, KV=1 + later, K=L),
        ),
        Pass("read", s.keys + n * memory + half + s.values + each, _flops(s, KV=1, V=lower)),
        *([Pass("torch sum over heads", each + _value(s) // s.size * 4)] if s.H > 1 else []),
        *([Pass("torch cast", _value(s) // s.size * 4 + _value(s))] if s.H > 1 and s.size < 4 else []),
    ]


def _step_least(s: Shape) -> list[Pass]:
    """Memories are read and written, and where they stand in the pool is read; nothing is a product of matrices."""
    return [Pass("all", s.keys + _value(s) + s.values + 2 * s.state + 8 * s.B)]


def _step(s: Shape) -> list[Pass]:
    """More than 128 neurons are cut into tiles, whose sums are fp32 until a second kernel has added them."""
    (least,), tiles = _step_least(s), -(-s.K // TILE)
    if tiles == 1:
        return [least._replace(name="strict_linear_attention_steps")]
    parts = s.values // s.size * 4 * tiles
    return [
        Pass("strict_linear_attention_steps", least.moved - s.values + parts),
        Pass("strict_linear_attention_sum", parts + s.values),
    ]


WIDE = dict(K=8192, V=256)  # BDH as released
SHAPES = {
    "2x2048, 4 heads of 8192": Shape(2, 2048, 4, 4, **WIDE),
    "1x16384, 4 heads of 8192": Shape(1, 16384, 4, 4, **WIDE),
}
STEPS = {f"{B} x 1, 4 heads of 8192": Shape(B, 1, 4, 4, **WIDE) for B in (1, 16)}
OP, UNIT = "strict_linear_attention", ("token and head", per_token_and_head)
MODELS = [
    Model(OP, "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model(OP, "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
    Model(OP, "step", *UNIT, STEPS, dict(least=_step_least, seqzoo=_step)),
]
