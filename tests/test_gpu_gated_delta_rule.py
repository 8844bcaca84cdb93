"""The Triton backend of the gated delta rule, interpreted: shapes, bits, dtypes, splitting. Its laws: `test_ops.py`."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqzoo.kernels import gpu as ground
from seqzoo.kernels.gated_delta_rule import gpu, gpu_call
from seqzoo.kernels.gated_delta_rule.gpu import gated_delta_rule_triton
from seqzoo.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from seqzoo.kernels.gpu.tables import using

pytestmark = pytest.mark.skipif(not ground.usable(), reason="no triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(B, T, H, HV, K, V, fading=2.0):
    """q, k, v, g, beta and a state."""
    q, k, v = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1), torch.randn(B, T, HV, V)
    g, beta = F.logsigmoid(torch.randn(B, T, HV) + fading), torch.rand(B, T, HV)
    return [x.to(DEVICE) for x in (q, k, v, g, beta, torch.randn(B, HV, K, V))]


def begun(B, T, *where):
    starts = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    starts[:, list(where)] = True
    return starts


def with_grads(fn, inputs, starts=None):
    """o, the last memory, and the gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = fn(*leaves, starts)
    torch.manual_seed(1)
    weights = [torch.randn(y.shape).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def near(ours, truth, most):
    """By the size of the difference; each by its name."""
    for name, a, b in zip(("o", "last", "q", "k", "v", "g", "beta", "state"), ours, truth, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < most, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize(
    "B, T, H, HV, K, V",
    [(2, 67, 1, 2, 24, 40), (1, 33, 1, 1, 40, 130), (1, 40, 1, 1, 136, 20)],
    ids=["odd", "V > 128", "K > 128"],
)
def test_odd_sizes(B, T, H, HV, K, V):
    inputs, starts = draw(B, T, H, HV, K, V), begun(B, T, 5, 31, 32)
    truth = with_grads(gated_delta_rule_reference, [x.double() for x in inputs], starts)
    near(with_grads(gated_delta_rule_triton, inputs, starts), truth, 2e-6 if DEVICE == "cpu" else 5e-3)


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_the_same_key_again_and_again(chunk):
    """Where keys repeat and nothing fades, the powers of L reach thousands; the inverse must not be made of them."""
    q, k, v, _, beta, state = draw(1, 64, 1, 1, 8, 16)
    inputs = [q, k[:, :1].expand_as(k).contiguous(), v, torch.zeros_like(beta), 1.0 + beta, state]
    truth = with_grads(gated_delta_rule_reference, [x.double() for x in inputs])
    with using("gated_delta_rule", "chunk", dict(C=chunk)):
        near(with_grads(gated_delta_rule_triton, inputs), truth, 1e-5 if DEVICE == "cpu" else 2e-2)


def test_long_decay_keeps_small_differences():
    """After a sum of decays of -600 inside a chunk, float32 alone would be wrong by 1e-5."""
    inputs = draw(1, 64, 1, 1, 3, 5)
    inputs[3] = torch.where(torch.arange(64, device=DEVICE)[:, None] < 30, -20.0, -0.01)[None].contiguous()
    truth = with_grads(gated_delta_rule_reference, [x.double() for x in inputs])
    near(with_grads(gated_delta_rule_triton, inputs), truth, 1e-6 if DEVICE == "cpu" else 5e-3)


def test_decay_beyond_any_exponent():
    """exp(g) is 0 for all g below -104, and so is its gradient."""
    inputs = draw(1, 20, 1, 1, 3, 5)
    inputs[3] = torch.where(torch.arange(20, device=DEVICE) % 7 == 3, -1e38, -0.1)[None, :, None].contiguous()
    truth = with_grads(gated_delta_rule_reference, inputs)
    near(with_grads(gated_delta_rule_triton, inputs), truth, 1e-6 if DEVICE == "cpu" else 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Half inputs, fp32 gates: near the definition on the same numbers; outputs and gradients keep dtypes."""
    inputs = draw(1, 66, 1, 2, 16, 20)
    inputs[:3] = [x.to(dtype) for x in inputs[:3]]
    ours = with_grads(gated_delta_rule_triton, inputs)
    truth = with_grads(gated_delta_rule_reference, [x.float() for x in inputs])
    assert [x.dtype for x in ours] == [dtype, torch.float32, *[dtype] * 3, *[torch.float32] * 3]
    near(ours, truth, 1e-2)


def test_same_bits_alone_in_a_batch_and_packed():
    """Of a sequence alone and in a batch, and of a document alone and packed from where a chunk starts."""
    *time, state = draw(2, 64, 1, 2, 8, 12)
    batch = with_grads(gated_delta_rule_triton, [*time, state])
    alone = with_grads(gated_delta_rule_triton, [*(x[1:] for x in time), state[1:]])
    assert torch.equal(batch[0][1:], alone[0]) and torch.equal(batch[1][1:], alone[1])
    leaves = [x.flatten(0, 1)[None].requires_grad_() for x in time]
    packed, end = gated_delta_rule_triton(*leaves, None, begun(1, 128, 0, 64))
    single = [x[1:].clone().requires_grad_() for x in time]
    o, last = gated_delta_rule_triton(*single, None)
    assert torch.equal(packed[:, 64:], o) and torch.equal(end, last)
    for a, b in zip(torch.autograd.grad(packed.sum(), leaves), torch.autograd.grad(o.sum(), single), strict=True):
        assert torch.equal(a[:, 64:], b)


@pytest.mark.parametrize(
    "parts, T, starts, has_state", [(2, 70, (), True), (4, 100, (40, 41), True), (3, 96, (), False)]
)
def test_split(monkeypatch, parts, T, starts, has_state):
    """The sequence in parts that run at once: the definition, forward and backward, and a batch's bits."""
    monkeypatch.setattr(gpu_call, "parts", parts)
    *time, state = draw(2, T, 1, 2, 8, 12, fading=4.0)
    if not has_state:
        state.zero_()
    with using("gated_delta_rule", "chunk", dict(C=16)):
        ours = with_grads(gated_delta_rule_triton, [*time, state], begun(2, T, *starts))
        if parts == 4:
            alone = with_grads(gated_delta_rule_triton, [*(x[1:] for x in time), state[1:]], begun(1, T, *starts))
            assert torch.equal(ours[0][1:], alone[0]) and torch.equal(ours[1][1:], alone[1])
    truth = with_grads(gated_delta_rule_reference, [x.double() for x in (*time, state)], begun(2, T, *starts))
    near(ours, truth, 2e-6 if DEVICE == "cpu" else 5e-3)


def test_splits_where_heads_are_few():
    split = lambda T, HV: gpu_call.split(T, HV, 128, 128, 64, "sm_90")
    assert split(32768, 8) == 16 and split(32768, 32) == 4  # 16 of 132 multiprocessors would work, or 64
    assert split(131072, 4) == 33 and split(4096, 8) == 1 and split(1, 1) == 1
    assert gpu_call.split(10**6, 1, 136, 128, 64, "gfx942") == 1
    assert gpu_call.split(10**6, 1, 128, 128, 64, "gfx942") * -(-15625 // 304) >= 15625  # the parts hold all chunks


def test_strides_are_followed():
    """q, k, v as views into one wider tensor are not copied."""
    wide = torch.randn(2, 20, 2 * 2 * 3 + 4 * 5, device=DEVICE)
    q, k, v = (x.unflatten(-1, (-1, w)) for x, w in zip(wide.split([6, 6, 20], dim=-1), (3, 3, 5), strict=True))
    assert all(gpu_call.rows_of(x) is x for x in (q, k, v)) and gpu_call.rows_of(q.mT) is not q.mT
    g, beta = -torch.rand(2, 4, 20, device=DEVICE).mT, torch.rand(2, 20, 8, device=DEVICE)[..., ::2]
    for a, b in zip(
        gated_delta_rule_triton(q, k, v, g, beta, None), gated_delta_rule_reference(q, k, v, g, beta, None), strict=True
    ):
        assert_close(a, b, atol=2e-5 if DEVICE == "cpu" else 2e-2, rtol=1e-4)


TRACED = """
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gated_delta_rule import gated_delta_rule

shapes = dict(q=(1, 20, 1, 7), k=(1, 20, 1, 7), v=(1, 20, 2, 5), g=(1, 20, 2), beta=(1, 20, 2))
inputs = [torch.rand(shape) / 3 for shape in shapes.values()]
inputs[3] = -inputs[3]
starts = torch.arange(20)[None] == 9
for learns in (True, False):
    leaves = [x.detach().requires_grad_(learns) for x in inputs]
    run = lambda *x: gated_delta_rule(*x, starts=starts)[0].square().sum()
    with use_backend("triton"):
        traced, direct = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves), run(*leaves)
    torch.testing.assert_close(traced, direct)
    if learns:
        torch.testing.assert_close(torch.autograd.grad(traced, leaves), torch.autograd.grad(direct, leaves))
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="interpreted")
def test_compiles():
    """Traced into one graph; in a process without the type checks of tests, which cannot be traced."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_says_what_it_cannot():
    inputs = draw(1, 2, 1, 1, 3, 5)
    with pytest.raises(ValueError, match="backend triton: expected float32"):
        gated_delta_rule_triton(*(x.double() for x in inputs))
    with pytest.raises(ValueError, match="backend triton: expected K and V of at most 256, got 3 and 300"):
        gated_delta_rule_triton(*draw(1, 2, 1, 1, 3, 300))
    assert not gpu.able(torch.empty(1, 1, 1, 300), torch.empty(1, 1, 1, 5, dtype=torch.bfloat16))
    assert gpu.able(torch.empty(1, 1, 1, 256), torch.empty(1, 1, 1, 5, dtype=torch.bfloat16))
