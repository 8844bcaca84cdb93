"""Linear attention's Triton kernels: cut into segments, in one pass and in two, decays of any strength, any widths."""

import subprocess
import sys

import pytest
import torch
from test_ops import HERE, documents, values_and_grads
from torch.testing import assert_close

from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gpu.tables import using
from seqzoo.kernels.linear_attention import gpu, linear_attention
from seqzoo.kernels.linear_attention.reference import linear_attention_reference

pytestmark = [
    *([HERE["triton"]] if isinstance(HERE["triton"], pytest.MarkDecorator | pytest.Mark) else HERE["triton"]),
    pytest.mark.skipif(torch.cuda.is_available(), reason="fp32 products, as the interpreter has them"),
]
NAMES = ["o", "last", "dq", "dk", "dv", "dg", "d_state"]
PASSES = {"one pass": dict(BV=16, num_warps=4, num_stages=1), "two passes": dict(BV=0)}


def drawn(T, H, G, K, V, decay, B=1, strength="any"):
    """q, k, v, g, state."""
    q, k, v = torch.randn(B, T, H, K) * K**-0.5, torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    shape = dict(none=None, head=(B, T, G), channel=(B, T, G, K))[decay]
    if shape is None:
        return q, k, v, None, torch.randn(B, G, K, V)
    g = -torch.rand(shape).square()
    if strength == "strong":
        g = torch.where(torch.rand(shape) < 0.5, -20.0, g)
    if strength == "early":  # a sum of -600 in a chunk, and little after
        early = torch.arange(T) < 30
        g = torch.where(early.view(1, T, *[1] * (len(shape) - 2)), -20.0, -0.01).expand(shape).contiguous()
    if strength == "gone":
        g = torch.where(torch.rand(shape) < 0.1, -torch.inf, g)
    return q, k, v, g, torch.randn(B, G, K, V)


def ours(inputs, starts=None, segments=None):
    """Outputs and gradients for the weights that `values_and_grads` draws."""
    q, k, v, g, state = inputs
    o, last = gpu.forward(q, k, v, g, state, starts, segments)
    torch.manual_seed(1)
    d_o, d_last = (torch.randn(y.shape).to(y) for y in (o, last))
    return [o, last, *gpu.backward(d_o, d_last, q, k, v, g, state, starts, segments)]


def truth(inputs, starts=None):
    *time, state = (None if x is None else x.double() for x in inputs)
    if time[3] is None:
        without = lambda q, k, v, state, starts: linear_attention_reference(q, k, v, None, state, starts)
        found = values_and_grads(without, time[:3], state, starts)
        return [*found[:5], None, found[5]]
    return values_and_grads(linear_attention_reference, time, state, starts)


@pytest.mark.parametrize("way", PASSES)
@pytest.mark.parametrize(
    "decay, sizes, segments",
    [
        ("none", (140, 2, 1, 24, 40), 3),
        ("head", (140, 2, 1, 24, 40), 2),
        ("channel", (140, 2, 1, 24, 20), 3),
        ("head", (30, 1, 1, 20, 140), 1),
        ("channel", (30, 1, 1, 136, 20), 1),
    ],
)
def test_is_the_definition(way, decay, sizes, segments):
    inputs = drawn(*sizes, decay)
    starts = None if decay == "none" else documents("random", sizes[0])[1:]
    with using("linear_attention", "scan", PASSES[way]):
        found = ours(inputs, starts, segments)
    for name, a, b in zip(NAMES, found, truth(inputs, starts), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a.double(), b, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("strength", ["strong", "early", "gone"])
def test_decays_of_any_strength(decay, strength):
    """Digits are not lost in sums of strong decays, nor the gradient of one; what is forgotten leaves exact zeros."""
    inputs = drawn(70, 1, 1, 5, 6, decay, strength=strength)
    found, exact = ours(inputs, segments=2), truth(inputs)
    for name, a, b in zip(NAMES, found, exact, strict=True):
        assert (a.double() - b).abs().max() <= 4e-6 * b.abs().max(), name
    g, dg, exact = inputs[3], found[5].double(), exact[5]
    if strength == "gone":
        assert not dg[g == -torch.inf].any()
    if decay == "head":  # one by one, however small
        assert ((dg - exact).abs() <= 1e-3 * exact.abs() + 1e-6 * g.double().exp()).all()


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_same_bits_alone_and_in_a_batch(decay):
    """A row of a batch, and a document whose start is marked and is a chunk's."""
    inputs = drawn(64, 1, 1, 6, 5, decay, B=2)
    for n, (a, b) in enumerate(zip(ours(inputs), ours([x[:1] for x in inputs]), strict=True)):
        if n < 2:  # the weights of gradients are others
            assert torch.equal(a[:1], b)
    d_o, d_last = torch.randn(2, 64, 1, 5), torch.randn(2, 1, 6, 5)
    batch = gpu.backward(d_o, d_last, *inputs, None)
    for a, b in zip(batch, gpu.backward(d_o[1:], d_last[1:], *(x[1:] for x in inputs), None), strict=True):
        assert torch.equal(a[1:], b)
    q, k, v, g, _ = inputs
    starts = torch.arange(128)[None] % 64 == 0
    o, last = gpu.forward(*(x.flatten(0, 1)[None] for x in (q, k, v, g)), None, starts)
    alone, end = gpu.forward(q[1:], k[1:], v[1:], g[1:], None, starts[:, 64:])
    assert torch.equal(o[:, 64:], alone) and torch.equal(last, end)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_half_precision(dtype, decay):
    """Near the definition on the same numbers; outputs and gradients keep dtypes; strides of a wider tensor."""
    q, k, v, g, state = drawn(70, 2, 1, 6, 5, decay)
    wide = torch.cat([x.flatten(2) for x in (q, k, v)], -1).to(dtype)
    q, k, v = (x.unflatten(-1, (-1, w)) for x, w in zip(wide.split([12, 6, 5], -1), (6, 6, 5), strict=True))
    found = values_and_grads(gpu.linear_attention_triton, [q, k, v, g], state)
    exact = truth((q, k, v, g, state))
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * 3, *[torch.float32] * 2]
    for name, a, b in zip(NAMES, found, exact, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm(), name


TRACED = """
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.linear_attention import linear_attention

torch.manual_seed(0)
inputs = [torch.rand(shape) / 3 for shape in ((1, 20, 2, 6), (1, 20, 1, 6), (1, 20, 1, 5), (1, 20, 1))]
inputs[3] = -inputs[3]
for learns in (True, False):
    leaves = [x.detach().requires_grad_(learns) for x in inputs]
    run = lambda *x: linear_attention(*x)[0].square().sum()
    with use_backend("triton"):
        traced, direct = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves), run(*leaves)
    torch.testing.assert_close(traced, direct)
    if learns:
        torch.testing.assert_close(torch.autograd.grad(traced, leaves), torch.autograd.grad(direct, leaves))
"""


def test_compiles():
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_says_what_it_cannot():
    q, k, v, g, state = drawn(3, 1, 1, 4, 257, "head")
    with use_backend("triton"):
        with pytest.raises(ValueError, match="backend triton: expected K and V up to 256, got 4 and 257"):
            linear_attention(q, k, v, g, state=state)
        with pytest.raises(ValueError, match="backend triton: expected float32, bfloat16 or float16"):
            linear_attention(*(x[..., :4].double() for x in (q, k, v)))
