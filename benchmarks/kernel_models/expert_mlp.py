"""What expert_mlp's kernels move and multiply: rows sorted by expert, two grouped products, the gate between them.

As many experts are hit as random choices would hit on average, all of them equally often; widths are whole blocks. The
products are torch's for bf16 on sm_90 and sm_100 (`seqzoo`), elsewhere ours (`in Triton`).
"""

from collections.abc import Callable
from typing import NamedTuple

from seqzoo.benchmarks.shapes import Model, Pass, cut, up


class Experts(NamedTuple):
    """Of a call: tokens, slots of each, experts, width, width inside, bytes of an element."""

    N: int
    k: int
    E: int
    D: int
    I: int
    size: int = 2

    @property
    def R(self) -> int:
        """Rows, one for each slot of each token."""
        return self.N * self.k

    @property
    def tokens(self) -> int:
        """[bytes] x, or y."""
        return self.N * self.D * self.size

    @property
    def wide(self) -> int:
        """[bytes] Rows of width D."""
        return self.R * self.D * self.size

    @property
    def inside(self) -> int:
        """[bytes] Rows of width I."""
        return self.R * self.I * self.size

    @property
    def hit(self) -> float:
        """Experts that have rows."""
        return self.E * (1 - (1 - 1 / self.E) ** self.R)

    @property
    def matrix(self) -> int:
        """[bytes] D x I of an expert: it has three."""
        return self.D * self.I * self.size

    @property
    def flops(self) -> int:
        """[FLOP] All rows by a D x I."""
        return 2 * self.R * self.D * self.I


def _least(s: Experts) -> list[Pass]:
    """x, y, who is chosen and how much, and the matrices of those who are."""
    moved = 2 * s.tokens + s.R * (8 + s.size) + 3 * s.hit * s.matrix
    return [Pass("all", moved, 3 * s.flops)]


def _least_backward(s: Experts) -> list[Pass]:
    """As if the gates were at hand for nothing; matrices of experts without rows get zeros."""
    moved = 3 * s.tokens + s.R * (8 + 2 * s.size) + 3 * (s.hit + s.E) * s.matrix
    return [Pass("all", moved, 6 * s.flops)]


def _spread(s: Experts) -> Pass:
    """Reads each token, however many slots it has, and the order of slots, int64."""
    return Pass("spread_rows", s.tokens + 8 * s.R + s.wide)


def _collect(s: Experts) -> Pass:
    return Pass("collect_rows", s.wide + 4 * s.R + s.tokens)


def _padded(s: Experts, name: str) -> float:
    """Rows that are multiplied for each that there is: ours come in whole tiles of each expert's."""
    if name.startswith("torch"):  # not known
        return 1.0
    kernel, block = {"product_rows": ("product", "BM"), "product_matrices": ("matrices", "BK")}[name]
    return up(s.R / s.hit, cut("expert_mlp", kernel, s.size, width=max(s.D, 2 * s.I))[block]) * s.hit / s.R


def _product(s: Experts, name: str, inside: int) -> Pass:
    """Between rows of width D and rows of `inside` times I, and where each expert's rows and tiles end."""
    moved = s.wide + inside * (s.inside + s.hit * s.matrix) + 8 * s.E
    return Pass(name, moved, inside * s.flops * _padded(s, name))


def _matrices(s: Experts, name: str, inside: int) -> Pass:
    moved = s.wide + inside * (s.inside + s.E * s.matrix) + 4 * s.E
    return Pass(name, moved, inside * s.flops * _padded(s, name))


def _ours(product: str) -> Callable[[Experts], list[Pass]]:
    return lambda s: [
        Pass("torch sort", (8 + 8 + 4) * s.R + 4 * s.E),  # at least: what goes in and comes out
        _spread(s),
        _product(s, product, 2),
        Pass("gate_rows", 3 * s.inside + s.R * (8 + s.size)),
        _product(s, product, 1),
        _collect(s),
    ]


def _ours_backward(product: str, matrices: str) -> Callable[[Experts], list[Pass]]:
    return lambda s: [
        _spread(s),
        _product(s, product, 1),
        Pass("gate_rows_backward", 6 * s.inside + s.R * (8 + s.size + 4)),
        _product(s, product, 2),
        _collect(s),
        _spread(s),
        _matrices(s, matrices, 2),
        _matrices(s, matrices, 1),
        *([Pass("torch cast", s.R * (4 + s.size))] if s.size < 4 else []),
    ]


_torch, _triton = ("torch grouped product", "torch grouped gradient"), ("product_rows", "product_matrices")
SHAPES = {
    "8192 tokens, 10 of 512 experts of 2048 x 512": Experts(8192, 10, 512, 2048, 512),  # Qwen3-Next-80B-A3B's
    "64 tokens, 10 of 512 experts of 2048 x 512": Experts(64, 10, 512, 2048, 512),
}
OP, UNIT = "expert_mlp", ("token", lambda s: s.N)
MODELS = [
    Model(
        OP, "forward", *UNIT, SHAPES,
        {"least": _least, "seqzoo": _ours(_torch[0]), "in Triton": _ours(_triton[0])},
    ),
    Model(
        OP, "backward", *UNIT, SHAPES,
        {"least": _least_backward, "seqzoo": _ours_backward(*_torch), "in Triton": _ours_backward(*_triton)},
    ),
]  # fmt: skip
