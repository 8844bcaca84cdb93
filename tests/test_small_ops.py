"""The laws of the small fused ops: every backend is the definition, in outputs and every gradient, on any strides."""

import subprocess
import sys
from inspect import unwrap

import pytest
import torch
import torch.utils.checkpoint
from torch.testing import assert_close

from seqzoo.kernels import native
from seqzoo.kernels.delta_inputs import delta_inputs
from seqzoo.kernels.delta_inputs.op import BACKENDS as DELTA_INPUTS
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.rms_norm import gated_rms_norm, rms_norm
from seqzoo.kernels.rms_norm.cpp import _rows
from seqzoo.kernels.rms_norm.op import BACKENDS as RMS_NORM
from seqzoo.kernels.rms_norm.op import GATED_BACKENDS as GATED_RMS_NORM
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.short_conv.op import BACKENDS as SHORT_CONV

NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
BACKEND = [pytest.param("torch"), pytest.param("cpp", marks=NEEDS_COMPILER)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest value
FAST = {"torch": (torch.float64, torch.float32, torch.bfloat16), "cpp": (torch.float32, torch.bfloat16)}


def norm(*shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    return RMS_NORM, [x, weight], (1e-3, 1.0)


def gated(*shape):
    x, gate, weight = torch.randn(shape), 3 * torch.randn(shape), torch.randn(shape[-1])
    return GATED_RMS_NORM, [x, gate, weight], (1e-3,)


def conv(B, T, C, W, past=True, documents=False):
    x, weight = torch.randn(B, T, C), torch.randn(C, W)
    starts = None
    if documents:
        starts = torch.rand(B, T) < 0.2
        starts[0, : min(T, 2)] = True  # one after another
        starts[-1, -1] = True
    kept = torch.randn(B, W - 1, C) if past else None
    return SHORT_CONV, [x, weight, kept], (starts,)


def inputs(B, T, H, HV, K, V, beta_scale=1.0):
    qkv, ba = torch.randn(B, T, 2 * H * K + HV * V), 8 * torch.randn(B, T, 2 * HV)
    return DELTA_INPUTS, [qkv, ba, 3 * torch.rand(HV), torch.randn(HV)], (H, K, beta_scale)


CASES = {
    "norm one": lambda: norm(1, 256),
    "norm odd": lambda: norm(5, 3, 17),
    "norm narrow": lambda: norm(300, 3),
    "norm blocks": lambda: norm(2, 260, 130),  # several blocks of rows, several threads
    "gated one": lambda: gated(1, 32),
    "gated odd": lambda: gated(2, 5, 3, 33),
    "gated blocks": lambda: gated(2, 130, 3, 67),
    "conv one": lambda: conv(3, 1, 37, 4),
    "conv one starts": lambda: conv(3, 1, 37, 4, documents=True),
    "conv no past": lambda: conv(2, 2, 16, 4, past=False),
    "conv short": lambda: conv(2, 2, 33, 5, documents=True),
    "conv wide filter": lambda: conv(1, 40, 9, 7),
    "conv pointwise": lambda: conv(2, 5, 9, 1),
    "conv blocks": lambda: conv(2, 515, 70, 4),
    "conv strips": lambda: conv(1, 30, 530, 4, documents=True),
    "conv documents": lambda: conv(2, 515, 33, 4, documents=True),
    "conv documents, no past": lambda: conv(2, 260, 5, 3, past=False, documents=True),
    "inputs one": lambda: inputs(1, 1, 4, 8, 32, 16),
    "inputs odd": lambda: inputs(2, 5, 2, 4, 3, 5),
    "inputs, steps up to 2, odd": lambda: inputs(2, 5, 2, 2, 3, 5, 2.0),
    "inputs blocks": lambda: inputs(2, 150, 3, 18, 37, 7),
}
every = pytest.mark.parametrize("case", CASES)


def as_dtype(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def spread(x):
    """The same values, in wider rows: the last dimension contiguous, the others not."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def several(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def values_and_grads(fn, tensors, rest, reshape=lambda x: x):
    """All outputs, then the gradient of every input that is there."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outputs = fn(*(None if t is None else reshape(t) for t in leaves), *rest)
    outputs = several(outputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, device="cpu").to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], weights)]


def assert_near(ours, truth, tolerance):
    assert len(ours) == len(truth)
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs()
        assert not a.numel() or error.max() <= tolerance * b.abs().max().clamp(min=1e-30), f"result {i}: {error.max()}"


@every
@pytest.mark.parametrize("backend, dtype", [(b.values[0], d) for b in BACKEND for d in FAST[b.values[0]]], ids=str)
def test_is_the_definition(case, backend, dtype):
    """On the same rounded numbers, outputs in the right dtype, the gradient of every input."""
    if backend == "cpp" and not native.available():
        pytest.skip("no C++ compiler")
    backends, tensors, rest = CASES[case]()
    tensors = as_dtype(tensors, dtype)
    truth = values_and_grads(backends["reference"], as_dtype(tensors, torch.float64), rest)
    ours = values_and_grads(backends[backend], tensors, rest)
    assert_near(ours, truth, TOLERANCE[dtype])
    same = values_and_grads(backends["reference"], tensors, rest)
    assert [t.dtype for t in ours] == [t.dtype for t in same]


@every
@NEEDS_COMPILER
def test_strides(case):
    """Inputs that stand in wider rows give the very bits; and nothing beside them is read."""
    backends, tensors, rest = CASES[case]()
    plain = values_and_grads(backends["cpp"], tensors, rest)
    strided = values_and_grads(backends["cpp"], tensors, rest, reshape=spread)
    turned = values_and_grads(
        backends["cpp"], tensors, rest, reshape=lambda x: x.mT.contiguous().mT if x.ndim > 1 else x
    )
    for a, b, c in zip(plain, strided, turned, strict=True):
        assert_close(a, b, atol=0, rtol=0)
        assert_close(a, c, atol=0, rtol=0)


@every
@NEEDS_COMPILER
def test_without_gradients_it_says_the_same(case):
    backends, tensors, rest = CASES[case]()
    with torch.no_grad():
        plain = backends["cpp"](*tensors, *rest)
    for a, b in zip(several(plain), values_and_grads(backends["cpp"], tensors, rest), strict=False):
        assert not a.requires_grad
        assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("case", ["norm blocks", "gated blocks", "conv blocks", "conv documents", "inputs blocks"])
@NEEDS_COMPILER
def test_threads_do_not_change_the_bits(case):
    backends, tensors, rest = CASES[case]()
    tensors = [None if t is None else t.repeat(4, *[1] * (t.ndim - 1)) if i == 0 else t for i, t in enumerate(tensors)]
    if case.startswith("gated") or case.startswith("inputs"):
        tensors[1] = tensors[1].repeat(4, *[1] * (tensors[1].ndim - 1))
    if case.startswith("conv"):
        tensors[2] = tensors[2].repeat(4, 1, 1)
        rest = tuple(None if s is None else s.repeat(4, 1) for s in rest)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = values_and_grads(backends["cpp"], tensors, rest)
        torch.set_num_threads(1)
        for a, b in zip(values_and_grads(backends["cpp"], tensors, rest), many, strict=True):
            assert_close(a, b, atol=0, rtol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3, 40, 299])
def test_conv_cut_anywhere(backend, documents, cut):
    """The next past is all there is to remember."""
    backends, (x, weight, past), (starts,) = conv(2, 300, 21, 4, documents=documents)
    fn = backends[backend]
    whole, end = fn(x, weight, past, starts)
    before, after = (None, None) if starts is None else (starts[:, :cut], starts[:, cut:])
    first, middle = fn(x[:, :cut], weight, past, before)
    second, last = fn(x[:, cut:], weight, middle, after)
    assert_near([torch.cat([first, second], dim=1), last], [whole, end], 1e-6)


@pytest.mark.parametrize("backend", BACKEND)
def test_conv_documents_do_not_leak(backend):
    """Whatever stands before a start, what follows keeps its bits, in outputs and gradients."""
    backends, (x, weight, past), _ = conv(1, 20, 7, 4)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 9] = True
    other = x.clone()
    other[:, :9] += 1
    (a, end_a), (b, end_b) = (backends[backend](t, weight, past, starts) for t in (x, other))
    assert_close(a[:, 9:], b[:, 9:], atol=0, rtol=0)
    assert_close(end_a, end_b, atol=0, rtol=0)
    assert (a[:, :9] != b[:, :9]).all()
    leaf = x.clone().requires_grad_()
    y, _ = backends[backend](leaf, weight, past, starts)
    (dx,) = torch.autograd.grad(y[:, 9:].sum(), leaf)
    assert dx[:, :9].abs().max() == 0 and dx[:, 9:].abs().min() > 0


@pytest.mark.parametrize("backend", BACKEND)
def test_mixed_dtypes(backend):
    """As under autocast: bf16 activations, fp32 parameters and states."""
    half = torch.bfloat16
    for (backends, tensors, rest), kept in (
        (norm(40, 48), [1]),
        (gated(40, 48), [0, 2]),
        (conv(2, 40, 48, 4), [1, 2]),
        (inputs(2, 9, 2, 4, 5, 3), [2, 3]),
    ):
        tensors = [t if i in kept else t.to(half) for i, t in enumerate(tensors)]
        ours = values_and_grads(backends[backend], tensors, rest)
        same = values_and_grads(backends["reference"], tensors, rest)
        assert [t.dtype for t in ours] == [t.dtype for t in same]
        assert_near(ours, values_and_grads(backends["reference"], as_dtype(tensors, torch.float64), rest), 2e-2)


def test_a_gate_or_weight_in_fp16_beside_wider_rows():
    """What the C++ does not take, torch runs."""
    x, gate, weight = torch.randn(4, 48), torch.randn(4, 48).half(), torch.randn(48).half()
    assert_close(rms_norm(x, weight, 1e-3), RMS_NORM["reference"](x, weight, 1e-3, 0.0))
    assert_close(gated_rms_norm(x, gate, weight, 1e-3), GATED_RMS_NORM["reference"](x, gate, weight, 1e-3))


def inputs_of(qkv, ba, a_log, dt_bias, H, K, beta_scale):
    return delta_inputs(qkv, ba, a_log, dt_bias, num_key_heads=H, key_width=K, beta_scale=beta_scale)


PUBLIC = {
    "norm odd": lambda x, weight, eps, offset: rms_norm(x, weight, eps, offset=offset),
    "gated odd": gated_rms_norm,
    "conv strips": short_conv,
    "inputs odd": inputs_of,
    "inputs, steps up to 2, odd": inputs_of,
}


@pytest.mark.parametrize("case", PUBLIC)
def test_public_under_autocast_and_checkpoint(case):
    """The op keeps its dtypes under autocast, and runs again under checkpointing to the same gradients."""
    backends, tensors, rest = CASES[case]()
    plain = values_and_grads(PUBLIC[case], tensors, rest)

    def again(*args):
        return torch.utils.checkpoint.checkpoint(PUBLIC[case], *args, use_reentrant=False)

    def cast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return PUBLIC[case](*args)

    for other in (again, cast):
        for a, b in zip(values_and_grads(other, tensors, rest), plain, strict=True):
            assert_close(a, b, atol=0, rtol=0)
    assert_near(plain, values_and_grads(backends["reference"], as_dtype(tensors, torch.float64), rest), 2e-6)


TRACED = """
import torch
from seqzoo.kernels.delta_inputs import delta_inputs
from seqzoo.kernels.rms_norm import gated_rms_norm, rms_norm
from seqzoo.kernels.short_conv import short_conv

def run(x, weight, filters, ba, heads, starts):
    normed = gated_rms_norm(rms_norm(x, weight, 1e-6, offset=1.0), x, weight, 1e-6)
    y, past = short_conv(normed, filters, None, starts)
    return past, *delta_inputs(y, ba, heads, heads, num_key_heads=2, key_width=4)

torch.manual_seed(0)
inputs = [torch.randn(shape) for shape in ((2, 5, 26), (26,), (26, 4), (2, 5, 4), (2,))] + [torch.rand(2, 5) < 0.3]
for a, b in zip(torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs), strict=True):
    torch.testing.assert_close(a, b)
"""


def test_compiles():
    """Traced into one graph, for there torch fuses by itself; in a process without the type checks of tests."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rows_are_taken_as_they_stand():
    """Heads split from wider rows, one of several parts, a single row, many dimensions."""
    x = torch.randn(2, 5, 3, 24)
    for view, copied in (
        (x[..., :8], False),
        (x[:, :, 1:, 8:16], False),
        (x[:, :1, :, 3:], False),
        (x[0, 0, 0, :5], False),
        (x.transpose(1, 2)[..., :8], True),
        (x[..., ::2], True),
        (x[:1, :1, :1, :7].expand(4, 3, 3, 7), False),
    ):
        got, (length, outer, inner) = _rows(view)
        assert (got.data_ptr() != view.data_ptr()) == copied
        W = got.shape[-1]
        index = torch.arange(got.numel() // W)
        at = got.storage_offset() + index // length * outer + index % length * inner
        flat = got.as_strided((got.untyped_storage().nbytes() // 4,), (1,), 0)
        assert_close(flat[at[:, None] + torch.arange(W)], view.reshape(-1, W), atol=0, rtol=0)


@NEEDS_COMPILER
def test_values_are_a_view():
    """v is not copied on its way to the rule, which takes strides."""
    _, tensors, (H, K, scale) = inputs(2, 9, 2, 4, 5, 3)
    v = inputs_of(*tensors, H, K, scale).v
    assert v.data_ptr() == tensors[0][..., 2 * H * K :].data_ptr()


@NEEDS_COMPILER
def test_extreme_gates():
    """No overflow where a gate is shut or wide open."""
    x = torch.tensor([-1e4, -100.0, -88.5, -30.0, 0.0, 30.0, 88.5, 100.0, 1e4]).expand(2, 3, 9).contiguous()
    truth = torch.nn.functional.silu(x.double())
    y, _ = SHORT_CONV["cpp"](x, torch.ones(9, 1), None, None)
    assert_close(y.double(), truth, atol=1e-30, rtol=1e-5)
    ba = torch.cat([x, x], dim=-1)
    *_, g, beta = DELTA_INPUTS["cpp"](torch.randn(2, 3, 11), ba, torch.zeros(9), torch.zeros(9), 1, 1, 1.0)
    assert_close(g.double(), -torch.nn.functional.softplus(x.double()), atol=1e-30, rtol=1e-6)
    assert_close(beta.double(), x.double().sigmoid(), atol=1e-30, rtol=1e-5)


def wrong_calls():
    x, w = torch.zeros(2, 3, 8), torch.zeros(8)
    ba, qkv = torch.zeros(2, 3, 4), torch.zeros(2, 3, 10)
    two = torch.zeros(2)
    yield "rms_norm: weight: expected shape", lambda: rms_norm(x, w[:7], 1e-6)
    yield "rms_norm: x: expected rows", lambda: rms_norm(x[..., :0], w[:0], 1e-6)
    yield "gated_rms_norm: gate: expected x's shape", lambda: gated_rms_norm(x, x[:1], w, 1e-6)
    yield "short_conv: weight: expected shape", lambda: short_conv(x, torch.zeros(7, 4))
    yield "short_conv: past: expected shape", lambda: short_conv(x, torch.zeros(8, 4), torch.zeros(2, 4, 8))
    yield "short_conv: starts: expected bool", lambda: short_conv(x, torch.zeros(8, 4), starts=torch.zeros(2, 3))
    yield "short_conv: x: expected", lambda: short_conv(x[:, :0], torch.zeros(8, 4))
    yield "delta_inputs: qkv: expected", lambda: delta_inputs(qkv[..., :9], ba, two, two, num_key_heads=2, key_width=2)
    yield (
        "delta_inputs: ba: expected shape",
        lambda: delta_inputs(qkv, ba[..., 1:], two, two, num_key_heads=1, key_width=2),
    )
    yield "delta_inputs: dt_bias: expected", lambda: delta_inputs(qkv, ba, two, two[:1], num_key_heads=1, key_width=2)
    yield "expected >= 1", lambda: delta_inputs(qkv, ba, two, two, num_key_heads=0, key_width=2)
    scaled = dict(num_key_heads=1, key_width=2, beta_scale=1.5)
    yield "beta_scale: expected 1 or 2, got 1.5", lambda: delta_inputs(qkv, ba, two, two, **scaled)


@pytest.mark.parametrize("message", [message for message, _ in wrong_calls()])
def test_errors_name_the_argument(message, monkeypatch):
    for op in (
        rms_norm,
        gated_rms_norm,
        short_conv,
        delta_inputs,
    ):  # without the tests' type checker, which comes first
        monkeypatch.setitem(globals(), op.__name__, unwrap(op))
    call = dict(wrong_calls())[message]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("case", PUBLIC)
def test_a_backend_that_cannot_run_is_refused(case):
    _, tensors, rest = CASES[case]()
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected float32 or bfloat16"):
        PUBLIC[case](*as_dtype(tensors, torch.float64), *rest)
