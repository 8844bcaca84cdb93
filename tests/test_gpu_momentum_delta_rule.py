"""The momentum delta rule in Triton: what the laws of test_ops.py do not hold. Interpreted where there is no GPU."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import gpu
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.momentum_delta_rule import momentum_delta_rule
from seqzoo.kernels.momentum_delta_rule.gpu import momentum_delta_rule_triton
from seqzoo.kernels.momentum_delta_rule.reference import momentum_delta_rule_reference

pytestmark = pytest.mark.skipif(not gpu.usable(), reason="no triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def draw(B, T, H, HP, HV, K, V, dtype=DTYPE, log_mu=None):
    """The time inputs and a state; the four gates are fp32."""
    unit = lambda heads: F.normalize(torch.randn(B, T, heads, K), dim=-1)
    wide = [torch.randn(B, T, H, K), unit(H), torch.randn(B, T, HV, V), unit(HP)]
    gates = [F.logsigmoid(torch.randn(B, T, HV)) for _ in range(2)] + [torch.rand(B, T, HV) for _ in range(2)]
    if log_mu is not None:
        gates[1] = torch.full_like(gates[1], log_mu)
    return [*(x.to(DEVICE, dtype) for x in wide), *(x.to(DEVICE) for x in gates)], torch.randn(B, HV, 2, K, V).to(
        DEVICE
    )


def run(fn, time, state, starts=None):
    """o, last, and the gradient of every input."""
    leaves = [x.clone().requires_grad_() for x in (*time, state)]
    outputs = fn(*leaves, starts)
    torch.manual_seed(1)
    weights = [torch.randn(y.shape[1:]).expand(y.shape).to(y) for y in outputs]  # alike for all sequences
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def exact(time, state, starts=None):
    return run(momentum_delta_rule_reference, [x.double() for x in time], state.double(), starts)


def test_same_bits_alone_in_a_batch_and_packed():
    """A document that begins where a chunk does; chunks have 32 or 64 tokens."""
    time, state = draw(2, 40, 1, 1, 1, 6, 5)
    batch = run(momentum_delta_rule_triton, time, state)
    alone = run(momentum_delta_rule_triton, [x[1:] for x in time], state[1:])
    for n, (a, b) in enumerate(zip(batch, alone, strict=True)):
        assert torch.equal(a[1:], b), n
    with torch.no_grad():
        single, last = momentum_delta_rule_triton(*(x[1:] for x in time), None)
        packed = [torch.cat([x[:1], x[:1, :24], x[1:]], dim=1) for x in time]
        starts = torch.arange(104, device=DEVICE)[None] == 64
        both, end = momentum_delta_rule_triton(*packed, state[:1], starts)
    assert torch.equal(both[:, 64:], single) and torch.equal(end, last)


@pytest.mark.parametrize("H, HP, HV, K, V", [(1, 2, 2, 24, 40), (1, 1, 1, 100, 130)])
def test_odd_sizes(H, HP, HV, K, V):
    time, state = draw(1, 35, H, HP, HV, K, V)
    at = torch.arange(35, device=DEVICE)[None]
    starts = (at == 7) | (at == 33) if H < HV else None
    ours, truth = run(momentum_delta_rule_triton, time, state, starts), exact(time, state, starts)
    for n, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert (a.double() - b).norm() <= (1e-5 if DEVICE == "cpu" else 1.5e-2) * b.norm(), n


@pytest.mark.parametrize("log_mu", [-0.5, -20.0])
def test_exact_where_ratios_of_decays_overflow(log_mu):
    time, state = draw(1, 64, 1, 1, 1, 8, 8, torch.float32, log_mu)
    ours, truth = run(momentum_delta_rule_triton, time, state), exact(time, state)
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= (2e-6 if DEVICE == "cpu" else 1e-2) * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Also the way that bfloat16 takes, which reads while it writes."""
    time, state = draw(1, 70, 1, 1, 2, 10, 18, dtype)
    ours, truth = run(momentum_delta_rule_triton, time, state), exact(time, state)
    assert [x.dtype for x in ours] == [dtype, torch.float32, *[dtype] * 4, *[torch.float32] * 5]
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_cut_out_of_a_wider_tensor():
    """q, k, v and p as views: the same bits; and a gradient of the outputs alone."""
    time, _ = draw(1, 34, 1, 1, 1, 6, 5)
    wide = torch.cat([x.flatten(2) for x in time[:4]], dim=2)
    views = [x.unflatten(2, (1, -1)) for x in wide.split([6, 6, 5, 6], dim=2)]
    assert not views[0].is_contiguous()
    results = []
    for parts in (time[:4], views):
        leaves = [x.detach().requires_grad_() for x in (*parts, *time[4:])]
        o, _ = momentum_delta_rule_triton(*leaves, None)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


TRACED = """
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.momentum_delta_rule import momentum_delta_rule

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
shapes = [(1, 34, 1, 6), (1, 34, 1, 6), (1, 34, 2, 5), (1, 34, 1, 6), *[(1, 34, 2)] * 4]
inputs = [torch.rand(shape, device=device) / 3 for shape in shapes]
inputs[4:6] = [-x for x in inputs[4:6]]
for learns in (True, False):
    leaves = [x.detach().requires_grad_(learns) for x in inputs]
    for starts in (None, torch.rand(1, 34, device=device) < 0.1):
        run = lambda *x: momentum_delta_rule(*x, starts=starts)[0].square().sum()
        with use_backend("triton"):
            traced, direct = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves), run(*leaves)
            torch.testing.assert_close(traced, direct)
            if learns:
                torch.testing.assert_close(torch.autograd.grad(traced, leaves), torch.autograd.grad(direct, leaves))
"""


def test_compiles():
    """Traced into one graph, packed or not; in a process without the type checks of tests, which cannot be traced."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_says_what_is_wrong():
    time, _ = draw(1, 2, 1, 1, 1, 130, 3)
    with use_backend("triton"), pytest.raises(ValueError, match="expected K of at most 128 .* got 130"):
        momentum_delta_rule(*time)
    with use_backend("triton"), pytest.raises(ValueError, match="backend triton: expected float32.* got torch.float64"):
        momentum_delta_rule(*(x.double() for x in time))
