"""What a layer runs on a GPU: our kernels, by the layer's own choice, with the numbers of the CPU's.

Without a GPU the CPU is taken for one: it prefers what a GPU prefers, and Triton's interpreter runs it.
"""

import pytest
import torch
from cases import BLOCKS, MIXERS
from test_mixers import AsMixer, packed, span, spec_of

from seqzoo.kernels import dispatch, gpu
from seqzoo.kernels.gpu.launch import instead, run
from seqzoo.layers.registry import build

pytestmark = pytest.mark.skipif(not gpu.usable(), reason="no triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, D = 2, 12, 16
DELTA = {"short_conv", "delta_inputs", "gated_delta_rule", "rms_norm"}
KERNELS = {  # row -> the ops whose kernels a training step of it starts
    "gated_deltanet": DELTA,
    "gated_deltanet-negative": DELTA,
    "kimi_delta_attention": {"short_conv", "kimi_delta_rule", "rms_norm"},
    "latent_attention": {"rms_norm"},
    "lightning_attention": {"linear_attention", "rms_norm"},
    "linear_attention": {"linear_attention", "rms_norm"},
    "linear_attention-key": {"linear_attention", "rms_norm"},
    "linear_attention-normalised": {"linear_attention"},
    "linear_attention-fixed": {"linear_attention", "rms_norm"},
    "linear_attention-head": {"short_conv", "linear_attention", "rms_norm"},
    "momentum_deltanet": {"short_conv", "momentum_delta_rule", "rms_norm"},
    "parallel-learned": DELTA,
    "ovq_attention": {"ovq_attention"},
    "bdh": {"strict_linear_attention"},
}


@pytest.fixture(autouse=True)
def where_kernels_run():
    """All that a test draws is on the GPU, if there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The GPU's preferences, and float32 products as a GPU's user allows them."""
    here = tuple(name for name in dispatch.FAST["cuda"] if name != "flex")  # which on a CPU has no backward
    monkeypatch.setitem(dispatch.FAST, "cpu", here)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def step(layer, x, where):
    """Outputs, and gradients of the input and of all parameters."""
    leaf = x.clone().requires_grad_()
    y, _ = layer(leaf, where)
    layer.zero_grad(set_to_none=True)
    (y * torch.linspace(-1, 1, D, device=y.device)).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **grads}


@pytest.mark.parametrize("name", KERNELS)
def test_layers_reach_the_kernels(name, as_on_a_gpu):
    part = build(*spec_of(name), D).eval()
    part = (part if name in MIXERS else AsMixer(part)).to(DEVICE)
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, where = torch.randn(B, T, D, device=DEVICE), span(0, T, packed())
    started = set()

    def start(this):
        started.add(this.kernel.fn.__module__.split(".")[2])
        run(this)

    with instead(start):
        ours = step(part, x, where)
    assert started >= KERNELS[name]
    with dispatch.use_backend("reference"):
        truth = step(part, x, where)
    assert ours.keys() == truth.keys()
    loose = 2e-2 if DEVICE == "cuda" else 1e-4
    for key, value in truth.items():
        assert (ours[key] - value).norm() <= loose * value.norm() + 1e-6, key


def test_every_kind_has_a_row():
    """What starts no kernel of its own is attention, which PyTorch's own kernels run, or holds other parts."""
    kinds = {spec.get("kind", name) for table in (MIXERS, BLOCKS) for name, spec in table.items()}
    here = {{**MIXERS, **BLOCKS}[name].get("kind", name) for name in KERNELS}
    assert kinds - here == {"attention", "momentum_attention", "residual", "normed_residual", "post_norm"}


def test_float32_is_exact_unless_allowed(as_on_a_gpu):
    """By default torch wants float32 products exact, which tf32 is not."""
    torch.set_float32_matmul_precision("highest")
    part = build(*spec_of("gated_deltanet"), D).to(DEVICE)
    started = set()
    with instead(lambda this: (started.add(this.kernel.fn.__module__.split(".")[2]), run(this))):
        part(torch.randn(B, T, D, device=DEVICE), span(0, T))
    assert "gated_delta_rule" not in started and "short_conv" in started
