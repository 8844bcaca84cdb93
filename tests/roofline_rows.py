"""How each op with Triton kernels is called, so that the roofline's bytes and products can be held against them.

A row is an op at small shapes, in which no block of a kernel is wider than what it cuts. Bytes per element are a
shape's `size`: 4 is float32, 2 bfloat16. With bfloat16 some ops hand float32 from kernel to kernel in the interpreter,
which takes the bits of bfloat16 for whole numbers: `scratch=4` says so.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from seqzoo.benchmarks import gpu_cases
from seqzoo.benchmarks.kernel_models.expert_mlp import Experts
from seqzoo.benchmarks.kernel_models.ovq_attention import OVQ
from seqzoo.benchmarks.kernel_models.short_conv import Conv
from seqzoo.benchmarks.shapes import Rows, Shape

CPU = torch.device("cpu")
Calls = Iterator[tuple[str, Callable[[], object]]]  # a direction, and what is to be counted for it


class Row(NamedTuple):
    op: str
    directions: tuple[str, ...]  # that `calls` yields
    calls: Callable[[Any], Calls]
    shapes: list[Any]
    who: str = "seqzoo"
    tables: Callable[[Any], list[tuple[str, str, dict[str, int]]]] = lambda s: []  # op, kernel: what a table is to say


def _dtype(s):
    return {2: torch.bfloat16, 4: torch.float32}[s.size]


def _make(s):
    """Small numbers of a shape, in the call's dtype or another."""
    return lambda *shape, dtype=None: 0.2 * torch.rand(shape, dtype=dtype or _dtype(s)) - 0.1


def recurrence(case: Callable, n: int = 0) -> Callable[[Shape], Calls]:
    """The n-th case of gpu_cases, forward, and backward from gradients of what was read and of the last state."""

    def calls(s):
        inputs, sides = list(case({"here": s}, CPU, _dtype(s)))[n][3:5]
        leaves, kept = [x.requires_grad_() for x in inputs.values()], []
        yield "forward", lambda: kept.extend(dict(sides)["seqzoo"](*leaves))
        yield "backward", lambda: torch.autograd.grad(kept, leaves, [torch.randn_like(x) for x in kept])

    return calls


def gated_delta_rule_step(s):
    from seqzoo.kernels.gated_delta_rule.step import gated_delta_rule_step_triton

    make, gates = _make(s), (s.B, s.T, s.HV)
    q, k = (make(s.B, s.T, s.H, s.K) for _ in range(2))
    v, g, beta = make(s.B, s.T, s.HV, s.V), *(make(*gates, dtype=torch.float32) for _ in range(2))
    pool = make(s.B, s.HV, s.K, s.V, dtype=torch.float32)
    yield "step", lambda: gated_delta_rule_step_triton(q, k, v, g, beta, pool, torch.arange(s.B), None)


def kimi_delta_rule_step(s):
    from seqzoo.kernels.kimi_delta_rule.step import kimi_delta_rule_step_triton

    make, full = _make(s), dict(dtype=torch.float32)
    q, k, v = (make(s.B, s.T, s.HV, width) for width in (s.K, s.K, s.V))
    g, beta = make(s.B, s.T, s.HV, s.K, **full), make(s.B, s.T, s.HV, **full)
    pool = make(s.B, s.HV, s.K, s.V, **full)
    yield "step", lambda: kimi_delta_rule_step_triton(q, k, v, g, beta, pool, torch.arange(s.B), None)


def linear_attention_step(*channels: str) -> Callable[[Shape], Calls]:
    def calls(s):
        from seqzoo.kernels.linear_attention.step import linear_attention_step_triton

        make, width = _make(s), [getattr(s, name) for name in channels]
        q, k, v = make(s.B, s.T, s.HV, s.K), make(s.B, s.T, s.H, s.K), make(s.B, s.T, s.H, s.V)
        g, pool = (make(*n, dtype=torch.float32) for n in ((s.B, s.T, s.H, *width), (s.B, s.H, s.K, s.V)))
        yield "step", lambda: linear_attention_step_triton(q, k, v, g, pool, torch.arange(s.B), None)

    return calls


def momentum_delta_rule_step(s):
    from seqzoo.kernels.momentum_delta_rule.step import momentum_delta_rule_step_triton

    make = _make(s)
    q, k, p = (make(s.B, s.T, s.H, s.K) for _ in range(3))
    v, gates = make(s.B, s.T, s.HV, s.V), [make(s.B, s.T, s.HV, dtype=torch.float32) for _ in range(4)]
    pool = make(s.B, s.HV, 2, s.K, s.V, dtype=torch.float32)
    yield "step", lambda: momentum_delta_rule_step_triton(q, k, v, p, *gates, pool, torch.arange(s.B), None)


def strict_linear_attention_step(s):
    from seqzoo.kernels.strict_linear_attention.step import strict_linear_attention_step_triton

    make = _make(s)
    r, v, pool = make(s.B, s.T, s.H, s.K), make(s.B, s.T, 1, s.V), make(s.B, s.H, s.K, s.V, dtype=torch.float32)
    yield "step", lambda: strict_linear_attention_step_triton(r, v, pool, torch.arange(s.B), None, None)


def short_conv(s):
    from seqzoo.kernels.short_conv.gpu import backward, forward

    make = _make(s)
    x, weight, dy, dpast = make(s.B, s.T, s.C), make(s.C, s.W), make(s.B, s.T, s.C), make(s.B, s.W - 1, s.C)
    yield "forward", lambda: forward(x, weight, None, None)
    yield "backward", lambda: backward(x, weight, None, None, dy, dpast)


def short_conv_step(s):
    from seqzoo.kernels.short_conv.step import short_conv_step_triton

    make = _make(s)
    x, weight, pool = make(s.B, s.T, s.C), make(s.C, s.W), make(s.B, s.W - 1, s.C)
    yield "step", lambda: short_conv_step_triton(x, weight, pool, torch.arange(s.B), None)


def delta_inputs(s):
    from seqzoo.kernels.delta_inputs.gpu import backward, forward

    make, full = _make(s), dict(dtype=torch.float32)
    qkv, ba = make(s.B, s.T, 2 * s.H * s.K + s.HV * s.V), make(s.B, s.T, 2 * s.HV)
    inputs, sizes = (qkv, ba, make(s.HV, **full), make(s.HV, **full)), (s.H, s.K, 1.0)
    grads = [make(s.B, s.T, s.H, s.K, **full) for _ in range(2)] + [make(s.B, s.T, s.HV, s.V)]
    grads += [make(s.B, s.T, s.HV, **full) for _ in range(2)]
    yield "forward", lambda: forward(*inputs, *sizes)
    yield "backward", lambda: backward(*inputs, grads, *sizes)


def norm(gated: bool) -> Callable[[Rows], Calls]:
    def calls(s):
        from seqzoo.kernels.rms_norm.gpu import backward, forward

        x, gate, dy = (_make(s)(s.n, s.W) for _ in range(3))
        inputs = x, gate if gated else None, _make(s)(s.W)
        yield "forward", lambda: forward(*inputs, 1e-6, 0.0)
        yield "backward", lambda: backward(*inputs, dy, 1e-6, 0.0)

    return calls


def spike(s):
    from seqzoo.kernels.spike.gpu import backward, forward

    x, dy = (_make(s)(s.n, s.W) for _ in range(2))
    yield "forward", lambda: forward(x, 3.0)
    yield "backward", lambda: backward(x, dy, 3.0)


def delta_step(s):
    from seqzoo.kernels.delta_step.gpu import delta_step_triton

    make, full, C = _make(s), dict(dtype=torch.float32), 2 * s.H * s.K + s.HV * s.V
    time = make(s.B, s.T, C), make(s.B, s.T, 2 * s.HV), make(s.B, s.T, s.HV, s.V)
    constant = make(C, 4), make(s.HV, **full), make(s.HV, **full), make(s.V)
    pools = make(s.B, 3, C), make(s.B, s.HV, s.K, s.V, **full)
    yield "step", lambda: delta_step_triton(*time, *constant, *pools, torch.arange(s.B), None, 1e-6, 1.0)


def expert_mlp(in_triton: bool) -> Callable[[Experts], Calls]:
    """Products by torch, which are not counted, or by us, as on a GPU of which torch's would wait for the host."""

    def calls(s):
        from seqzoo.kernels.expert_mlp import gpu, grouped_product

        make = _make(s)
        chosen = torch.arange(s.R).view(s.N, s.k) % s.E
        x, dy, weight = make(s.N, s.D), make(s.N, s.D), make(s.N, s.k)
        leaves = [t.requires_grad_() for t in (x, weight, make(s.E, 2 * s.I, s.D), make(s.E, s.D, s.I))]
        y, ours = [], lambda: patch.object(grouped_product, "in_triton", lambda *_: in_triton)
        run = lambda: y.append(gpu.expert_mlp_triton(x, chosen, *leaves[1:]))
        yield "forward", ours()(run)
        yield "backward", ours()(lambda: torch.autograd.grad(y, leaves, dy))

    return calls


def ovq_attention(s):
    from seqzoo.kernels.ovq_attention.gpu import ovq_attention_triton
    from seqzoo.kernels.ovq_attention.rule import OVQRule

    make, widths = _make(s), ((s.H, s.K), (s.G, s.K), (s.G, s.V))
    leaves = [make(s.B, s.T, *width).requires_grad_() for width in widths]
    scale, rule, o = torch.ones(s.H).requires_grad_(), OVQRule(chunk=s.C, slots=s.N), []
    yield "forward", lambda: o.append(ovq_attention_triton(*leaves, scale, rule)[0])
    yield "backward", lambda: torch.autograd.grad(o, [*leaves, scale], make(s.B, s.T, s.H, s.V))


BOTH = "forward", "backward"
STEPS = [Shape(2, 3, 1, 2, 32, 64, size) for size in (2, 4)]
CHUNKS = [Shape(1, 128, 1, HV, 32, 64, **size) for HV in (1, 2) for size in (dict(size=4), dict(size=2, scratch=4))]
ALIKE = [s._replace(HV=1, K=width) for s in CHUNKS[:2] for width in (32, 64)]  # of 64 are two slices


def as_in_bf16(s):
    """One pass where every query head has a memory, and columns of a program: for float32 the tables say otherwise."""
    cut, said = dict(num_warps=4, num_stages=1), dict(scan=dict(BV=32 if s.H == s.HV else 0))
    said |= dict(gradients=dict(BK=64, BV=64), channel_gradients=dict(BK=32, BV=64))
    return [("linear_attention", kernel, config | cut) for kernel, config in said.items() if s.size == 4]


WIDE = Shape(1, 64, 1, 1, 128, 64, size=2, scratch=4)  # more slices of K than one
PER_CHANNEL = "linear_attention by channel"
ROWS = [
    Row(
        "gated_delta_rule", BOTH, recurrence(gpu_cases.gated_delta_rule), CHUNKS,
        tables=lambda s: [("gated_delta_rule", "chunk", {"C": 64})],
    ),
    Row("gated_delta_rule", ("step",), gated_delta_rule_step, STEPS),
    Row(
        "kimi_delta_rule", BOTH, recurrence(gpu_cases.kimi_delta_rule), ALIKE,
        tables=lambda s: [("kimi_delta_rule", "chunk", {"C": 64})],
    ),
    Row("kimi_delta_rule", ("step",), kimi_delta_rule_step, [s._replace(H=s.HV) for s in STEPS]),
    Row("linear_attention", BOTH, recurrence(gpu_cases.linear_attention), [*CHUNKS, WIDE], tables=as_in_bf16),
    Row("linear_attention", ("step",), linear_attention_step(), STEPS),
    Row(PER_CHANNEL, BOTH, recurrence(gpu_cases.linear_attention, 1), CHUNKS, tables=as_in_bf16),
    Row(PER_CHANNEL, ("step",), linear_attention_step("K"), STEPS),
    Row(
        "momentum_delta_rule", BOTH, recurrence(gpu_cases.momentum_delta_rule),
        [Shape(1, 64, 1, HV, 32, 64, size) for HV in (1, 2) for size in (2, 4)],
    ),
    Row("momentum_delta_rule", ("step",), momentum_delta_rule_step, STEPS),
    Row(
        "strict_linear_attention", BOTH, recurrence(gpu_cases.strict_linear_attention),
        [Shape(1, 512, 2, 2, 64, 128, 2), Shape(1, 256, 2, 2, 32, 64, 4), Shape(1, 128, 1, 1, 64, 64, 2)],
    ),
    Row(
        "strict_linear_attention", ("step",), strict_linear_attention_step,
        [Shape(2, 3, 2, 2, 256, 32, 2), Shape(2, 3, 2, 2, 64, 32, 4)],
    ),
    Row("ovq_attention", BOTH, ovq_attention, [OVQ(2, 256, 2, 1, 32, 32, 64, 64, size) for size in (2, 4)]),
    Row("short_conv", BOTH, short_conv, [Conv(2, 70, 80, 4, size) for size in (2, 4)]),
    Row("short_conv", ("step",), short_conv_step, [Conv(2, T, 80, 4, 2) for T in (1, 5)]),
    Row("delta_inputs", BOTH, delta_inputs, [Shape(2, 20, 1, 2, 32, 48, 2), Shape(2, 20, 2, 2, 48, 32, 4)]),
    Row("rms_norm", BOTH, norm(gated=False), [Rows(50, 520, 2), Rows(50, 96, 4)]),
    Row("gated_rms_norm", BOTH, norm(gated=True), [Rows(50, 96, 2), Rows(50, 300, 4)]),
    Row("delta_step", ("step",), delta_step, STEPS),
    Row("expert_mlp", BOTH, expert_mlp(in_triton=False), [Experts(50, 3, 4, 48, 40, size) for size in (2, 4)]),
    Row(
        "expert_mlp", BOTH, expert_mlp(in_triton=True), [Experts(64, 2, 2, 128, 128, 2), Experts(64, 4, 2, 64, 64, 4)],
        who="in Triton",
    ),
    Row("spike", BOTH, spike, [Rows(3, 5000, 2), Rows(50, 96, 4)]),
]  # fmt: skip
