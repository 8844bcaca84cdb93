"""Strict linear attention and BDH's level in Triton: what the laws of test_ops.py do not hold."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqzoo.kernels import gpu
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.strict_linear_attention import strict_linear_attention
from seqzoo.kernels.strict_linear_attention.gpu import strict_linear_attention_triton
from seqzoo.kernels.strict_linear_attention.level import LEVELS
from seqzoo.kernels.strict_linear_attention.reference import strict_linear_attention_reference

pytestmark = pytest.mark.skipif(not gpu.usable(), reason="no triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = dict(atol=5e-2, rtol=2e-2) if DEVICE == "cuda" else dict(atol=2e-5, rtol=1e-4)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def draw(B, T, H, G, N, D, dtype=DTYPE):
    r, v = torch.randn(B, T, H, N) * N**-0.5, torch.randn(B, T, G, D)
    return [x.to(DEVICE, dtype) for x in (r, v)], torch.randn(B, H, N, D, device=DEVICE)


def run(fn, inputs, state, starts=None, decay=None):
    """a, last, and gradients of r, v and, where there is one, of the state."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, *([] if state is None else [state]))]
    r, v, memory = (*leaves, None)[:3]
    outputs = fn(r, v, memory, starts, decay)
    torch.manual_seed(1)
    weights = [torch.randn(y.shape[1:]).expand(y.shape).to(y) for y in outputs]  # alike for all sequences
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def exact(inputs, state, starts=None, decay=None):
    wide = [x.double() for x in inputs]
    return run(strict_linear_attention_reference, wide, None if state is None else state.double(), starts, decay)


def test_same_bits_alone_in_a_batch_and_packed():
    """A document, two segments long, that begins where a segment does."""
    inputs, state = draw(2, 100, 2, 1, 6, 5)
    decay = torch.tensor([-0.01, -0.3], device=DEVICE)
    batch = run(strict_linear_attention_triton, inputs, state, None, decay)
    alone = run(strict_linear_attention_triton, [x[1:] for x in inputs], state[1:], None, decay)
    for n, (a, b) in enumerate(zip(batch, alone, strict=True)):
        assert torch.equal(a[1:], b), n
    with torch.no_grad():
        single, last = strict_linear_attention_triton(*(x[1:] for x in inputs), None, None, decay)
        packed = [torch.cat([x[:1, :64], x[1:]], dim=1) for x in inputs]
        starts = torch.arange(164, device=DEVICE)[None] == 64
        both, end = strict_linear_attention_triton(*packed, state[:1], starts, decay)
    assert torch.equal(both[:, 64:], single) and torch.equal(end, last)


@pytest.mark.parametrize("H, G, N, D", [(2, 1, 24, 40), (1, 1, 150, 130)])
def test_odd_sizes(H, G, N, D):
    inputs, state = draw(1, 33, H, G, N, D)
    at = torch.arange(33, device=DEVICE)[None]
    starts = None if G == H else (at == 7) | (at == 20)
    truth = exact(inputs, state, starts, torch.full((H,), -0.1, device=DEVICE))
    ours = run(strict_linear_attention_triton, inputs, state, starts, torch.full((H,), -0.1, device=DEVICE))
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= (1e-5 if DEVICE == "cpu" else 1.5e-2) * b.norm()


def test_no_memory_in_and_none_wanted():
    """Then neither is read, forward and backward; and heads before time is read as it is."""
    (r, v), _ = draw(1, 80, 2, 1, 6, 5)
    before = r.transpose(1, 2).contiguous().transpose(1, 2)
    weight = torch.randn(1, 80, 2, 5, device=DEVICE)
    results = []
    for x, fn in ((r.double(), strict_linear_attention_reference), (before, strict_linear_attention_triton)):
        leaves = [x.detach().requires_grad_(), v.to(x.dtype, copy=True).requires_grad_()]
        a, _ = fn(*leaves, None)
        results.append([a, *torch.autograd.grad((a * weight.to(a.dtype)).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert_close(b.double(), a, **CLOSE)
    assert results[1][1].stride() == before.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs, state = draw(1, 70, 2, 1, 10, 18, dtype)
    ours, truth = run(strict_linear_attention_triton, inputs, state), exact(inputs, state)
    assert [x.dtype for x in ours] == [dtype, torch.float32, dtype, dtype, torch.float32]
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_level_is_the_definition():
    """BDH's level around it: outputs, memory, counts, and gradients of its weights."""
    B, H, T, N, D = 1, 2, 70, 10, 7
    angle = 6 * torch.rand(1, T, N // 2)
    v, weights = F.layer_norm(torch.randn(B, T, D), (D,)), [torch.randn(H, N, D) * D**-0.5 for _ in range(3)]
    tensors = [v, *weights, angle.cos(), angle.sin(), torch.randn(B, H, N, D)]
    rest = dict(starts=None, decay=torch.tensor([0.0, -0.1]), passed=None, dropout=0.0, norm_eps=1e-5, x_before=None)
    rest["decay"] = rest["decay"].to(DEVICE)
    results = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        *inputs, state = [x.to(DEVICE, dtype).requires_grad_() for x in tensors]
        u, last, active, x = LEVELS[name](*inputs, state=state, **rest)
        assert x is None
        grads = torch.autograd.grad(u.square().sum() + last.square().sum(), [*inputs[:4], state])
        results.append([u, last, active, *grads])
    for a, b in zip(*results, strict=True):
        scale = max(1.0, a.abs().max().item())
        assert_close(b.double() / scale, a.double() / scale, atol=5e-5, rtol=5e-4)


TRACED = """
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.strict_linear_attention import strict_linear_attention

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
r, v = torch.rand(1, 2, 40, 6, device=device).transpose(1, 2) / 3, torch.rand(1, 40, 1, 5, device=device)
for learns in (True, False):
    leaves = [x.detach().requires_grad_(learns) for x in (r, v)]
    for starts in (None, torch.rand(1, 40, device=device) < 0.1):
        run = lambda *x: strict_linear_attention(*x, starts=starts)[0].square().sum()
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


def test_says_what_is_wrong(monkeypatch):
    (r, v), _ = draw(1, 4, 1, 1, 4, 3)
    with use_backend("triton"), pytest.raises(ValueError, match="backend triton: expected float32.* got torch.float64"):
        strict_linear_attention(r.double(), v.double())
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with use_backend("triton"), pytest.raises(ValueError, match="backend triton: expected tensors on a GPU"):
            strict_linear_attention(r, v)
