"""What test_ops.py does not ask of linear attention: the public op, dtypes, -inf, and the options of the mixer."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import traced
from torch.testing import assert_close

from seqzoo.kernels import native
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.linear_attention.op import BACKENDS
from seqzoo.kernels.linear_attention.reference import linear_attention_reference
from seqzoo.layers.registry import build

NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
CPP = pytest.param("cpp", marks=NEEDS_COMPILER)
B, G, K, V = 2, 2, 7, 5


def draw(T, H=6, dtype=torch.float32, decay="channel"):
    """q, k, v, g."""
    g = {"none": None, "head": torch.randn(B, T, G), "channel": torch.randn(B, T, G, K)}[decay]
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    return [None if x is None else x.to(dtype) for x in (q, k, v, None if g is None else F.logsigmoid(g))]


def gradients(fn, inputs, state=None, starts=None):
    leaves = [x.clone().requires_grad_() for x in inputs if x is not None]
    q, k, v, *g = leaves
    o, last = fn(q, k, v, g[0] if g else None, state, starts)
    torch.manual_seed(1)
    return [o, last, *torch.autograd.grad(o, leaves, torch.randn(o.shape).to(o))]


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("backend", ["torch", CPP])
def test_a_group_is_its_heads(backend, decay):
    """What is kept once for a group is what every query head would keep for itself: outputs and summed gradients."""
    q, k, v, g = inputs = draw(70, decay=decay)
    alone = lambda q, k, v, g, *rest: BACKENDS[backend](
        q, *(x if x is None else x.repeat_interleave(3, dim=2) for x in (k, v, g)), *rest
    )
    ours, theirs = gradients(BACKENDS[backend], inputs), gradients(alone, inputs)
    assert ours[1].shape == (B, G, K, V) and theirs[1].shape == (B, 3 * G, K, V)
    theirs[1] = theirs[1][:, ::3]
    assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("backend", ["reference", "torch", CPP])
def test_minus_infinity_is_a_start(backend, kind):
    """To the last bit, and no NaN anywhere."""
    q, k, v, g = draw(50, decay=kind)
    state, starts = torch.randn(B, G, K, V), torch.zeros(B, 50, dtype=torch.bool)
    starts[:, [0, 1, 17, 33]] = True
    gone = g.masked_fill(starts.view(B, 50, *[1] * (g.ndim - 2)), -torch.inf)
    ours = gradients(BACKENDS[backend], [q, k, v, gone], state.clone())
    truth = gradients(linear_attention_reference, [x.double() for x in (q, k, v, g)], state.double(), starts)
    for a, b in zip(ours, truth, strict=True):
        assert_close(a.double(), b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", CPP])
def test_strong_decays_and_their_gradients(backend):
    """-20 per token and -1e4 beside decays of nothing, over several chunks of any backend."""
    q, k, v, _ = draw(200)
    choice = torch.tensor([0.0, -1e-4, -0.3, -20.0, -1e4])
    g = choice[torch.randint(5, (B, 200, G, K))]
    ours = gradients(BACKENDS[backend], [q, k, v, g])
    truth = gradients(linear_attention_reference, [x.double() for x in (q, k, v, g)])
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    """Half inputs, fp32 decays: near the definition on the same numbers in fp32; outputs and gradients keep dtypes."""
    q, k, v, g = draw(130)
    inputs, state = [x.to(dtype) for x in (q, k, v)], torch.randn(B, G, K, V)
    starts = torch.rand(B, 130) < 0.05
    ours = gradients(BACKENDS[backend], [*inputs, g], state.clone(), starts)
    truth = gradients(linear_attention_reference, [x.float() for x in (*inputs, g)], state, starts)
    assert [x.dtype for x in ours] == [dtype, torch.float32, *[dtype] * 3, torch.float32]
    for a, b in zip(ours, truth, strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_derivatives_by_differences():
    q, k, v, g = draw(5, H=4, dtype=torch.float64)
    starts = torch.tensor([[False, False, True, False, False]] * B)
    leaves = [x[..., :2].clone().requires_grad_() for x in (q, k, v, g)]
    run = lambda *x: linear_attention(*x, starts=starts)
    with use_backend("torch"):
        assert torch.autograd.gradcheck(run, leaves)


@NEEDS_COMPILER
@pytest.mark.parametrize("T", [2, 70])
def test_strides_are_followed(T):
    """q, k, v as views into one wider tensor, g expanded over time, as a layer hands them."""
    wide = torch.randn(B, T, 6 * K + G * K + G * V)
    q, k, v = (x.unflatten(-1, (-1, w)) for x, w in zip(wide.split([6 * K, G * K, G * V], -1), (K, K, V), strict=True))
    g = -torch.rand(G).expand(B, T, -1)
    with torch.no_grad():
        ours = BACKENDS["cpp"](q, k, v, g, None)
        truth = linear_attention_reference(q, k, v, g, None)
    assert_close(ours, truth, atol=2e-5, rtol=1e-4)


@NEEDS_COMPILER
def test_what_fades_to_nothing_costs_nothing():
    """The calling thread takes denormals as it did before, though inside they count as 0."""
    tiny = torch.full((4,), 1e-39)
    q, k, v, g = draw(40)
    with torch.no_grad():
        BACKENDS["cpp"](q, k, v, g, torch.full((B, G, K, V), 1e-39))
    assert (tiny * 0.5).any()


@pytest.mark.parametrize("backend", ["reference", "torch", CPP])
def test_public_op(backend):
    """Under autocast and activation checkpointing: v's dtype out, fp32 state, the same gradients."""
    leaves = [x.requires_grad_() for x in draw(70)]
    state = torch.randn(B, G, K, V)
    call = lambda *x: linear_attention(*x, state=state.clone())[0]
    with use_backend(backend):
        plain = torch.autograd.grad(call(*leaves).sum(), leaves)
        with torch.autocast("cpu", torch.bfloat16):
            o = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
        again = torch.autograd.grad(o.sum(), leaves)
    assert o.dtype == torch.float32
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


TRACED = """
import torch
import traced
from seqzoo.kernels.linear_attention import linear_attention

torch.manual_seed(0)
q, k, v = torch.rand(2, 70, 4, 7), torch.rand(2, 70, 2, 7), torch.rand(2, 70, 2, 5)
for g, starts, learns in (
    (None, torch.rand(2, 70) < 0.1, True), (-torch.rand(2, 70, 2, 7), None, True), (-torch.rand(2, 70, 2), None, False)
):
    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_(learns) for x in (q, k, v, g) if x is not None]
    run = lambda *x: linear_attention(*x, starts=starts)[0].square().sum()
    traced.agrees(run, leaves)
"""


@NEEDS_COMPILER
def test_compiles():
    """Traced into one graph, packed or not; in a process without the type checks of tests, which cannot be traced."""
    traced.passes(TRACED)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda x: x[0], "q and v: expected .* got"),
        ("q", lambda x: x[:, :0], "q and v: .* every size >= 1"),
        ("q", lambda x: x[:, :, :5], "q: expected a multiple of v's 2 heads, got 5"),
        ("k", lambda x: x[..., 1:], r"k: expected shape \(2, 5, 2, 7\), got \(2, 5, 2, 6\)"),
        ("v", lambda x: x[:1], "v: expected shape"),
        ("g", lambda x: x[..., 1:], r"g: expected shape \(2, 5, 2, 7\), got \(2, 5, 2, 6\)"),
        ("g", lambda x: x[:, 1:, :, 0], r"g: expected shape \(2, 5, 2\), got \(2, 4, 2\)"),
        ("g", lambda x: x.long(), "g: expected a floating dtype, got torch.int64"),
        ("state", lambda x: x.mT, r"state: expected shape \(2, 2, 7, 5\), got \(2, 2, 5, 7\)"),
        ("starts", lambda x: x.int(), "starts: expected bool, got torch.int32"),
        ("starts", lambda x: x[:, 1:], "starts: expected shape"),
    ],
)
def test_says_what_is_wrong(name, change, message):
    inputs = dict(zip("qkvg", draw(5), strict=True))
    inputs |= dict(state=torch.randn(B, G, K, V), starts=torch.zeros(B, 5, dtype=torch.bool))
    inputs[name] = change(inputs[name])
    unchecked = linear_attention
    while hasattr(unchecked, "__wrapped__"):  # past the check of the annotations that tests add
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        unchecked(**inputs)


def test_backends_say_what_they_cannot():
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected float32"):
        linear_attention(*draw(4, dtype=torch.float64))


def mixer(**options):
    sizes = dict(num_heads=4, num_kv_heads=2, key_width=6, value_width=5)
    return build("mixers", {"kind": "linear_attention", **(sizes | options)}, 16)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=3), "num_heads: expected a multiple of num_kv_heads=2, got 3"),
        (dict(key_width=0), "key_width: expected .*1 or more, got 0"),
        (dict(feature="tanh"), "feature: expected one of .*'relu'.* got tanh"),
        (dict(decay="fast"), "decay: expected one of .*'head'.* got fast"),
        (dict(decay="key", feature="relu"), "feature: expected sigmoid, .* got relu"),
        (dict(decay_scale=-1.0), "decay_scale: expected more than 0, .* got -1.0"),
        (dict(rotary_width=3), "rotary_width: expected an even number from 0 to key_width=6, got 3"),
        (dict(conv_width=-1), r"conv_width: expected 0 \(none\) or more, got -1"),
        (dict(normalise=True), "normalise: expected False, or features .* got feature=identity"),
        (dict(normalise=True, feature="relu", rotary_width=2), "normalise: .* got feature=relu, rotary_width=2"),
    ],
)
def test_mixer_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        mixer(**options)


@pytest.mark.parametrize("feature", ["sigmoid", "elu", "softmax"])
def test_normalised_is_a_mean_of_values(feature):
    """Weights that sum to 1: values that are all alike come out as they are."""
    part, x = mixer(feature=feature, normalise=True, output_norm=False), torch.randn(2, 9, 16)
    torch.nn.init.zeros_(part.v_proj.weight)
    part.v_proj.bias = torch.nn.Parameter(torch.arange(10.0))
    same = torch.arange(10.0).view(2, 5).repeat_interleave(2, dim=0).flatten()
    assert_close(part(x)[0], part.out_proj(same).expand(2, 9, -1), atol=1e-5, rtol=1e-5)


def test_decays_are_what_is_written():
    """Of a memory left alone by zero values, from one token to the next."""
    x = torch.randn(1, 1, 16)

    def faded(**options):
        part = mixer(bias=True, **options)
        torch.nn.init.zeros_(part.v_proj.weight), torch.nn.init.zeros_(part.v_proj.bias)
        state = part.init_state(1, device=x.device, dtype=x.dtype)
        with torch.no_grad():
            return part, part(x, state=state._replace(memory=torch.ones(1, 2, 6, 5)))[1].memory[0, :, :, 0]

    assert_close(faded()[1], torch.ones(2, 6))
    gamma = torch.tensor([1 - 2**-5, 1 - 2**-6])
    assert_close(faded(decay="fixed")[1], gamma[:, None].expand(2, 6))
    part, seen = faded(decay="head", decay_scale=3.0)
    assert_close(seen, part.decay_proj(x)[0, 0].sigmoid().pow(1 / 3)[:, None].expand(2, 6))
    part, seen = faded(decay="channel")
    assert_close(seen, part.decay_up(part.decay_down(x))[0, 0].sigmoid().pow(1 / 16).view(2, 6))
    part, seen = faded(decay="key", feature="sigmoid")
    assert_close(seen, 1 - part.k_proj(x)[0, 0].sigmoid().view(2, 6))
