"""Shapes of calls, in bytes and products: the words in which decompositions are written."""

from typing import NamedTuple

C = 64  # tokens of a chunk, in all of them


class Shape(NamedTuple):
    """Of a call: batch, tokens, key (or query) heads, value (or state) heads, widths, bytes of an element."""

    B: int
    T: int
    H: int
    HV: int
    K: int = 128
    V: int = 128
    size: int = 2

    @property
    def rows(self) -> int:
        """Tokens, all batches."""
        return self.B * self.T

    @property
    def chunks(self) -> int:
        """Chunks, all batches."""
        return self.B * -(-self.T // C)

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
        """[bytes] A chunk's C x C matrix per value head."""
        return self.rows * self.HV * C * self.size

    @property
    def state(self) -> int:
        """[bytes] One fp32 state per batch and value head."""
        return self.B * self.HV * self.K * self.V * 4

    def states(self, size: int) -> int:
        """[bytes] One state per chunk, of elements of this size."""
        return self.chunks * self.HV * self.K * self.V * size

    def products(self, **times: float) -> float:
        """[FLOP] Products per token and value head: how often CC, CK, CV, KK, KV is multiplied and added."""
        width = dict(C=C, K=self.K, V=self.V)
        return sum(2.0 * n * width[a] * width[b] for (a, b), n in times.items()) * self.rows * self.HV


class Pass(NamedTuple):
    """One kernel of a decomposition."""

    name: str
    moved: float  # [bytes]
    flops: float = 0.0
