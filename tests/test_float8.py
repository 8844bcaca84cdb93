"""Products of eight bits: every backend is the definition, errors are those that the formats say, and models train."""

import math
from inspect import unwrap

import pytest
import torch
import torch.nn.functional as F
import traced
from runs import HYBRID, run, written
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.float8_linear import float8_linear, has_float8
from seqzoo.kernels.float8_linear import float8_linear as checked
from seqzoo.kernels.float8_linear.op import BACKENDS
from seqzoo.kernels.float8_linear.reference import FORMATS, rounded
from seqzoo.kernels.float8_linear.scaled import KINDS, cast, multiplied
from seqzoo.layers.float8 import Float8Linear
from seqzoo.layers.linear import Linear
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.float8 import use_float8

NONE = pytest.mark.skipif(not has_float8(torch.device("cuda")), reason="no GPU that multiplies numbers of eight bits")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NONE])
EVEN = [*HYBRID, "model.hidden_size=32", "model.mixers.full.head_width=16", "model.channels.moe.shared_width=16"]


def everything(backend, x, weight, bias, d, device="cpu"):
    """y, and the gradients of x, weight and bias."""
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, weight, bias)]
    with use_backend(backend):
        y = float8_linear(*leaves)
    y.backward(d.to(device))
    return [y.detach().cpu(), *(t.grad.cpu() for t in leaves)]


@pytest.mark.parametrize("form", FORMATS)
def test_rounding_is_torchs(form):
    """All magnitudes, ties, numbers below the least, zeros; a vector of zeros; what is not finite stays no number."""
    largest = FORMATS[form][2]
    values = torch.arange(256, dtype=torch.uint8).view(KINDS[form]).float()
    values = values[values.isfinite()]
    ties = (values.sort().values[1:] + values.sort().values[:-1]) / 2
    x = torch.cat([values, ties, ties * 1.001, torch.logspace(-12, 0, 999) * largest, -torch.rand(999) * largest])
    assert x.abs().max() == largest  # so that its scale is 1
    assert torch.equal(rounded(x, form), x.to(KINDS[form]).float())
    rows = torch.randn(5, 33) * torch.tensor([1e-42, 1e-30, 1.0, 1e6, 0.0])[:, None]
    number, scale = cast(rows, form)
    assert torch.equal(rounded(rows, form), number.float() * scale) and not rounded(rows, form)[4].any()
    assert rounded(rows, form).isfinite().all()
    for wrong in (math.nan, math.inf):
        x = torch.ones(2, 3).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(wrong))
        assert not rounded(x, form)[0].isfinite().any() or math.isnan(wrong) and rounded(x, form)[0].isnan().any()
        assert rounded(x, form)[1].eq(1).all()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("backend", ["torch", "scaled_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (2, 19), (3, 16)])
def test_backends_are_the_definition(backend, dtype, rows, device):
    x, d = torch.randn(*rows, 48).to(dtype), torch.randn(*rows, 32).to(dtype)
    weight, bias = torch.randn(32, 48), torch.randn(32)
    wanted = everything("reference", x, weight, bias, d)
    found = everything(backend, x, weight, bias, d, device)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        precise = 2e-6 if dtype == torch.float32 and device == "cpu" else 1e-2
        assert_close(a, b, atol=precise * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_odd_sizes(backend):
    x, weight, bias, d = torch.randn(7, 13), torch.randn(9, 13), torch.randn(9), torch.randn(7, 9)
    for a, b in zip(everything(backend, x, weight, bias, d), everything("reference", x, weight, bias, d), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_errors_are_those_of_the_formats():
    """An operand is off by 2^-4 of itself at most in 4-3, 2^-3 in 5-2, or by half the least step of its vector."""
    x, weight, d = torch.randn(40, 64), torch.randn(48, 64), torch.randn(40, 48)
    y, dx, dweight, dbias = everything("torch", x, weight, torch.zeros(48), d)

    def bound(a, b, forms):
        """Of rows of a times rows of b."""
        off = {}
        for name, t, form in (("a", a, forms[0]), ("b", b, forms[1])):
            bits, least, largest = FORMATS[form]
            top = t.abs().amax(1, keepdim=True) / largest
            off[name] = torch.maximum(t.abs() * 2.0 ** -(bits + 1), top * 2.0 ** (least - bits - 1))
        return (a.abs() + off["a"]) @ (b.abs() + off["b"]).mT - a.abs() @ b.abs().mT

    for found, exact, allowed in (
        (y, x @ weight.mT, bound(x, weight, ("q43", "q43"))),
        (dx, d @ weight, bound(d, weight.mT, ("q52", "q43"))),
        (dweight, d.mT @ x, bound(d.mT, x.mT, ("q52", "q43"))),
    ):
        error = (found - exact).abs()
        assert (error <= allowed + 1e-5).all()
        assert (error.square().mean() / exact.square().mean()).sqrt() > 0.01  # and it is no product of more bits
    assert_close(dbias, d.sum(0))


@pytest.mark.parametrize("tokens", [32, 19])
def test_a_gpu_takes_the_operands(tokens):
    """Of all three products: torch's checks of shapes and strides, on tensors that hold nothing."""
    torch.use_deterministic_algorithms(False)  # would fill what is empty
    with FakeTensorMode():
        x, weight, d = (torch.empty(*shape, device="cuda") for shape in ((tokens, 64), (48, 64), (tokens, 48)))
        for a, b, forms, shape in (
            (x, weight, ("q43", "q43"), (tokens, 48)),
            (d, weight.t(), ("q52", "q43"), (tokens, 64)),
            (d.t(), x.t(), ("q52", "q43"), (48, 64)),
        ):
            assert multiplied(a, b, forms, torch.bfloat16, really=True).shape == shape


def test_no_rows_and_one():
    weight, bias = torch.randn(16, 32), torch.randn(16)
    for backend in ("reference", "torch"):
        y, dx, dweight, dbias = everything(backend, torch.randn(0, 32), weight, bias, torch.randn(0, 16))
        assert y.shape == (0, 16) and dx.shape == (0, 32) and not dweight.any() and not dbias.any()
        one = torch.randn(32)
        with use_backend(backend):
            assert torch.equal(float8_linear(one, weight, bias), float8_linear(one[None], weight, bias)[0])


def test_what_cannot_be():
    x, float8_linear = torch.randn(3, 20), unwrap(checked)  # without the tests' type checker, which comes first
    with pytest.raises(ValueError, match="expected a device that multiplies numbers of eight bits, or use_backend"):
        float8_linear(x, torch.randn(16, 20))
    with use_backend("scaled_mm"), pytest.raises(ValueError, match=r"multiples of 16, got \(16, 20\)"):
        float8_linear(x, torch.randn(16, 20))
    with pytest.raises(ValueError, match=r"weight: expected \[out, in\] for x of \(3, 20\), got \(16, 21\)"):
        float8_linear(x, torch.randn(16, 21))
    with pytest.raises(ValueError, match=r"bias: expected shape \(16,\), got \(3,\)"):
        float8_linear(x, torch.randn(16, 20), torch.randn(3))
    assert set(BACKENDS) == {"reference", "torch", "scaled_mm"}


def small(**more):
    delta = dict(kind="gated_deltanet", num_key_heads=2, num_value_heads=2, key_width=8, value_width=8)
    moe = dict(kind="moe", num_experts=16, num_experts_per_token=2, expert_width=16, shared_width=16)
    shape = dict(hidden_size=32, vocab_size=48, num_hidden_layers=1) | more
    return SeqZooForCausalLM(SeqZooConfig(mixers=dict(d=delta), channels=dict(c=moe), pattern=["d/c"], **shape))


def test_which_layers_it_is_for(monkeypatch):
    model = small()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="trainer.float8: expected a GPU that multiplies numbers of eight bits"):
        use_float8(model, torch.device("cpu"))
    with use_backend("torch"):
        used, left = use_float8(model, torch.device("cpu"))
    start = "stack.blocks.0."
    assert {x.removeprefix(start) for x in used} == {
        "mixer.qkv_proj", "mixer.gate_proj", "mixer.out_proj", "channel.shared.gate_proj", "channel.shared.up_proj",
        "channel.shared.down_proj",
    }  # fmt: skip
    assert {x.removeprefix(start) for x in left} == {"mixer.ba_proj", "channel.router", "channel.shared_gate"}
    assert set(model.state_dict()) == names and type(model.lm_head) is Linear
    with use_backend("torch"), pytest.raises(ValueError, match="sizes are multiples of 16, got none"):
        use_float8(small(hidden_size=24), torch.device("cpu"))


def test_compiled():
    """In one graph, backward too."""
    traced.passes("""
import torch
from traced import agrees
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.float8_linear import float8_linear
leaves = [torch.randn(*shape, requires_grad=True) for shape in ((5, 32), (16, 32), (16,))]
for backend in ("torch", "scaled_mm"):
    with use_backend(backend):
        agrees(lambda x, weight, bias: float8_linear(x, weight, bias).square().sum(), leaves)
""")


def test_under_autocast():
    """The inputs are rounded from its dtype, the weights from their own."""
    layer, x = Linear(32, 16), torch.randn(5, 32)
    layer.__class__ = Float8Linear
    with use_backend("torch"):
        wanted = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lower = layer(x)
        plain = float8_linear(x.bfloat16(), layer.weight, layer.bias)
    assert lower.dtype == torch.bfloat16 and torch.equal(lower, plain)
    assert not torch.equal(wanted, F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("how", [(), ("parallel=fsdp", "trainer.gradient_checkpointing=true")])
def test_a_run(how, tmp_path):
    """It learns what one in fp32 learns, but for a few per cent, and its checkpoints have the same tensors."""
    numbers = dict(model=EVEN, steps=8, log_every=1, sample_tokens=0, validate_every=100, checkpoint_every=100)
    with use_backend("torch"):
        run(tmp_path / "fp32", *how, **numbers)
        run(tmp_path / "float8", *how, float8="true", **numbers)
        if not how:
            with pytest.raises(ValueError, match="trainer.float8: expected linear layers"):
                run(tmp_path / "odd", float8="true", **numbers | dict(model=HYBRID))
    lines = [[x["loss"] for x in written(tmp_path / name) if x["split"] == "train"] for name in ("fp32", "float8")]
    assert lines[0] != lines[1] and lines[1][-1] < lines[1][0] - 0.1
    assert lines[1] == pytest.approx(lines[0], rel=0.02)
    if not how:
        one, other = (
            load_file(tmp_path / name / "checkpoints" / "step-00000008" / "model.safetensors")
            for name in ("fp32", "float8")
        )
        assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in other.items()}
