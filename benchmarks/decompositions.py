"""What kernels an op is made of, and what each must move and multiply: ours, fla's, FlashQLA's, and the least possible.

A pass is one kernel (or several that touch the same). Its bytes count each address once for reading and once for
writing: a cache without end. Ours are in our_kernels.py; fla's (0.6) and FlashQLA's (0.1.2) were read from their code.
"""

from collections.abc import Callable

from seqzoo.benchmarks import our_kernels
from seqzoo.benchmarks.shapes import Pass, Shape

Decomposition = Callable[[Shape], list[Pass]]


def _delta_least(s: Shape) -> list[Pass]:
    """Inputs and outputs once; products as a recurrence over chunks, q k^T and k k^T once for a group of heads."""
    flops = s.products(CK=2 * s.H / s.HV, CV=2, KV=3, CC=1)
    return [Pass("all", 2 * s.keys + 2 * s.values + 2 * s.gates + s.state, flops)]


def _delta_least_backward(s: Shape) -> list[Pass]:
    flops = s.products(CK=6, CV=5, KV=8)
    return [Pass("all", 4 * s.keys + 3 * s.values + 4 * s.gates + s.state, flops)]


def _delta_fla(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size  # per value head, as w and the gradients of q and k are
    return [
        Pass("cumsum", 2 * s.gates),
        Pass("kkt and solve", s.keys + 2 * s.gates + 2 * s.squares, s.products(CK=1, CC=1)),
        Pass("w, u", s.keys + s.values + s.squares + 2 * s.gates + wide + s.values, s.products(CK=1, CV=1)),
        Pass("states", s.keys + wide + 2 * s.values + s.gates + s.states(2) + s.state, s.products(KV=2)),
        Pass("output", 2 * s.keys + 2 * s.values + s.gates + s.states(2), s.products(KV=1, CK=1, CV=1)),
    ]


def _delta_fla_backward(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size
    return [
        *_delta_fla(s)[2:4],
        Pass("local dv", 2 * s.keys + 2 * s.values + s.gates, s.products(CK=1, CV=1)),
        Pass("dstates", 2 * s.keys + wide + 3 * s.values + s.gates + s.states(2) + s.state, s.products(KV=4)),
        Pass(
            "dq, dk, dw, dg",
            2 * s.keys + 3 * s.values + 2 * s.gates + 2 * s.states(2) + 3 * wide,
            s.products(KV=4, CV=1, CK=2),
        ),
        Pass(
            "w, u backward",  # dk is written, read again and written over
            s.keys + 3 * s.values + s.squares + 4 * s.gates + 3 * wide,
            s.products(CK=4, CV=3, CC=4),
        ),
        Pass("sums and cumsum", 5 * wide + 4 * s.gates + 2 * s.keys),
    ]


def _delta_qla(s: Shape) -> list[Pass]:
    """Without its split of a sequence, which reads k, v and A once more where heads are few."""
    flops = s.products(CK=2, CV=2, KV=3)
    return [
        Pass("cumsum", 2 * s.gates),
        Pass("kkt and solve", s.keys + s.gates + s.squares, s.products(CK=1, CC=1)),
        Pass("all the rest", 2 * s.keys + 2 * s.values + s.squares + 2 * s.gates + s.state, flops),
    ]


def _delta_qla_backward(s: Shape) -> list[Pass]:
    wide = s.rows * s.HV * s.K * s.size
    inputs = s.keys + s.values + s.squares + 2 * s.gates
    return [
        Pass("states", inputs + s.states(2), s.products(KV=2, CK=0, CV=1)),
        Pass(
            "gradients",
            inputs + s.keys + s.values + s.states(2) + 2 * wide + s.values + 2 * s.gates + s.state,
            s.products(CK=6, CV=5, KV=7, CC=4),
        ),
        Pass("sums over a group", 2 * wide + 2 * s.keys if s.HV > s.H else 0),
        Pass("cumsum", 2 * s.gates),
    ]


def _linear(s: Shape) -> tuple[float, float, float, float, float]:
    """[bytes] q, k, v, the decays of each head, and a chunk's states in fp32. HV heads read the memories of H."""
    read, kept = s.rows * s.HV * s.size, s.rows * s.H * s.size
    return read * s.K, kept * s.K, kept * s.V, s.rows * s.H * 4, s.chunks * s.H * s.K * s.V * 4


def _linear_least(s: Shape) -> list[Pass]:
    q, k, v, g, _ = _linear(s)
    return [Pass("all", q + k + v + s.values + g + s.state / s.HV * s.H, s.products(CK=1, CV=1, KV=1 + s.H / s.HV))]


def _linear_least_backward(s: Shape) -> list[Pass]:
    q, k, v, g, _ = _linear(s)
    flops = s.products(CK=3, CV=2, KV=2 + 3 * s.H / s.HV)
    return [Pass("all", 2 * (q + k + v + g) + s.values + s.state / s.HV * s.H, flops)]


def _linear_fla(s: Shape) -> list[Pass]:
    """simple_gla, which has no groups: k and v repeated for every query head, as its layers do."""
    s = s._replace(H=s.HV)
    q, k, v, g, h = _linear(s)
    return [
        Pass("cumsum", 2 * g),
        Pass("states", k + v + g + h / 2 + s.state, s.products(KV=1)),
        Pass("output", q + k + v + g + h / 2 + s.values, s.products(KV=1, CK=1, CV=1)),
    ]


def _linear_fla_backward(s: Shape) -> list[Pass]:
    s = s._replace(H=s.HV)
    q, k, v, g, h = _linear(s)
    return [
        Pass("states", k + v + g + h, s.products(KV=1)),
        Pass("dstates", q + s.values + g + h, s.products(KV=1)),
        Pass("dq, dk, dg", q + k + v + s.values + g + 2 * h + q + k + g, s.products(KV=2, CV=1, CK=3)),
        Pass("dv", q + k + s.values + g + h + v, s.products(KV=1, CK=1, CV=1)),
        Pass("cumsum", 2 * g),
    ]


def _channel_least(s: Shape) -> list[Pass]:
    (least,), more = _linear_least(s), s.rows * s.H * 4 * (s.K - 1)
    return [least._replace(moved=least.moved + more)]


def _channel_least_backward(s: Shape) -> list[Pass]:
    (least,), more = _linear_least_backward(s), s.rows * s.H * 4 * (s.K - 1)
    return [least._replace(moved=least.moved + 2 * more)]


DECOMPOSITIONS: dict[tuple[str, str], dict[str, Decomposition]] = {
    ("gated_delta_rule", "forward"): {
        "least": _delta_least, "seqzoo": our_kernels.delta, "fla": _delta_fla, "FlashQLA": _delta_qla,
    },
    ("gated_delta_rule", "backward"): {
        "least": _delta_least_backward, "seqzoo": our_kernels.delta_backward,
        "fla": _delta_fla_backward, "FlashQLA": _delta_qla_backward,
    },
    ("linear_attention", "forward"): {"least": _linear_least, "seqzoo": our_kernels.linear, "fla": _linear_fla},
    ("linear_attention", "backward"): {
        "least": _linear_least_backward, "seqzoo": our_kernels.linear_backward, "fla": _linear_fla_backward,
    },
    ("linear_attention by channel", "forward"): {"least": _channel_least, "seqzoo": our_kernels.channel},
    ("linear_attention by channel", "backward"): {
        "least": _channel_least_backward, "seqzoo": our_kernels.channel_backward,
    },
}  # fmt: skip
