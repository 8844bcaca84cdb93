"""The laws of spikes: counts, products with int8 weights, trains, statistics, models whose projections spike."""

import json
import math
import subprocess
import sys
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.testing import assert_close

from seqzoo.kernels import native
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.expert_mlp import expert_mlp
from seqzoo.kernels.native.rows import RowOp
from seqzoo.kernels.spike import composed as composed_module
from seqzoo.kernels.spike import cpp, spike, spike_counts, spike_linear
from seqzoo.kernels.spike.op import BACKENDS, LINEAR_BACKENDS
from seqzoo.kernels.spike.reference import dequantised
from seqzoo.layers.linear import Linear
from seqzoo.layers.registry import build
from seqzoo.layers.spike import CODES, AdaptiveSpike, FiringStatistics, bits_set, decode, encode
from seqzoo.layers.spike_linear import SpikingLinear
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.spiking import spike_report, table
from seqzoo.train import model_config

NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
CONFIGS = Path(__file__).parents[1] / "configs"
BACKEND = [pytest.param("torch"), pytest.param("cpp", marks=NEEDS_COMPILER)]
HALF = torch.bfloat16


def config(name="spiking_nano", *overrides):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return model_config(compose("train", [f"model={name}", *overrides]))


def laplace(*shape):
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


# Counts


def test_the_definition_is_the_formula():
    x = torch.tensor([[3.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    counts, threshold = spike_counts(x, k=2.0)
    assert threshold.flatten().tolist() == [4.5 / 4 / 2, 1e-5]
    assert counts.tolist() == [[5.0, -2.0, 1.0, 0.0], [0.0] * 4]  # 5.33, -1.78, 0.89
    assert_close(spike(x, k=2.0), threshold * counts, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 37), (2, 130), (70, 200), (0, 4), (3, 20000)], ids=str)
def test_is_the_definition(shape, backend, dtype):
    """To the bit; rows of tiny and huge values too, whose threshold is clamped."""
    x = torch.randn(shape).mul(torch.logspace(-7, 7, shape[0] or 1).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    for k in (0.5, 3.0, 50.0):
        assert torch.equal(BACKENDS[backend](x, k, False), BACKENDS["reference"](x, k, False))


@NEEDS_COMPILER
def test_strides():
    x = torch.randn(9, 40)
    for odd in (x[:, 3:20], x.mT, x[::2], x[:1].expand(4, -1)):
        assert torch.equal(BACKENDS["cpp"](odd, 3.0, False), BACKENDS["reference"](odd, 3.0, False))


def test_ties_go_to_even():
    x = torch.tensor([[1.5, 0.5, -2.5, -0.5, 1.0, -6.0]])  # mean 2
    for backend in ("reference", "torch", *(["cpp"] if native.available() else [])):
        assert BACKENDS[backend](x, 2.0, False).tolist() == [[2.0, 0.0, -2.0, 0.0, 1.0, -6.0]]


@pytest.mark.parametrize("backend", ["reference", *BACKEND])
def test_gradient_is_straight_through(backend):
    x, dy = torch.randn(4, 9), torch.randn(4, 9)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(BACKENDS[backend](leaf, 3.0, False), leaf, dy)
    assert_close(grad, dy)


def test_gradient_through_the_threshold():
    """dx_i = dx^_i + sign(x_i) / (k n) sum_j (s_j - x_j / V) dx^_j; where V is clamped, the first alone."""
    x, k = torch.randn(5, 7, dtype=torch.float64), 3.0
    x[2] *= 1e-9
    x[3] *= 1e9
    dy = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(spike(leaf, k=k, through_threshold=True), leaf, dy)
    counts, threshold = spike_counts(x, k=k)
    moved = x.sign() / (k * 7) * ((counts - x / threshold) * dy).sum(-1, keepdim=True)
    moved[2:4] = 0
    assert_close(grad, dy + moved)
    leaf = x.float().requires_grad_()  # for which there is a C++, which does not know it
    (grad,) = torch.autograd.grad(spike(leaf, k=k, through_threshold=True), leaf, dy.float())
    assert_close(grad.double()[:2], (dy + moved)[:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *BACKEND])
def test_what_is_no_number(backend):
    """A NaN makes its row NaN, an infinity makes it not finite; other rows do not hear of it."""
    x = torch.randn(3, 8)
    x[0, 2], x[2, 5] = math.nan, math.inf
    with use_backend(backend):
        y = spike(x)
        weight, scales = torch.randint(1, 9, (4, 8), dtype=torch.int8), torch.ones(4, 1)
        z = spike_linear(x, weight, scales)
        assert_close(z[1:2], spike_linear(x[1:2], weight, scales))
    assert y[0].isnan().all() and y[1].isfinite().all() and not y[2].isfinite().all()
    assert z[0].isnan().all() and not z[2].isfinite().any()


def test_an_error_is_at_most_half_a_threshold():
    x = laplace(50, 300)
    _, threshold = spike_counts(x)
    assert ((spike(x) - x).abs() <= threshold * (0.5 + 1e-5)).all()


def wrong_calls():
    x, w, s = torch.randn(2, 8), torch.zeros(5, 8, dtype=torch.int8), torch.ones(5, 2)
    for k in (0.0, -1.0, math.nan, math.inf):
        yield f"spike_counts: k: expected a positive number, got {k}", lambda k=k: unwrap(spike_counts)(x, k=k)
        yield f"spike_linear: k: expected a positive number, got {k}", lambda k=k: unwrap(spike_linear)(x, w, s, k=k)
    yield "spike: x: expected rows of one channel", lambda: unwrap(spike)(x[:, :0])
    for whole in (
        torch.ones(2, 8, dtype=torch.int64),
        torch.ones(2, 8, dtype=torch.bool),
    ):  # would be cut down to whole
        yield f"spike: x: expected a floating dtype, got {whole.dtype}", lambda whole=whole: unwrap(spike)(whole)
    far = [t.to("meta") for t in (w, s)]
    yield (
        "spike_linear: weight: expected to be on cpu as x, got meta",
        lambda: unwrap(spike_linear)(x, far[0], s, group=4),
    )
    yield (
        "spike_linear: scales: expected to be on cpu as x, got meta",
        lambda: unwrap(spike_linear)(x, w, far[1], group=4),
    )
    yield "spike_linear: scales: expected a floating dtype", lambda: unwrap(spike_linear)(x, w, s.long(), group=4)
    call = unwrap(spike_linear)
    yield r"group: expected 1 to 16384 channels, got 0", lambda: call(x, w, s, group=0)
    yield r"weight: expected int8 \[out, 8\], got torch.float32", lambda: call(x, w.float(), s, group=4)
    yield r"weight: expected int8 \[out, 8\], got torch.int8 \(5, 7\)", lambda: call(x, w[:, 1:], s, group=4)
    yield r"scales: expected shape \(5, 3\), got \(5, 2\)", lambda: call(x, w, s, group=3)
    yield r"scales: expected frozen ones", lambda: call(x, w, s.clone().requires_grad_(), group=4)
    yield r"bias: expected shape \(5,\), got \(4,\)", lambda: call(x, w, s, torch.zeros(4), group=4)


@pytest.mark.parametrize("message, call", [*wrong_calls()], ids=lambda x: x if isinstance(x, str) else "")
def test_errors_name_the_argument(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_backends_say_what_they_cannot():
    x = torch.randn(2, 8)
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected float32 or bfloat16"):
        spike(x.double())
    with use_backend("cpp"), pytest.raises(ValueError, match="expected through_threshold=False"):
        spike(x.requires_grad_(), through_threshold=True)


# Products


SHAPES = [  # rows, in, out, group
    ((1,), 37, 5, 128),
    ((), 128, 9, 128),
    ((3, 1), 300, 17, 128),
    ((4,), 300, 7, 64),
    ((9,), 77, 3, 1),
    ((2, 5), 200, 6, 200),
    ((30,), 513, 33, 100),
    ((0, 3), 40, 5, 16),
    ((1, 1), 520, 1100, 128),  # enough for several threads
]


def draw(rows, width, out, group, dtype=torch.float32):
    """x, weight, scales, bias: all of int8, and in every row counts of tens and hundreds and, in one, thousands."""
    x, bias = torch.randn(*rows, width), torch.randn(out)
    x[..., ::23] *= 30
    if x.numel() > 300 * 30:
        x.view(-1, width)[-1, 5] = 3000.0
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8)
    scales = torch.rand(out, -(-width // group)) * 0.01 + 1e-3
    return x.to(dtype), weight, scales, bias


def assert_near(ours, truth, tolerance):
    assert ours.shape == truth.shape
    error = (ours.double() - truth.double()).abs()
    assert not error.numel() or error.max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_the_definition(shape, backend, dtype, with_bias, monkeypatch):
    """That is, with weights and activations rounded to what whole numbers stand for, in float."""
    monkeypatch.setattr(composed_module, "ROOM", 1000)  # several pieces
    (x, weight, scales, bias), group = draw(*shape, dtype=dtype), shape[-1]
    bias = bias if with_bias else None
    counts, threshold = spike_counts(x)
    truth = (threshold * counts).double() @ dequantised(weight, scales.double(), group).mT
    truth = truth if bias is None else truth + bias
    for name in ("reference", backend):
        ours = LINEAR_BACKENDS[name](x, weight, scales, bias, 3.0, group)
        assert ours.dtype == dtype
        assert_near(ours, truth, 1e-2 if dtype == HALF else 2e-6)


@NEEDS_COMPILER
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_whole_numbers_stay_whole(rows):
    """With a scale of one everywhere, sums over V are the very integers, counts in thousands or not."""
    x, weight, scales, _ = draw((rows,), 700, 40, 128)
    x[0, 3] = 4000.0
    counts, threshold = spike_counts(x)
    truth = counts.long() @ weight.long().mT
    assert counts.abs().max() > 1000
    y = LINEAR_BACKENDS["cpp"](x, weight, torch.ones_like(scales), None, 3.0, 128)
    assert torch.equal((y.double() / threshold).round().long(), truth)


PLAIN = '#ifdef __AVX512VNNI__\n#undef __AVX512VNNI__\n#endif\n#include "{}"\n'


@NEEDS_COMPILER
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_vnni(shape, tmp_path_factory, monkeypatch):
    """What processors without these instructions run."""
    source = cpp.PRODUCT.source
    plain = tmp_path_factory.getbasetemp() / "plain.cpp"
    plain.write_text(PLAIN.format(source))
    x, weight, scales, bias = draw(*shape)
    fast = LINEAR_BACKENDS["cpp"](x, weight, scales, bias, 3.0, shape[-1])
    monkeypatch.setattr(cpp, "PRODUCT", RowOp("spike_linear", plain, cpp.PRODUCT.call.format))
    slow = LINEAR_BACKENDS["cpp"](x, weight, scales, bias, 3.0, shape[-1])
    assert_near(fast, slow, 2e-6)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_bits_depend_on_no_neighbour_and_no_thread(dtype):
    x, weight, scales, bias = draw((11,), 300, 1001, 128, dtype)
    run = lambda x: LINEAR_BACKENDS["cpp"](x, weight, scales, bias, 3.0, 128)
    threads, whole = torch.get_num_threads(), run(x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(x), whole)
    finally:
        torch.set_num_threads(threads)
    for n in (1, 2, 4, 6):
        assert torch.equal(run(x[n:]), whole[n:])


@NEEDS_COMPILER
def test_strides_of_a_product():
    x, weight, scales, bias = draw((6,), 40, 10, 16)
    plain = LINEAR_BACKENDS["cpp"](x, weight, scales, bias, 3.0, 16)
    turned = [t.mT.contiguous().mT for t in (x, weight, scales)]
    assert torch.equal(LINEAR_BACKENDS["cpp"](*turned, bias.expand(2, 10).mT[:, 0], 3.0, 16), plain)


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("learning", [(True, True), (True, False), (False, True)])
def test_gradients_of_a_product(backend, learning):
    """Straight through to x, as of the fake-quantised form; of the bias; none of what is frozen."""
    x, weight, scales, bias = draw((3, 4), 50, 12, 16)
    dy = torch.randn(3, 4, 12)

    def grads(fn, dtype):
        leaves = [t.to(dtype).requires_grad_(wants) for t, wants in zip((x, bias), learning, strict=True)]
        y = fn(leaves[0], weight, scales.to(dtype), leaves[1], 3.0, 16)
        wanted = [leaf for leaf, wants in zip(leaves, learning, strict=True) if wants]
        return torch.autograd.grad(y, wanted, dy.to(dtype))

    truth = grads(LINEAR_BACKENDS["reference"], torch.float64)
    for a, b in zip(grads(LINEAR_BACKENDS[backend], torch.float32), truth, strict=True):
        assert_near(a, b, 2e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKEND])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_gradients_of_any_shape(shape, backend):
    x, weight, scales, bias = draw(shape or (1,), 20, 6, 16)
    x, bias = x.view(*shape, 20).requires_grad_(), bias.requires_grad_()
    y = LINEAR_BACKENDS[backend](x, weight, scales, bias, 3.0, 16)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert_close(dbias, torch.full((6,), float(math.prod(shape))))
    assert_close(dx, dequantised(weight, scales, 16).sum(0).expand(*shape, 20))
    assert LINEAR_BACKENDS[backend](x, weight[:0], scales[:0], None, 3.0, 16).shape == (*shape, 0)


@pytest.mark.parametrize("low", [torch.float16, torch.float64, HALF], ids=str)
def test_scales_and_bias_of_another_dtype(low):
    """No backend is chosen that would refuse them."""
    x, weight, scales, bias = draw((3,), 20, 6, 16)
    for a, b in ((scales.to(low), bias), (scales, bias.to(low)), (scales.to(low), bias.to(low))):
        bias_leaf = b.clone().requires_grad_()
        y = spike_linear(x, weight, a, bias_leaf, group=16)
        assert_near(y, LINEAR_BACKENDS["reference"](x, weight, a.float(), b.float(), 3.0, 16), 2e-6)
        assert torch.autograd.grad(y.sum(), bias_leaf)[0].dtype == b.dtype


@pytest.mark.parametrize("backend", ["reference", *BACKEND])
def test_autocast_takes_nothing_from_the_counts(backend):
    x, weight, scales, bias = draw((6,), 300, 12, 128)
    with use_backend(backend):
        plain = spike_linear(x, weight, scales, bias)
        with torch.autocast("cpu", HALF):
            low = spike_linear(x, weight, scales, bias)
    assert low.dtype == HALF
    assert torch.equal(low, plain.to(HALF))


# Trains


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("most", [0, 1, 7, 8, 300])
def test_trains_are_lossless(code, most):
    low = 0 if code in ("binary", "unsigned") else -most
    counts = torch.randint(low, most + 1, (5, 7))
    counts[0, 0], counts[0, 1] = most, low
    trains = encode(counts, code)
    bits = math.ceil(math.log2(most + 1))
    steps = dict(binary=most, ternary=most, bitwise=bits, unsigned=bits, twos_complement=bits + 1)
    assert trains.dtype == torch.int8 and trains.shape == (steps[code], 5, 7)
    assert not trains.numel() or trains.min() >= (-1 if code in ("ternary", "bitwise") else 0) and trains.max() <= 1
    for given in (counts, counts.float(), counts.to(torch.int32)):
        assert torch.equal(decode(encode(given, code), code), counts)
    assert torch.equal(decode(encode(counts, code, steps=steps[code] + 3), code), counts)
    with pytest.raises(ValueError, match=f"steps: expected at least {steps[code]}"):
        encode(counts, code, steps=steps[code] - 1)


@pytest.mark.parametrize("code", CODES)
def test_trains_of_any_shape_and_dtype(code):
    for shape in ((), (0,), (3, 0, 2), (1, 2, 3, 4)):
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.float16, HALF, torch.float64):
            low = 0 if code in ("binary", "unsigned") or dtype == torch.uint8 else -100
            counts = torch.randint(low, 101, shape).to(dtype)
            assert torch.equal(decode(encode(counts, code), code), counts.long())
            assert torch.equal(decode(encode(counts, code).to(dtype if low else torch.float32), code), counts.long())
    counts = torch.randint(0, 9, (4, 6)).mT[::2]
    assert torch.equal(decode(encode(counts, code), code), counts)
    if code not in ("binary", "unsigned"):
        assert decode(encode(torch.tensor([-128], dtype=torch.int8), code), code).item() == -128


def test_large_counts_and_long_trains():
    counts = torch.tensor([2**31 - 1, -(2**31) + 1, 2**30, -5, 0])
    for code in ("bitwise", "twos_complement"):
        assert torch.equal(decode(encode(counts, code, steps=60), code), counts)
    assert torch.equal(decode(encode(counts.abs(), "unsigned"), "unsigned"), counts.abs())


def test_products_of_trains_are_the_product():
    """y = V sum_t 2^(t-1) W s_t, and for the counting codes V sum_t W s_t."""
    x, weight = torch.randn(6, 20), torch.randn(4, 20, dtype=torch.float64)
    counts, threshold = spike_counts(x)
    truth = (threshold * counts).double() @ weight.mT
    for code, weigh in (("bitwise", lambda t: 2.0**t), ("ternary", lambda t: 1.0)):
        steps = (weigh(t) * (s.double() @ weight.mT) for t, s in enumerate(encode(counts, code)))
        assert_close(threshold * sum(steps), truth, atol=1e-6, rtol=1e-6)


def test_trains_name_what_is_wrong():
    s = torch.tensor([3, -2])
    for code in ("binary", "unsigned"):
        with pytest.raises(ValueError, match=f"counts: expected none below 0 in {code} code.* got -2"):
            encode(s, code)
    for bad in (torch.tensor([0.5]), torch.tensor([math.nan]), torch.tensor([math.inf]), torch.tensor([1e10])):
        with pytest.raises(ValueError, match="counts: expected whole numbers"):
            encode(bad, "ternary")
    for bad in (2**31, -(2**31), 2**63 - 1, -(2**63)):  # the last has no absolute value in int64
        with pytest.raises(ValueError, match=f"counts: expected at most 2147483647, got {abs(bad)}"):
            encode(torch.tensor([bad]), "bitwise")
    with pytest.raises(ValueError, match="counts: expected real numbers, got torch.complex64"):
        encode(torch.tensor([1j]), "ternary")
    for bad in (torch.tensor([[0.5, 1.0]]), torch.tensor([[math.nan]])):
        with pytest.raises(ValueError, match="trains: expected whole numbers of spikes"):
            decode(bad, "binary")
    with pytest.raises(ValueError, match=r"trains: expected \[steps, ...\], got a single number"):
        decode(torch.tensor(1), "bitwise")
    with pytest.raises(ValueError, match="code: expected one of binary, .* got 'morse'"):
        encode(s, "morse")
    with pytest.raises(ValueError, match="code: expected one of"):
        decode(s, "morse")
    with pytest.raises(ValueError, match="trains: expected spikes of 0 to 1 in unsigned code, got -1 to 0"):
        decode(torch.tensor([[-1, 0]]), "unsigned")
    with pytest.raises(ValueError, match="trains: expected at most 63 steps"):
        decode(torch.zeros(64, 2), "bitwise")


# Statistics


@pytest.mark.parametrize(
    "sample, silent, spikes, within, sparsity, error",
    [(torch.randn, 0.106, 1.30, 0.954, 0.572, 0.077), (laplace, 0.154, 1.22, 0.918, 0.615, 0.068)],
    ids=["gaussian", "laplace"],
)
def test_firing_is_the_reports(sample, silent, spikes, within, sparsity, error):
    """At k = 3, checks of arXiv 2509.05276's numbers: rows so long that their threshold is the distribution's."""
    x = sample(40, 50_000)
    heard = FiringStatistics()
    for part in x.split(13):
        heard.add(spike_counts(part)[0])
    said = heard.summary()
    expected = dict(silent=silent, spikes=spikes, within=within, sparsity=sparsity)
    assert {name: said[name] for name in expected} == pytest.approx(expected, abs=3e-3, rel=3e-3)
    assert said["channels"] == x.numel()
    assert (spike(x) - x).norm() / x.norm() == pytest.approx(error, abs=1e-3)


def test_statistics_are_those_of_the_trains():
    counts = torch.randint(-20, 21, (30, 40))
    heard = FiringStatistics(window=4)
    heard.add(counts)
    said, few = heard.summary(), counts[counts.abs() <= 15]
    assert said["silent"] == pytest.approx((counts == 0).float().mean().item())
    assert said["spikes"] == pytest.approx(encode(counts, "bitwise").abs().sum().item() / counts.numel())
    assert said["ternary_spikes"] == pytest.approx(encode(counts, "ternary").abs().sum().item() / counts.numel())
    assert said["within"] == pytest.approx(few.numel() / counts.numel())
    assert said["sparsity"] == pytest.approx((encode(few, "bitwise", steps=4) == 0).float().mean().item())
    assert said["largest"] == 20
    heard.add(counts[:0])
    assert heard.summary() == said
    heard.add(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="expected counts of at most .* got nan"):
        heard.summary()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int64, torch.float16, torch.float64, torch.bool], ids=str
)
def test_statistics_of_any_dtype(dtype):
    """-128 too, whose size int8 does not hold."""
    counts = torch.tensor([1, 0, 1]).to(dtype) if dtype == torch.bool else torch.tensor([-128, 0, 3]).to(dtype)
    heard, same = FiringStatistics(), FiringStatistics()
    heard.add(counts)
    same.add(counts.float())
    assert heard.summary() == same.summary()


def test_statistics_name_what_is_wrong():
    with pytest.raises(ValueError, match="expected counts of at most .* got None"):
        FiringStatistics().summary()
    for most, fits in ((2**31 - 1, True), (2**31, False), (2**40, False)):  # bits are counted up to there
        heard = FiringStatistics()
        heard.add(torch.tensor([float(most)], dtype=torch.float64))
        if fits:
            assert heard.summary()["spikes"] == 31
            continue
        with pytest.raises(ValueError, match="expected counts of at most 2147483647, got"):
            heard.summary()
    for window in (0, -1, 2.5, True, 32):
        with pytest.raises(ValueError, match=f"window: expected 1 to 31 steps, got {window}"):
            FiringStatistics(window)


def test_bits_set():
    x = torch.cat([torch.arange(70), torch.tensor([2**31 - 1, 2**30, 0x55555555, 2**31 - 2])])
    assert bits_set(x).tolist() == [bin(n).count("1") for n in x.tolist()]


# Layers


def test_a_spiking_layer_is_a_linear_one_on_spikes():
    torch.manual_seed(3)
    linear, x = Linear(20, 7), torch.randn(2, 5, 20)
    ours = SpikingLinear(linear, AdaptiveSpike(4.0))
    assert list(ours.state_dict()) == list(linear.state_dict()) and ours.weight is linear.weight
    assert_close(ours(x), linear(spike(x, k=4.0)))
    assert_close(ours(x), torch.cat([ours(x[:, t : t + 1]) for t in range(5)], 1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_experts_spike_before_both_matrices(backend):
    D, E, k, I = 12, 4, 2, 6
    part = build("channels", dict(kind="moe", num_experts=E, num_experts_per_token=k, expert_width=I), D).double()
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.3)
    part.input_spikes, part.hidden_spikes = AdaptiveSpike(3.0), AdaptiveSpike(5.0)
    x = torch.randn(9, D, dtype=torch.float64)
    chosen, weight, _ = part._route(x)
    truth = torch.zeros_like(x)
    for n in range(9):
        for e, w in zip(chosen[n], weight[n], strict=True):
            gate, up = (part.gate_up_proj[e] @ spike(x[n])).chunk(2)
            truth[n] += w * (part.down_proj[e] @ spike(torch.nn.functional.silu(gate) * up, k=5.0))
    with use_backend(backend):
        y = part._experts(x, chosen, weight)
        assert_close(y, truth)
        (grad,) = torch.autograd.grad(y.sum(), part.down_proj)
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(part._experts(x, chosen, weight).sum(), part.down_proj)
    assert_close(grad, expected)


def test_the_experts_cpp_refuses_spikes():
    x, chosen, weight = torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected no `hidden`"):
        expert_mlp(x, chosen, weight, torch.randn(2, 6, 4), torch.randn(2, 4, 3), hidden=AdaptiveSpike())


# Models


def model(*overrides):
    torch.manual_seed(0)
    return SeqZooForCausalLM(config("spiking_nano", *overrides)).eval()


def ids(*shape):
    return torch.randint(0, 264, shape)


def spiking(ours):
    return [name for name, module in ours.named_modules() if isinstance(module, AdaptiveSpike)]


def test_every_projection_spikes_but_the_head():
    ours = model()
    linear = [name for name, module in ours.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 17 and "lm_head" in linear
    experts = [f"stack.blocks.0.channel.{place}_spikes" for place in ("input", "hidden")]
    assert set(spiking(ours)) == {f"{name}.spike" for name in linear if name != "lm_head"} | set(experts)


def test_skip_and_head():
    some = "model.spikes.skip=[down_proj,'^stack.blocks.1.mixer']"
    names = spiking(model(some, "model.spikes.head=true"))
    assert "lm_head.spike" in names and "stack.blocks.0.channel.input_spikes" in names
    assert not any("down_proj" in name or "hidden" in name or "blocks.1.mixer" in name for name in names)


def test_parameters_are_the_plain_models():
    """Spikes can be put into a trained model, and taken out of it."""
    plain = SeqZooForCausalLM(SeqZooConfig(**plain_keys(spikes=None)))
    ours = SeqZooForCausalLM(SeqZooConfig(**plain_keys(spikes=dict(k=1e4))))
    assert list(plain.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    x = ids(2, 9)
    assert_close(ours.eval()(x).logits, plain.eval()(x).logits, atol=1e-3, rtol=1e-3)  # thresholds next to nothing


def plain_keys(**changes):
    keys = ("hidden_size", "vocab_size", "num_hidden_layers", "pattern", "mixers", "channels")
    full = config().to_dict()
    return {key: full[key] for key in keys} | changes


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(kk=3), r"spikes: expected keys of \['k', .*\], got \['kk'\]"),
        (dict(k=0), "spikes: k: expected a positive number, got 0"),
        (dict(k="3"), "spikes: k: expected a positive number, got '3'"),
        (dict(head=1), "spikes: head: expected true or false, got 1"),
        (dict(skip="down"), "spikes: skip: expected a list of regular expressions, got 'down'"),
        (dict(skip=None), "spikes: skip: expected a list of regular expressions, got None"),
        (dict(skip=["("]), r"spikes: skip: expected a regular expression, got '\('"),
        ([3.0], r"spikes: expected a mapping or null, got \[3.0\]"),
    ],
    ids=str,
)
def test_bad_configs(given, message):
    with pytest.raises(ValueError, match=message):
        SeqZooConfig(**plain_keys(spikes=given))


def test_what_would_be_left_out_in_silence_is_refused():
    with pytest.raises(ValueError, match=r"spikes: skip: expected a pattern that is found .* got 'dwon_proj'"):
        SeqZooForCausalLM(SeqZooConfig(**plain_keys(spikes=dict(skip=["dwon_proj"]))))
    channel = build("channels", config().channels["moe"], 64)
    ours = model()
    channel.own = torch.nn.Parameter(torch.zeros(3, 4))
    ours.stack.blocks[0].channel = channel
    from seqzoo.models.spiking import add_spikes

    with pytest.raises(ValueError, match="spikes: stack.blocks.0.channel.own: expected a linear layer"):
        add_spikes(ours, ours.config.spikes)


def test_autocast_and_checkpointing():
    ours = model().train()
    x, grads = ids(2, 17), []
    for _ in range(2):
        ours.zero_grad()
        with torch.autocast("cpu", HALF):
            ours(x, labels=x).loss.backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
        getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()  # its name from 5.23 on
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_report():
    ours, x = model(), ids(2, 30)
    truth = ours(x).logits
    rows = spike_report(ours, x)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["name"] for row in rows] == [name.removesuffix(".spike") for name in spiking(ours)]
    first = rows[0]
    assert first["name"] == "stack.blocks.0.mixer.qkv_proj" and first["channels"] == 2 * 30 * 64
    block = ours.stack.blocks[0]
    heard = FiringStatistics()
    heard.add(spike_counts(block.mixer_norm(ours.embed_tokens(x)))[0])
    assert {**heard.summary(), "name": first["name"]} == pytest.approx(first)
    hidden = next(row for row in rows if row["name"].endswith("hidden_spikes"))
    assert hidden["channels"] == 2 * 30 * 2 * 32  # slots of tokens
    lines = table(rows).splitlines()
    assert len(lines) == 1 + len(rows) and len({len(line) for line in lines}) == 1
    assert not any(module._forward_pre_hooks for module in ours.modules())
    assert torch.equal(ours(x).logits, truth)
    assert spike_report(ours, dict(input_ids=x, attention_mask=torch.ones_like(x)), window=2)[0]["sparsity"] < 1
    assert spike_report(ours, dict(inputs_embeds=ours.embed_tokens(x))) == rows
    packed = torch.arange(15).repeat(2, 2)
    parts = spike_report(ours, x.view(4, 15))
    assert [row["spikes"] for row in spike_report(ours, dict(input_ids=x, position_ids=packed))] == pytest.approx(
        [row["spikes"] for row in parts], rel=1e-3
    )
    assert [row["spikes"] for row in rows] != pytest.approx([row["spikes"] for row in parts], rel=1e-3)


def test_report_refuses():
    ours, x = model(), ids(1, 4)
    with pytest.raises(ValueError, match="expected no padding"):
        spike_report(ours, dict(input_ids=x, attention_mask=torch.tensor([[0, 1, 1, 1]])))
    with pytest.raises(ValueError, match="expected a model with spikes"):
        spike_report(SeqZooForCausalLM(SeqZooConfig(**plain_keys())), x)
    ours.stack.blocks[0].mixer_norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="expected counts of at most .* got nan"):
        spike_report(ours, x)
    with pytest.raises(ValueError, match="window: expected 1 to 31 steps, got 0"):
        spike_report(ours, x, window=0)
    assert not any(module._forward_pre_hooks for module in ours.modules())


TRACED = """
import torch
from seqzoo.kernels.expert_mlp import expert_mlp
from seqzoo.kernels.spike import spike, spike_linear
from seqzoo.layers.spike import AdaptiveSpike
from seqzoo.layers.linear import Linear
from seqzoo.layers.spike_linear import SpikingLinear, W8ASpike

torch.manual_seed(0)
linear, x = Linear(26, 14), torch.randn(3, 26)
whole = W8ASpike(26, 14, group=8)
whole.fill(linear)
for layer in (SpikingLinear(linear, AdaptiveSpike()), SpikingLinear(linear, AdaptiveSpike(3.0, True)), whole):
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = compiled(leaf), layer(leaf)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a.sum(), leaf), torch.autograd.grad(b.sum(), leaf))
with torch.no_grad():
    torch.testing.assert_close(compiled(x), layer(x))

chosen, weight = torch.randint(0, 4, (9, 2)), torch.rand(9, 2)  # spikes between the experts' matrices
x, up, down = (torch.randn(s).requires_grad_() for s in ((9, 16), (4, 32, 16), (4, 16, 16)))
run = lambda *inputs: expert_mlp(inputs[0], chosen, weight, *inputs[1:], AdaptiveSpike()).sum()
grads = [torch.autograd.grad(f(x, up, down), (x, up, down)) for f in (torch.compile(run, backend="aot_eager"), run)]
torch.testing.assert_close(*grads)
"""


BUILT = """
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.spike import spike_linear

torch.manual_seed(0)
weight, scales = torch.randint(-128, 128, (14, 130), dtype=torch.int8), torch.rand(14, 3)
run = lambda x, bias: spike_linear(x, weight, scales, bias, group=64)
for backend in ("reference", "torch", "cpp"):
    x, bias = torch.randn(3, 130, requires_grad=True), torch.randn(14, requires_grad=True)
    with use_backend(backend):
        a, b = torch.compile(run, fullgraph=True)(x, bias), run(x, bias)
        torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(y.square().sum(), (x, bias)) for y in (a, b)]
    torch.testing.assert_close(*grads, atol=1e-2, rtol=1e-4)
"""


@pytest.mark.parametrize("script", [TRACED, pytest.param(BUILT, marks=NEEDS_COMPILER)], ids=["traced", "built"])
def test_compiles(script):
    """A layer is one graph, and what is built of it right; without the tests' type checks, which cannot be traced."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
