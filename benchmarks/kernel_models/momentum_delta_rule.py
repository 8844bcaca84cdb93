"""What momentum_delta_rule's kernels move and multiply; p has as many heads as k.

Ours: whole chunks, keys up to 128 wide, no first memories, and a gradient of the last ones. A program has a value head,
so that products of keys are made for each. A state here is S, and N as much again: `2 * s.state`. Between kernels,
matrices, memories and errors are bf16 where the inputs are, else fp32; gates and coefficients are fp32 always.
"""

from math import log2

from seqzoo.benchmarks.shapes import Model, Pass, Shape, cut, per_token_and_head, step_shapes


def _least(s: Shape) -> list[Pass]:
    """Inputs and outputs once; as a recurrence over chunks of 32, both memories asked, written and read."""
    flops = s._replace(C=32).products(CK=2 * s.H / s.HV, CV=2, KV=6, CC=1)
    return [Pass("all", 3 * s.keys + 2 * s.values + 4 * s.gates + 2 * s.state, flops)]


def _least_backward(s: Shape) -> list[Pass]:
    """What was asked and written once more, and two products for each of forward's."""
    flops = s._replace(C=32).products(CK=6, CV=5, KV=16)
    return [Pass("all", 6 * s.keys + 3 * s.values + 8 * s.gates + 2 * s.state, flops)]


def _chunked(s: Shape, kernel: str) -> Shape:
    """Its chunks as long as sm_90's table says."""
    return s._replace(C=cut("momentum_delta_rule", kernel, s.size, K=s.K)["C"])


def _per_token(s: Shape) -> float:
    """[bytes] What was written, or errors: as wide as a value."""
    return s.values // s.size * s.handed


def _prepare(s: Shape) -> Pass:
    """Reads q, k, p and four gates, writes an inverse, scores and 7 coefficients per token.

    Of C x C x C are the decays' product, and two for each doubling of the inverse's blocks, from 2 tokens to C.
    """
    flops = s.products(CK=2, CC=1 + 2 * (log2(s.C) - 1))
    return Pass("prepare", 3 * s.keys + 11 * s.gates + 2 * s.squares, flops)


def _keep(s: Shape) -> Pass:
    """Reads k, p, v, eta, the inverse, 4 coefficients and of 3 more each chunk's last; writes what is kept and Z."""
    gates, kept = (5 + 3 / s.C) * s.gates, 2 * s.states(s.handed)
    return Pass("scan", 2 * s.keys + s.values + gates + s.squares + kept + _per_token(s), s.products(CV=1, KV=4))


def _ours(s: Shape) -> list[Pass]:
    """In bf16 the scan reads, too; in fp32 it keeps, and another kernel reads."""
    s = _chunked(s, "scan")
    if s.size == 2:  # 6 coefficients, and of one more each chunk's last
        moved = 3 * s.keys + 2 * s.values + (7 + 1 / s.C) * s.gates + 2 * s.squares + 2 * s.state
        return [_prepare(s), Pass("scan", moved, s.products(CV=2, KV=6))]
    keep, read = _keep(s), s.keys + s.squares + 2 * s.gates + 2 * s.states(s.handed) + _per_token(s) + s.values
    return [
        _prepare(s),
        keep._replace(moved=keep.moved + 2 * s.state),
        Pass("outputs", read, s.products(CV=1, KV=2)),
    ]


def _ours_backward(s: Shape) -> list[Pass]:
    s = _chunked(s, "back")
    kept, Z = 2 * s.states(s.handed), _per_token(s)  # E is as large as Z
    wide = s.rows * s.HV * s.K * (s.size if s.H == s.HV else 4)  # a gradient of q, k or p, by value head
    summed = s.keys // s.size * 4
    return [
        _prepare(s),
        _keep(s),
        Pass(  # 6 coefficients, of one more each chunk's last, and eta
            "back",
            3 * s.keys + s.values + Z + (7 + 1 / s.C) * s.gates + 2 * s.squares + kept + 4 * s.state,
            s.products(CV=2, KV=6),
        ),
        Pass("pairs", 3 * s.keys + s.values + 2 * Z + 4 * s.gates + 4 * s.squares, s.products(CK=2, CV=2, CC=1)),
        Pass(  # eta, 6 coefficients, 7 results for the gates; two of the four matrices, all memories
            "gradients",
            3 * s.keys + 3 * wide + s.values + 2 * Z + 14 * s.gates + 2 * s.squares + 2 * kept,
            s.products(CK=4, KV=6),
        ),
        Pass(  # four gates, their gradients, 6 of those results and 3 numbers more per chunk; the other two matrices
            "gates",
            2 * s.values + Z + (14 + 3 / s.C) * s.gates + 2 * s.squares,
            s.products(CC=4),
        ),
        *([Pass("torch sums of groups", 3 * (wide + summed))] if s.HV > s.H else []),
        *([Pass("torch casts", 3 * (summed + s.keys))] if s.HV > s.H and s.size < 4 else []),
    ]


def _step_least(s: Shape) -> list[Pass]:
    """Memories are read and written, and where they stand in the pool is read; nothing is a product of matrices."""
    return [Pass("all", 3 * s.keys + 2 * s.values + 4 * s.gates + 4 * s.state + 8 * s.B)]


def _step(s: Shape) -> list[Pass]:
    return [_step_least(s)[0]._replace(name="momentum_delta_rule_steps")]


SHAPES = {
    "1x8192, 16/16 heads": Shape(1, 8192, 16, 16),
    "1x32768, 16/16 heads": Shape(1, 32768, 16, 16),
    "1x8192, 4/16 heads": Shape(1, 8192, 4, 16),
}
OP, UNIT = "momentum_delta_rule", ("token and head", per_token_and_head)
MODELS = [
    Model(OP, "forward", *UNIT, SHAPES, dict(least=_least, seqzoo=_ours)),
    Model(OP, "backward", *UNIT, SHAPES, dict(least=_least_backward, seqzoo=_ours_backward)),
    Model(OP, "step", *UNIT, step_shapes((16, 16)), dict(least=_step_least, seqzoo=_step)),
]
