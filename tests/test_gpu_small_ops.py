"""The small fused ops in Triton: each is its definition, the same bits alone or beside others, on any strides."""

import subprocess
import sys
from inspect import unwrap

import pytest
import torch
import torch.utils.checkpoint
from test_small_ops import (
    CASES,
    as_dtype,
    assert_near,
    conv,
    gated,
    inputs,
    inputs_of,
    norm,
    several,
    spread,
    values_and_grads,
)
from torch.testing import assert_close

from seqzoo.kernels import gpu
from seqzoo.kernels.delta_inputs import delta_inputs
from seqzoo.kernels.delta_inputs.op import BACKENDS as DELTA_INPUTS
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gpu.tables import using
from seqzoo.kernels.rms_norm import gated_rms_norm, rms_norm
from seqzoo.kernels.rms_norm.op import BACKENDS as RMS_NORM
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.spike import spike
from seqzoo.kernels.spike.op import BACKENDS as SPIKE

pytestmark = pytest.mark.skipif(not gpu.usable(), reason="no triton")
HALF = torch.bfloat16
HERE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6 if HERE == "cpu" else 1e-5, torch.float16: 2e-3, HALF: 2e-2}  # of the largest value
LONG = ("blocks", "conv strips", "conv documents", "conv documents, no past")  # for the interpreter
HALVES = ("one", "odd", "short")  # cases that are run in 16 bits, too, by the interpreter
SMALL = {  # blocks so small that a few tokens and channels are many
    ("short_conv", "forward"): dict(U=2, S=4, BC=8, num_warps=1, num_stages=1),
    ("short_conv", "backward"): dict(U=2, S=4, BC=8, num_warps=1, num_stages=1),
    ("delta_inputs", "forward"): dict(BR=2, num_warps=1, num_stages=1),
    ("delta_inputs", "backward"): dict(BR=2, num_warps=1, num_stages=1),
    ("rms_norm", "forward"): dict(BR=2, num_warps=1, num_stages=1),
    ("rms_norm", "backward"): dict(BR=2, num_warps=1, num_stages=1),
}


@pytest.fixture(autouse=True)
def where_kernels_run():
    with torch.device(HERE):
        yield


@pytest.fixture
def small_blocks():
    scopes = [using(*kernel, config) for kernel, config in SMALL.items()]
    for scope in scopes:
        scope.__enter__()
    yield
    for scope in scopes:
        scope.__exit__(None, None, None)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, atol=0, rtol=0)


def is_the_definition(backends, tensors, rest, dtype):
    tensors = as_dtype(tensors, dtype)
    truth = values_and_grads(backends["reference"], as_dtype(tensors, torch.float64), rest)
    ours = values_and_grads(backends["triton"], tensors, rest)
    assert_near(ours, truth, TOLERANCE[dtype])
    assert [t.dtype for t in ours] == [t.dtype for t in values_and_grads(backends["reference"], tensors, rest)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [case for case, make in CASES.items() if "triton" in make()[0]])
def test_is_the_definition(case, dtype):
    long = case.endswith(LONG) or dtype != torch.float32 and not case.endswith(HALVES)
    if long and HERE == "cpu":
        pytest.skip("too long for the interpreter")
    is_the_definition(*CASES[case](), dtype)


BLOCKS = {
    "inputs": lambda: inputs(2, 3, 2, 4, 3, 5),
    "inputs, more key heads than in a block": lambda: inputs(1, 3, 3, 3, 5, 2, 2.0),
    "norm": lambda: norm(11, 3),
    "gated": lambda: gated(3, 5, 6),
    "conv": lambda: conv(2, 11, 10, 4, documents=True),
    "conv, no past": lambda: conv(1, 9, 3, 3, past=False),
    "conv, wider than a segment": lambda: conv(1, 6, 3, 7, documents=True),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_many_blocks(case, small_blocks):
    is_the_definition(*BLOCKS[case](), torch.float32)


STRIDES = {
    "inputs": lambda: inputs(2, 3, 2, 4, 3, 5),
    "norm": lambda: norm(2, 5, 3, 6),
    "gated": lambda: gated(2, 5, 3, 6),
    "conv": lambda: conv(2, 5, 6, 4, documents=True),
}


@pytest.mark.parametrize("case", STRIDES)
def test_strides(case):
    """Inputs that stand in wider rows, or have their last dimension apart, give the same.

    The very bits in the interpreter; a compiler, which knows of their alignment, may lay rows out otherwise.
    """
    backends, tensors, rest = STRIDES[case]()
    plain = values_and_grads(backends["triton"], tensors, rest)
    turn = lambda x: x.mT.contiguous().mT if x.ndim > 1 else x
    for reshape in (spread, turn):
        strided = values_and_grads(backends["triton"], tensors, rest, reshape=reshape)
        assert_near(strided, plain, 1e-6 if HERE == "cuda" else 0.0)
    with torch.no_grad():
        without = several(backends["triton"](*tensors, *rest))
    assert not any(y.requires_grad for y in without)
    same(without, plain[: len(without)])


def test_inputs_of_a_token_depend_on_no_other():
    backends, (qkv, ba, *heads), rest = inputs(2, 4, 2, 4, 6, 5)

    def run(qkv, ba):
        leaves = [qkv.clone().requires_grad_(), ba.clone().requires_grad_()]
        outputs = backends["triton"](*leaves, *heads, *rest)
        return *outputs, *torch.autograd.grad(outputs, leaves, [y.detach() for y in outputs])

    whole = run(qkv, ba)
    for at in ((slice(1, 2), slice(None)), (slice(0, 1), slice(2, 3))):
        same(run(qkv[at], ba[at]), [t[at] for t in whole])


def test_values_are_a_view():
    for learns in (False, True):
        _, (qkv, *others), (H, K, scale) = inputs(2, 3, 2, 4, 5, 3)
        v = DELTA_INPUTS["triton"](qkv.requires_grad_(learns), *others, H, K, scale).v
        assert v.data_ptr() == qkv[..., 2 * H * K :].data_ptr() and v.requires_grad == learns


def test_extreme_gates():
    """No overflow where a gate is shut or wide open, and no digits lost where a decay is slow."""
    x = torch.tensor([-1e4, -100.0, -80.0, -30.0, -7.0, 0.0, 30.0, 88.5, 1e4]).expand(2, 3, 9).contiguous()
    truth = torch.nn.functional.silu(x.double())
    y, _ = conv(1, 1, 1, 1)[0]["triton"](x, torch.ones(9, 1), None, None)
    assert_close(y.double(), truth, atol=1e-30, rtol=1e-5)
    *_, g, beta = DELTA_INPUTS["triton"](torch.randn(2, 3, 11), torch.cat([x, x], -1), *torch.zeros(2, 9), 1, 1, 1.0)
    assert_close(g.double(), -torch.nn.functional.softplus(x.double()), atol=1e-30, rtol=1e-5)
    assert_close(beta.double(), x.double().sigmoid(), atol=1e-30, rtol=1e-5)
    a = torch.linspace(-2.0, 2.0, 41)[None, None]
    *_, g, _ = DELTA_INPUTS["triton"](torch.randn(1, 1, 43), torch.cat([a, a], -1), *torch.zeros(2, 41), 1, 1, 1.0)
    assert_close(g.double(), -torch.nn.functional.softplus(a.double()), atol=0, rtol=1e-6)


def test_norm_of_rows_that_repeat():
    """Steps of nothing, within and around."""
    x, gate, weight = torch.randn(3, 1, 5), torch.randn(4, 5).expand(3, 4, 5), torch.randn(5)
    for a in (x.expand(3, 4, 5), gate):
        assert_close(RMS_NORM["triton"](a, weight, 1e-3, 1.0), RMS_NORM["reference"](a, weight, 1e-3, 1.0))


@pytest.mark.parametrize("kind", ["norm", "gated"])
def test_norm_of_a_row_depends_on_no_other(kind):
    backends, tensors, rest = norm(9, 20) if kind == "norm" else gated(9, 20)
    y, dx, *dgate, _ = values_and_grads(backends["triton"], tensors, rest)
    for row in (slice(0, 1), slice(5, 8)):
        leaves = [t[row].clone().requires_grad_() for t in tensors[:-1]]
        alone = backends["triton"](*leaves, tensors[-1], *rest)
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, device="cpu").to(y)[row]
        same([alone, *torch.autograd.grad(alone, leaves, dy)], [y[row], dx[row], *(t[row] for t in dgate)])


@pytest.mark.parametrize("half", [HALF, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["norm", "gated"])
def test_norm_rounds_where_the_definition_does(kind, half):
    """So that what a layer computes in 16 bits is as in torch, within the last bit of the result."""
    backends, tensors, rest = norm(50, 24) if kind == "norm" else gated(50, 24)
    if half == HALF and HERE == "cpu":
        pytest.skip("the interpreter cuts bfloat16 off, it does not round")
    tensors = as_dtype(tensors, half)
    a, b = (backends[name](*tensors, *rest).double() for name in ("triton", "reference"))
    assert ((a - b).abs() <= torch.finfo(half).eps * b.abs()).all() and (a == b).double().mean() > 0.98


SPIKES = [(1,), (3, 5, 37), (2, 130), (0, 4), (3, 5000)]  # the last in blocks


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SPIKES, ids=str)
def test_spikes_are_the_definition(shape, dtype):
    """To the bit; rows of tiny and huge values too, whose threshold is clamped; gradients with the threshold, too."""
    if dtype == HALF and HERE == "cpu":
        pytest.skip("the interpreter cuts bfloat16 off, it does not round")
    exponents = torch.linspace(-6, 7 if dtype == torch.float32 else 3, shape[0] or 1)
    x = (torch.randn(shape) * 10 ** exponents.view(-1, *[1] * (len(shape) - 1))).to(dtype)
    for k in (0.5, 3.0, 50.0):
        assert torch.equal(SPIKE["triton"](x, k, False), SPIKE["reference"](x, k, False))
        for through in (False, True):
            spike_of = lambda backend, k=k, through=through: lambda x: SPIKE[backend](x, k, through)
            ours, theirs = (values_and_grads(spike_of(name), [x], ()) for name in ("triton", "reference"))
            assert_near(ours, theirs, TOLERANCE[dtype])
            assert ours[1].dtype == dtype


def test_spikes_of_what_is_no_number():
    """As the definition: a NaN makes its row NaN, an infinity makes it not finite; other rows do not hear of it."""
    x = torch.randn(3, 8)
    x[0, 2], x[2, 5] = torch.nan, torch.inf
    y = SPIKE["triton"](x, 3.0, False)
    assert y[0].isnan().all() and y[1].isfinite().all() and not y[2].isfinite().all()
    ties = torch.tensor([[1.5, 0.5, -2.5, -0.5, 1.0, -6.0]])  # mean 2
    assert SPIKE["triton"](ties, 2.0, False).tolist() == [[2.0, 0.0, -2.0, 0.0, 1.0, -6.0]]


def test_spikes_of_a_row_depend_on_no_other():
    x = torch.randn(7, 40)
    y, dx = values_and_grads(lambda x: SPIKE["triton"](x, 3.0, True), [x], ())
    dy = torch.randn(7, 40, generator=torch.Generator().manual_seed(1), device="cpu").to(x)
    leaf = x[2:4].clone().requires_grad_()
    alone = SPIKE["triton"](leaf, 3.0, True)
    same([alone, *torch.autograd.grad(alone, leaf, dy[2:4])], [y[2:4], dx[2:4]])
    for odd in (x[:, 3:20], x.mT, x[:1].expand(4, -1)):
        assert torch.equal(SPIKE["triton"](odd, 3.0, False), SPIKE["reference"](odd, 3.0, False))


def refused():
    x, w = torch.zeros(1, 2, 3), torch.zeros(3, 9)
    wide = torch.zeros(2, 8193)
    yield "expected float32, bfloat16 .* got torch.float64", lambda: unwrap(short_conv)(x.double(), w[:, :4])
    keys = torch.zeros(1, 1, 1027), torch.zeros(1, 1, 2), torch.zeros(1), torch.zeros(1)
    yield "expected float32, bfloat16 or float16, got torch.float64", lambda: unwrap(spike)(x.double())
    yield "expected at most {'K': 512}", lambda: unwrap(delta_inputs)(*keys, num_key_heads=1, key_width=513)
    yield "short_conv: .* expected at most {'W': 8", lambda: unwrap(short_conv)(x, w)
    yield "rms_norm: .* expected at most {'W': 8192}", lambda: unwrap(rms_norm)(wide, wide[0], 1e-6)
    yield "expected at most {'W': 8192}", lambda: unwrap(gated_rms_norm)(wide, wide, wide[0], 1e-6)


@pytest.mark.parametrize("message", [message for message, _ in refused()])
def test_what_it_cannot_run_is_refused(message):
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        dict(refused())[message]()


PUBLIC = {
    "norm": (lambda x, weight, eps, offset: rms_norm(x, weight, eps, offset=offset), lambda: norm(5, 6)),
    "gated": (gated_rms_norm, lambda: gated(5, 6)),
    "conv": (short_conv, lambda: conv(2, 3, 5, 4, documents=True)),
    "inputs": (inputs_of, lambda: inputs(1, 2, 2, 2, 3, 5, 2.0)),
    "spike": (lambda x: spike(x, through_threshold=True), lambda: (SPIKE, [torch.randn(3, 9)], ())),
}


@pytest.mark.parametrize("case", PUBLIC)
def test_public_under_autocast_and_checkpoint(case):
    """The op keeps its dtypes under autocast, and runs again under checkpointing to the same gradients."""
    op, make = PUBLIC[case]
    _, tensors, rest = make()

    def cast(*args):
        with torch.autocast(tensors[0].device.type, dtype=HALF):
            return op(*args)

    again = lambda *args: torch.utils.checkpoint.checkpoint(op, *args, use_reentrant=False)
    with use_backend("triton"):
        plain = values_and_grads(op, tensors, rest)
        for other in (again, cast):
            same(values_and_grads(other, tensors, rest), plain)


TRACED = """
import torch
from seqzoo.kernels.delta_inputs import delta_inputs
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.rms_norm import gated_rms_norm, rms_norm
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.short_conv.step import short_conv_step_
from seqzoo.kernels.spike import spike

def inputs(qkv, ba, a_log, dt_bias):
    return delta_inputs(2 * qkv, ba, a_log, dt_bias, num_key_heads=2, key_width=3)

def spikes(x):
    return spike(2 * x), spike(3 * x, through_threshold=True)

def norms(x, weight, gate):
    return gated_rms_norm(rms_norm(x, weight, 1e-6, offset=1.0), gate, weight, 1e-6),

def conv(x, filters, starts):
    y, past = short_conv(x, filters, None, starts)
    with torch.no_grad():
        z = short_conv_step_(x.detach(), filters.detach(), past)
    return y, past, z

torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
starts = torch.rand(2, 3) < 0.3
for run, shapes, rest in (
    (conv, [(2, 3, 5), (5, 4)], [starts]),
    (norms, [(2, 3, 5), (5,), (2, 3, 5)], []),
    (spikes, [(4, 9)], []),
    (inputs, [(2, 3, 20), (2, 3, 4), (2,), (2,)], []),
):
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with use_backend("triton"):
        results = [f(*leaves, *rest) for f in (torch.compile(run, backend="aot_eager", fullgraph=True), run)]
        grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), leaves) for ys in results]
    for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b)
"""


def test_compiles():
    """Traced into one graph, forward and backward; in a process without the type checks of tests."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
