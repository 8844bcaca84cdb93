"""Shapes of calls, in bytes and products: the words in which decompositions are written."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from seqzoo.kernels.gpu.tables import for_arch, tuned


class Pass(NamedTuple):
    """One kernel of a decomposition, or several that touch the same; `torch ...` is done by torch's own."""

    name: str
    moved: float  # [bytes]
    flops: float = 0.0  # of matrix products; a multiply-add is 2


class Model(NamedTuple):
    """What moves and multiplies an op in one direction, by whom."""

    op: str
    direction: str  # forward, backward, or a step of decoding
    unit: str  # that bytes and products are told of
    units: Callable[[Any], float]  # how many of these a shape has
    shapes: dict[str, Any]  # by name; whatever the sides take
    sides: dict[str, Callable[[Any], list[Pass]]]  # who -> its kernels; `least` first, ours is `seqzoo`
    published: dict[str, dict[str, float]] = {}  # name of a shape -> who -> [ms] on an H200


class Shape(NamedTuple):
    """Of a recurrence: batch, tokens, key (or query) heads, value (or state) heads, widths, bytes of an element."""

    B: int
    T: int
    H: int
    HV: int
    K: int = 128
    V: int = 128
    size: int = 2
    C: int = 64  # tokens of a chunk
    scratch: int = 0  # bytes of an element that kernels hand each other, where that is not `size`

    @property
    def handed(self) -> int:
        """[bytes] An element that kernels hand each other."""
        return self.scratch or self.size

    @property
    def rows(self) -> int:
        """Tokens, all batches."""
        return self.B * self.T

    @property
    def chunks(self) -> int:
        """Chunks, all batches."""
        return self.B * -(-self.T // self.C)

    @property
    def keys(self) -> int:
        """[bytes] k; q has the same where it has the same heads."""
        return self.rows * self.H * self.K * self.size

    @property
    def values(self) -> int:
        """[bytes] v, or o."""
        return self.rows * self.HV * self.V * self.size

    @property
    def gates(self) -> int:
        """[bytes] One fp32 number per token and value head."""
        return self.rows * self.HV * 4

    @property
    def squares(self) -> int:
        """[bytes] A C x C matrix per chunk and value head."""
        return self.rows * self.HV * self.C * self.handed

    @property
    def state(self) -> int:
        """[bytes] One fp32 state per batch and value head."""
        return self.B * self.HV * self.K * self.V * 4

    def states(self, size: int) -> int:
        """[bytes] One state per chunk, of elements of this size."""
        return self.chunks * self.HV * self.K * self.V * size

    def products(self, **times: float) -> float:
        """[FLOP] Products per token and value head: how often CC, CK, CV, KK, KV is multiplied and added."""
        width = dict(C=self.C, K=self.K, V=self.V)
        return sum(2.0 * n * width[a] * width[b] for (a, b), n in times.items()) * self.rows * self.HV


class Rows(NamedTuple):
    """Of what is done row by row: how many rows, channels of each, bytes of an element."""

    n: int
    W: int
    size: int = 2

    @property
    def all(self) -> int:
        """[bytes] All rows once."""
        return self.n * self.W * self.size


def per_token_and_head(s: Shape) -> int:
    """The unit of recurrences."""
    return s.rows * s.HV


def step_shapes(*heads: tuple[int, int], **widths: int) -> dict[str, Shape]:
    """What a server decodes: 64 sequences, one token or four of each, by key heads and value heads."""
    return {f"64 x {T}, {H}/{HV} heads": Shape(64, T, H, HV, **widths) for T in (1, 4) for H, HV in heads}


def cut(op: str, kernel: str, size: int, **widths: int) -> dict[str, int]:
    """The blocks that sm_90's table says, for bf16 where an element has 2 bytes, else for fp32."""
    with for_arch("sm_90"):
        return tuned(op, kernel, torch.device("meta"), {2: torch.bfloat16, 4: torch.float32}[size], **widths)


def up(n: float, block: int) -> float:
    """n in whole blocks."""
    return -(-n // block) * block
