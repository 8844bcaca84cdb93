"""What ovq_attention's kernels move and multiply: one document a row, no state, whole chunks, the plateau schedule.

Of a sequence's chunks the n-th reads M_n slots, and so does what assigns its keys to slots, in torch. Ours: widths that
are powers of two, no norm correction, blocks as sm_90's table says, a chunk of whole blocks. Queries, tokens and
memories are read in the inputs' dtype; scales, counts, sums and the gradients of tokens and memories are fp32. Of what
torch does, which the tests do not count, it is what is read and written at least, in bf16.
"""

from typing import NamedTuple

from seqzoo.benchmarks.shapes import Model, Pass, cut, up


class OVQ(NamedTuple):
    """Of a call: batch, tokens, query heads, key heads, widths, tokens of a chunk, slots, bytes of an element."""

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int
    C: int
    N: int
    size: int = 2

    @property
    def queries(self) -> int:
        return self.B * self.T * self.H

    @property
    def tokens(self) -> int:
        """Of all key heads."""
        return self.B * self.T * self.G

    @property
    def width(self) -> int:
        """Numbers of a key and its value."""
        return self.K + self.V

    @property
    def chunks(self) -> int:
        return self.T // self.C

    @property
    def used(self) -> list[int]:
        """Slots that each chunk reads."""
        return [max(1, t * self.N // (t + self.N)) if t else 0 for t in range(0, self.T, self.C)]

    @property
    def slots(self) -> int:
        """That all chunks read, of all key heads."""
        return self.B * self.G * sum(self.used)

    def block(self, kernel: str) -> tuple[int, int]:
        """Rows of queries and keys of a program."""
        widths = dict(K=self.K, V=self.V, T=self.C, norms=0)
        found = cut("ovq_attention", kernel, self.size, **widths)
        return found["BM"], found["BN"]

    def pairs(self, tokens: float, block: int = 1) -> float:
        """Queries times what they meet: so many tokens of the chunk, and slots in whole blocks."""
        return self.B * self.H * self.C * sum(up(M, block) + tokens for M in self.used)


def _assigning(s: OVQ) -> float:
    """[FLOP] Each key by each slot, and the first chunk's by each other; the last chunk is not merged."""
    first = s.C if s.chunks > 1 else 0
    return 2.0 * s.K * s.B * s.G * s.C * (first + sum(s.used[:-1]))


def _inputs(s: OVQ) -> tuple[int, int]:
    """[bytes] q; k and v."""
    return s.queries * s.K * s.size, s.tokens * s.width * s.size


def _least(s: OVQ) -> list[Pass]:
    """Inputs and outputs once; each query by the slots and, on average, by half of its chunk."""
    q, kv = _inputs(s)
    flops = 2.0 * s.width * s.pairs((s.C + 1) / 2) + _assigning(s)
    return [Pass("all", q + kv + s.queries * s.V * s.size + 4 * s.H, flops)]


def _least_backward(s: OVQ) -> list[Pass]:
    q, kv = _inputs(s)
    flops = 2.0 * (3 * s.K + 2 * s.V) * s.pairs((s.C + 1) / 2)
    return [Pass("all", 2 * (q + kv) + s.queries * s.V * s.size + 8 * s.H, flops)]


def _table(s: OVQ) -> int:
    """[bytes] What programs know of a document's chunk."""
    return 64 * s.B * s.chunks


def _memory(s: OVQ) -> int:
    """[bytes] Slots as they are read, and their counts."""
    return s.slots * (s.width * s.size + 4)


def _merging(s: OVQ) -> list[Pass]:
    """Torch's, chunk after chunk: likeness to slots and its maximum; memories written, moved, and added to."""
    if s.chunks == 1:
        return []
    heads, later, grown = s.B * s.G, s.used[1:-1], sum(s.used[1:])
    keys, rows = s.C * s.K * 4, s.C * s.width * 4
    first, square = s.used[1], s.C * s.C * 4
    likeness = sum(keys + M * s.K * 4 + 2 * s.C * M * 4 for M in later)
    return [
        Pass("torch first likeness", heads * (keys + square), heads * 2.0 * s.C * s.C * s.K),
        # of each slot's first token its row and its column
        Pass("assign_farthest", heads * (4 * (2 * first * s.C - first * first) + 8 * s.C)),
        Pass("torch likeness", heads * likeness, heads * 2.0 * s.C * s.K * sum(later)),
        Pass("torch merging", heads * (2 * grown * s.width * 4 + (s.chunks - 1) * 5 * rows)),
    ]


def _ours(s: OVQ) -> list[Pass]:
    (q, kv), o, (BM, BN) = _inputs(s), s.queries * s.V * s.size, s.block("read")
    fp32 = s.tokens * s.width * 4
    return [
        Pass("torch rows by chunk", 2 * kv + 2 * kv + kv + fp32 + 2 * q),  # k beside v, by chunk, in fp32
        *_merging(s),
        Pass("torch casts", fp32 + kv + s.slots * s.width * (4 + s.size) + 8 * s.slots),
        Pass(
            "joint_read",
            q + o + kv + 8 * s.queries + _memory(s) + _table(s),
            2.0 * s.width * s.pairs((s.C + max(BM, BN)) / 2, BN),
        ),
        Pass("torch rows by token", 2 * o),
    ]


def _ours_backward(s: OVQ) -> list[Pass]:
    """Without what torch does to bring gradients from chunk to chunk, and from slots to tokens."""
    (q, kv), o = _inputs(s), s.queries * s.V * s.size
    (BM, BN), (rows, keys) = s.block("queries"), s.block("keys")
    later = 1 - 1 / s.chunks  # chunks that have slots
    asked = q + o + 12 * s.queries  # scales, sums, and o . d_o
    return [
        Pass("torch rows by chunk", 2 * o),
        Pass(  # o and d_o, sums, o . d_o, and scales with their gradients
            "joint_read_queries",
            2 * q + 2 * o + kv + 16 * s.queries + _memory(s) + _table(s),
            2.0 * (2 * s.K + s.V) * s.pairs((s.C + max(BM, BN)) / 2, BN),
        ),
        Pass(
            "joint_read_keys",
            later * asked + _memory(s) + s.slots * s.width * 4 + _table(s),
            4.0 * s.width * s.pairs(0, keys),
        ),
        Pass(
            "joint_read_keys",
            asked + kv + s.tokens * s.width * 4 + _table(s),
            4.0 * s.width * s.chunks * s.B * s.H * s.C * (s.C + max(rows, keys)) / 2,
        ),
        Pass("torch rows by token", s.tokens * s.width * (4 + 3 * s.size) + 2 * q),
    ]


SHAPES = {
    "1x32768, 16 heads on 4, 128 of 1024": OVQ(1, 32768, 16, 4, 128, 128, 128, 1024),
    "4x8192, 16 heads on 4, 128 of 1024": OVQ(4, 8192, 16, 4, 128, 128, 128, 1024),
}
OP, UNIT = "ovq_attention", ("token and query head", lambda s: s.queries)
MODELS = [
    Model(OP, "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model(OP, "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
]
