"""What spike's kernels move, backward through the threshold; nothing is a product of matrices.

Rows of more than 4096 channels are read twice forward and three times backward, all but the first from the cache.
"""

from seqzoo.benchmarks.shapes import Model, Pass, Rows


def _least(s: Rows) -> list[Pass]:
    return [Pass("all", 2 * s.all)]


def _ours(s: Rows) -> list[Pass]:
    return [_least(s)[0]._replace(name="spike_forward")]


def _least_backward(s: Rows) -> list[Pass]:
    return [Pass("all", 3 * s.all)]


def _ours_backward(s: Rows) -> list[Pass]:
    return [_least_backward(s)[0]._replace(name="spike_backward")]


SHAPES = {"8192 rows of 4096": Rows(8192, 4096), "4096 rows of 18944": Rows(4096, 18944)}  # SpikingBrain-7B's MLP
OP, UNIT = "spike", ("row", lambda s: s.n)
MODELS = [
    Model(OP, "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model(OP, "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
]
