"""What short_conv's kernels move: no inputs before the first, no documents; nothing is a product of matrices.

Backward has a gradient of the last inputs, too. A segment's program reads W - 1 tokens beside it once more, from the
cache. Segments are as long as sm_90's table says.
"""

from typing import NamedTuple

from seqzoo.benchmarks.shapes import Model, Pass, cut


class Conv(NamedTuple):
    """Of a call: batch, tokens, channels, taps, bytes of an element."""

    B: int
    T: int
    C: int
    W: int = 4
    size: int = 2

    @property
    def x(self) -> int:
        """[bytes] The inputs, or what becomes of them."""
        return self.B * self.T * self.C * self.size

    @property
    def filters(self) -> int:
        """[bytes]"""
        return self.C * self.W * self.size

    @property
    def past(self) -> int:
        """[bytes] The inputs that the next call needs."""
        return self.B * (self.W - 1) * self.C * self.size


def _least(s: Conv) -> list[Pass]:
    return [Pass("all", 2 * s.x + s.filters + s.past)]


def _ours(s: Conv) -> list[Pass]:
    return [_least(s)[0]._replace(name="short_conv_forward")]


def _least_backward(s: Conv) -> list[Pass]:
    return [Pass("all", 3 * s.x + 2 * s.filters + s.past)]


def _ours_backward(s: Conv) -> list[Pass]:
    """Each segment writes its share of the filters' gradient, in fp32."""
    segments = s.B * -(-s.T // cut("short_conv", "backward", s.size, W=s.W, T=s.T)["S"])
    shares, whole = segments * s.W * s.C * 4, s.W * s.C * 4
    return [
        Pass("short_conv_backward", 3 * s.x + s.filters + s.past + shares),
        Pass("torch sum of shares", shares + whole),
        Pass("torch transpose and cast", whole + s.filters),
    ]


def _step_least(s: Conv) -> list[Pass]:
    """What is kept is read and written, and where it stands in the pool is read."""
    return [Pass("all", 2 * s.x + s.filters + 2 * s.past + 8 * s.B)]


def _step(s: Conv) -> list[Pass]:
    return [_step_least(s)[0]._replace(name="short_conv_forward")]


SHAPES = {"2x4096, 8192 channels": Conv(2, 4096, 8192), "1x32768, 8192 channels": Conv(1, 32768, 8192)}
STEPS = {f"64 x {T}, 8192 channels": Conv(64, T, 8192) for T in (1, 4)}
OP, UNIT = "short_conv", ("token", lambda s: s.B * s.T)
MODELS = [
    Model(OP, "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model(OP, "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
    Model(OP, "step", *UNIT, STEPS, dict(least=_step_least, seqzoo=_step)),
]
