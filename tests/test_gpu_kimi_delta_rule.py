"""The Triton backend of the Kimi delta rule, interpreted: shapes, decays, bits, dtypes. Its laws: `test_ops.py`."""

import pytest
import torch
import torch.nn.functional as F
import traced
from test_ops import values_and_grads

from seqzoo.kernels import gpu as ground
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gpu.operands import even_rows
from seqzoo.kernels.gpu.tables import using
from seqzoo.kernels.kimi_delta_rule import gpu, kimi_delta_rule
from seqzoo.kernels.kimi_delta_rule.gpu import kimi_delta_rule_triton
from seqzoo.kernels.kimi_delta_rule.reference import kimi_delta_rule_reference

pytestmark = pytest.mark.skipif(not ground.usable(), reason="no triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "last", "q", "k", "v", "g", "beta", "state")
EXACT = 4e-6 if DEVICE == "cpu" else 5e-3  # the interpreter multiplies in fp32, a GPU as tf32


def draw(B, T, H, K, V):
    """q, k, v, g, beta and a state."""
    q, k, v = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1), torch.randn(B, T, H, V)
    g, beta = F.logsigmoid(torch.randn(B, T, H, K) + 2.0), torch.rand(B, T, H)
    return [x.to(DEVICE) for x in (q, k, v, g, beta, torch.randn(B, H, K, V))]


def begun(B, T, *where):
    starts = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    starts[:, list(where)] = True
    return starts


def ours_and_truth(inputs, starts=None):
    *time, state = inputs
    ours = values_and_grads(kimi_delta_rule_triton, time, state, starts)
    return ours, values_and_grads(kimi_delta_rule_reference, [x.double() for x in time], state.double(), starts)


def check_near(inputs, starts=None, most=EXACT):
    """By the size of the difference; each by its name."""
    for name, a, b in zip(NAMES, *ours_and_truth(inputs, starts), strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < most, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize(
    "B, T, H, K, V",
    [(2, 67, 2, 24, 40), (1, 33, 1, 40, 130), (1, 40, 1, 136, 20)],
    ids=["odd", "V > 128", "K > 128"],
)
def test_odd_sizes(B, T, H, K, V):
    check_near(draw(B, T, H, K, V), begun(B, T, 5, 31, 32))


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_the_same_key_again_and_again(chunk):
    """Where keys repeat and nothing fades, the powers of L reach thousands; the inverse must not be made of them."""
    q, k, v, g, beta, state = draw(1, 70, 1, 8, 16)
    with using("kimi_delta_rule", "chunk", dict(C=chunk)):
        check_near([q, k[:, :1].expand_as(k).contiguous(), v, torch.zeros_like(g), 1.0 + beta, state], most=5 * EXACT)


@pytest.mark.parametrize("strength", ["strong", "early", "gone"])
def test_decays_of_any_strength(strength):
    """Digits are not lost in sums of strong decays, nor the gradient of one; what is forgotten leaves exact zeros."""
    inputs = draw(1, 70, 1, 5, 6)
    g = inputs[3]
    if strength == "strong":
        g[torch.rand_like(g) < 0.5] = -20.0
    if strength == "early":  # a sum of -600 in a chunk, and little after
        g[:, :30], g[:, 30:] = -20.0, -0.01
    if strength == "gone":
        g[torch.rand_like(g) < 0.1] = -1e38
    ours, truth = ours_and_truth(inputs)
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        assert (a.double() - b).abs().max() <= EXACT * b.abs().max(), name
    assert not ours[5][g < -1000].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_half_precision(dtype, wide):
    """Half inputs, fp32 gates, q and k perhaps too: near the definition on the same numbers; all keep their dtypes."""
    inputs = draw(1, 66, 2, 16, 20)
    of_keys = torch.float32 if wide else dtype
    inputs[:3] = [x.to(kind) for x, kind in zip(inputs, (of_keys, of_keys, dtype), strict=False)]
    ours, truth = ours_and_truth(inputs)
    assert [x.dtype for x in ours] == [dtype, torch.float32, of_keys, of_keys, dtype, *[torch.float32] * 3]
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm(), name


def test_same_bits_alone_and_in_a_batch():
    """Of a row of a batch, forward and backward; a document that starts where a chunk does is as if it were alone."""
    *time, state = draw(2, 64, 2, 8, 12)
    o, last, A = gpu.forward(*time, state, None)
    alone = gpu.forward(*(x[1:] for x in time), state[1:], None)
    assert all(torch.equal(a[1:], b) for a, b in zip((o, last, A), alone, strict=True))
    batch = gpu.backward(o, last, *time, state, None, A)
    single = gpu.backward(*(x[1:] for x in (o, last, *time, state)), None, A[1:])
    assert all(torch.equal(a[1:], b) for a, b in zip(batch, single, strict=True))
    packed, end = kimi_delta_rule_triton(*(x.flatten(0, 1)[None] for x in time), None, begun(1, 128, 0, 64))
    marked, last = kimi_delta_rule_triton(*(x[1:] for x in time), None, begun(1, 64, 0))
    assert torch.equal(packed[:, 64:], marked) and torch.equal(end, last)


def test_strides_are_followed():
    """q, k, v as views into one wider tensor are not copied."""
    wide = torch.randn(2, 20, 2 * 2 * 3 + 2 * 5, device=DEVICE)
    q, k, v = (x.unflatten(-1, (-1, w)) for x, w in zip(wide.split([6, 6, 10], dim=-1), (3, 3, 5), strict=True))
    assert all(even_rows(x) is x for x in (q, k, v)) and even_rows(q.mT) is not q.mT
    g, beta = -torch.rand(2, 20, 3, 2, device=DEVICE).mT, torch.rand(2, 20, 4, device=DEVICE)[..., ::2]
    expected = kimi_delta_rule_reference(q, k, v, g, beta, None)
    for a, b in zip(kimi_delta_rule_triton(q, k, v, g, beta, None), expected, strict=True):
        assert (a - b).norm() < EXACT * b.norm()


TRACED = """
import torch
import traced
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.kimi_delta_rule import kimi_delta_rule

shapes = dict(q=(1, 20, 2, 7), k=(1, 20, 2, 7), v=(1, 20, 2, 5), g=(1, 20, 2, 7), beta=(1, 20, 2))
inputs = [torch.rand(shape) / 3 for shape in shapes.values()]
inputs[3] = -inputs[3]
starts = torch.arange(20)[None] == 9
for learns in (True, False):
    leaves = [x.detach().requires_grad_(learns) for x in inputs]
    run = lambda *x: kimi_delta_rule(*x, starts=starts)[0].square().sum()
    with use_backend("triton"):
        traced.agrees(run, leaves)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="interpreted")
def test_compiles():
    """Traced into one graph; in a process without the type checks of tests, which cannot be traced."""
    traced.passes(TRACED)


def test_says_what_it_cannot():
    inputs = draw(1, 2, 1, 3, 5)
    with use_backend("triton"):
        with pytest.raises(ValueError, match="backend triton: expected float32"):
            kimi_delta_rule(*(x.double() for x in inputs[:5]))
        with pytest.raises(ValueError, match="backend triton: expected K and V of at most 256, got 3 and 300"):
            kimi_delta_rule(*draw(1, 2, 1, 3, 300)[:5])
    assert not gpu.able(torch.empty(1, 1, 1, 300), torch.empty(1, 1, 1, 5, dtype=torch.bfloat16))
    assert gpu.able(torch.empty(1, 1, 1, 256), torch.empty(1, 1, 1, 5, dtype=torch.bfloat16))
