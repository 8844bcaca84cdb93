"""The laws of linear: every backend is the definition, for few rows and many; the layer is torch's but for speed."""

from inspect import unwrap

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import traced
from torch import nn
from torch.testing import assert_close

from seqzoo.kernels import native
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.linear import cpp, linear
from seqzoo.kernels.linear.op import BACKENDS
from seqzoo.layers.linear import Linear

NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
BACKEND = [pytest.param("torch"), pytest.param("cpp", marks=NEEDS_COMPILER)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of the largest value
FEW, HALF = cpp.FEW[torch.float32], torch.bfloat16
SHAPES = [  # rows, in, out
    ((1, 1), 256, 512),
    ((1,), 1, 1),
    ((), 17, 9),
    ((2,), 33, 8),
    ((3, 1), 16, 5),
    ((2, 2), 100, 37),
    ((5,), 7, 12),
    ((1, 2, 3), 31, 21),
    ((7,), 65, 66),
    ((FEW,), 130, 70),
    ((FEW + 1,), 20, 30),
    ((40, 3), 19, 23),
    ((0, 4), 6, 5),
    ((1, 1), 520, 300),  # enough for several threads
    ((4,), 300, 431),
]


def draw(rows, width, out, dtype=torch.float32):
    tensors = torch.randn(*rows, width), torch.randn(out, width) * width**-0.5, torch.randn(out)
    return [t.to(dtype) for t in tensors]


def assert_near(ours, truth, tolerance):
    assert ours.shape == truth.shape
    error = (ours.double() - truth.double()).abs()
    assert not error.numel() or error.max() <= tolerance * truth.abs().max()


def spread(x):
    """The same values in wider rows, with NaN around them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_definition(shape, backend, dtype, with_bias):
    x, weight, bias = draw(*shape, dtype)
    bias = bias if with_bias else None
    ours = BACKENDS[backend](x, weight, bias)
    truth = BACKENDS["reference"](x.double(), weight.double(), None if bias is None else bias.double())
    assert ours.dtype == dtype
    assert_near(ours, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("rows", [(1, 1), (6,), (40, 3)], ids=str)
def test_gradients(rows, backend):
    """Of every input, also of those alone that learn while the others do not."""
    tensors = draw(rows, 19, 23)
    dy = torch.randn(*rows, 23)
    for learning in ((0, 1, 2), (0,), (1,), (2,)):

        def grads(fn, dtype, learning=learning):
            leaves = [t.to(dtype).requires_grad_(i in learning) for i, t in enumerate(tensors)]
            return torch.autograd.grad(fn(*leaves), [leaves[i] for i in learning], dy.to(dtype))

        for a, b in zip(
            grads(BACKENDS[backend], torch.float32), grads(BACKENDS["reference"], torch.float64), strict=True
        ):
            assert_near(a, b, 2e-6)
        for t in tensors:
            t.requires_grad_(False)


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 4], ids=str)
def test_strides(rows, dtype):
    """Inputs that stand in wider rows, or turned, are read right, and nothing beside them."""
    x, weight, bias = draw((2, rows), 37, 22, dtype)
    x = x[:1] if rows > 2 else x
    plain = BACKENDS["cpp"](x, weight, bias)
    assert cpp.few(x, weight, bias)
    assert_close(BACKENDS["cpp"](spread(x), weight, spread(bias)), plain, atol=0, rtol=0)
    assert_close(BACKENDS["cpp"](x.mT.contiguous().mT, weight, bias), plain, atol=0, rtol=0)
    one = x[:1, :1].expand(2, 1, -1)
    assert_close(BACKENDS["cpp"](one, weight, bias), BACKENDS["cpp"](one.contiguous(), weight, bias), atol=0, rtol=0)
    for other in (spread(weight), weight.mT.contiguous().mT):
        assert_near(BACKENDS["cpp"](x, other, bias), plain, TOLERANCE[dtype])


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_does_not_depend_on_its_batch(dtype):
    x, weight, bias = draw((cpp.FEW[dtype],), 77, 53, dtype)
    whole = BACKENDS["cpp"](x, weight, bias)
    for n in range(1, len(x)):
        assert_close(BACKENDS["cpp"](x[:n], weight, bias), whole[:n], atol=0, rtol=0)


@NEEDS_COMPILER
@pytest.mark.parametrize("rows", [1, 4])
def test_threads_do_not_change_the_bits(rows):
    x, weight, _ = draw((rows,), 300, 1001)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = BACKENDS["cpp"](x, weight, None)
        torch.set_num_threads(1)
        assert_close(BACKENDS["cpp"](x, weight, None), many, atol=0, rtol=0)
    finally:
        torch.set_num_threads(threads)
    assert_near(many, x.double() @ weight.double().mT, 2e-6)


class Marked(torch.Tensor):
    """A tensor that knows its numbers in its own way."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "its own" if func is F.linear else super().__torch_function__(func, types, args, kwargs or {})


@NEEDS_COMPILER
def test_what_the_cpp_leaves_to_torch():
    x, weight, bias = draw((1, 1), 8, 6)
    learning = weight.clone().requires_grad_()
    assert cpp.few(x, weight, bias) and cpp.few(x, weight, None)
    assert not cpp.few(x, learning, None)
    assert not cpp.few(x, weight, bias.clone().requires_grad_())
    with torch.no_grad():
        assert cpp.few(x, learning, None)
    assert not cpp.few(x.expand(FEW + 1, 1, 8), weight, None)
    assert not cpp.few(x[:0], weight, None)
    assert not cpp.few(x, weight.mT.contiguous().mT, None)
    assert not cpp.few(x, weight.to("meta"), None)
    assert not cpp.few(x.double(), weight.double(), None)
    assert not cpp.few(x.to(HALF), weight, None)
    with torch.autocast("cpu", dtype=HALF):
        assert not cpp.few(x, weight, None)
    assert not cpp.few(x, weight.as_subclass(Marked), None)
    assert unwrap(linear)(x, weight.as_subclass(Marked)) == "its own"


@pytest.mark.parametrize("backend", ["reference", *BACKEND])
@pytest.mark.parametrize("rows", [(1,), (20,)], ids=str)
def test_autocast(backend, rows):
    """All operands take autocast's dtype, whatever theirs is."""
    x, weight, bias = draw(rows, 40, 24)
    with use_backend(backend), torch.autocast("cpu", dtype=HALF), torch.no_grad():
        for given in (x, x.to(HALF)):
            y = linear(given, weight, bias)
            assert y.dtype == HALF
            assert_near(y, F.linear(*(t.to(HALF).double() for t in (x, weight, bias))), 1e-2)


def test_the_layer_is_torchs():
    """Parameters, names, their first values and the result: all but the speed."""
    torch.manual_seed(3)
    ours = Linear(40, 24)
    torch.manual_seed(3)
    theirs = nn.Linear(40, 24)
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
    for name, t in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], t, atol=0, rtol=0)
    assert list(Linear(40, 24, bias=False).state_dict()) == ["weight"]
    with torch.no_grad():
        for rows in (1, 5, 50):
            x = torch.randn(1, rows, 40)
            assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 9, 40, requires_grad=True)
    plain = torch.autograd.grad(theirs(x).square().sum(), (x, *theirs.parameters()))
    again = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False).square().sum()
    for a, b in zip(torch.autograd.grad(again, (x, *ours.parameters())), plain, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_parametrised_layer():
    """What is computed in a parameter's place is used, the weight as well as the bias."""
    layer, x = Linear(12, 7), torch.randn(1, 12)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    nn.utils.parametrizations.weight_norm(layer)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus(), unsafe=True)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
        assert_close(layer(x), F.linear(x, 3 * weight, F.softplus(bias)), atol=1e-6, rtol=1e-5)


@NEEDS_COMPILER
def test_token_by_token_is_the_whole():
    """Decoding goes through the C++, the whole text through torch."""
    layer, x = Linear(130, 70), torch.randn(2, 30, 130)
    with torch.no_grad():
        whole = layer(x)
        assert_near(torch.cat([layer(x[:, t : t + 1]) for t in range(30)], dim=1), whole, 2e-6)


TRACED = """
import torch
from seqzoo.layers.linear import Linear

layer, x = Linear(26, 14), torch.randn(1, 1, 26)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), layer(x))
with torch.no_grad():
    torch.testing.assert_close(compiled(x), layer(x))
"""


def test_compiles():
    """Traced into one graph; in a process without the type checks of tests."""
    traced.passes(TRACED)


def wrong_calls():
    x, w, b = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(5)
    yield "linear: weight: expected shape .out, 8.", lambda call: call(x, w[:, 1:])
    yield "linear: weight: expected shape .out, 8.*got .8,", lambda call: call(x, w[0])
    yield "linear: weight: expected shape a row to", lambda call: call(x[0, 0, 0], w)
    yield "linear: bias: expected shape .5,", lambda call: call(x, w, b[1:])
    yield "linear: weight: expected x's dtype", lambda call: call(x, w.double())
    yield "linear: bias: expected x's dtype", lambda call: call(x, w, b.to(HALF))


@pytest.mark.parametrize("message", [message for message, _ in wrong_calls()])
def test_errors_name_the_argument(message):
    call = dict(wrong_calls())[message]
    with pytest.raises(ValueError, match=message):
        call(unwrap(linear))  # without the tests' type checker, which comes first


def test_a_backend_that_cannot_run_is_refused():
    x, weight, bias = draw((1,), 8, 6, torch.float64)
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected float32 or bfloat16"):
        linear(x, weight, bias)
    with use_backend("triton"), pytest.raises(ValueError, match="expected a backend of this op"):
        linear(x, weight, bias)
