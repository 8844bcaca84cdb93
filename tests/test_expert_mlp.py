"""The laws of expert_mlp: every backend is the definition, in output and every gradient, however the load falls."""

from inspect import unwrap

import pytest
import torch
from cases import EXPERT_LOADS, expert_mlp_inputs
from torch.testing import assert_close

from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.expert_mlp import expert_mlp
from seqzoo.kernels.expert_mlp.op import BACKENDS as EXPERT_MLP
from seqzoo.kernels.gpu import interpreted, usable

ON_CPU = [name for name in EXPERT_MLP if name != "triton" or usable() and interpreted()]
NAMES = ("y", "x", "weight", "gate_up", "down")
TOLERANCE = {torch.float64: dict(atol=1e-10, rtol=1e-8), torch.float32: dict(atol=2e-5, rtol=1e-4)}
DTYPE = {"reference": torch.float64, "torch": torch.float64, "cpp": torch.float32}


def values_and_grads(fn, inputs, seed=1):
    x, chosen, weight, gate_up, down = inputs
    x, weight, gate_up, down = (t.clone().requires_grad_() for t in (x, weight, gate_up, down))
    y = fn(x, chosen, weight, gate_up, down)
    torch.manual_seed(seed)
    cotangent = torch.randn(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, weight, gate_up, down), cotangent)]


def compare(ours, truth, **tolerance):
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        assert_close(a, b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_the_definition_is_the_formula():
    """Every expert on every token, weighted by what its slots add up to."""
    x, chosen, weight, gate_up, down = expert_mlp_inputs(**EXPERT_LOADS["few"], dtype=torch.float64)
    gate, up = torch.einsum("nd,ejd->nej", x, gate_up).chunk(2, dim=-1)
    each = torch.einsum("nei,edi->ned", torch.nn.functional.silu(gate) * up, down)
    share = torch.nn.functional.one_hot(chosen, len(down)).to(weight) * weight[..., None]
    assert_close(EXPERT_MLP["reference"](x, chosen, weight, gate_up, down), torch.einsum("nje,ned->nd", share, each))


@pytest.mark.parametrize("load", EXPERT_LOADS)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_is_the_definition(backend, load):
    inputs = expert_mlp_inputs(**EXPERT_LOADS[load], dtype=DTYPE[backend])
    compare(
        values_and_grads(EXPERT_MLP[backend], inputs),
        values_and_grads(EXPERT_MLP["reference"], inputs),
        **TOLERANCE[DTYPE[backend]],
    )


@pytest.mark.parametrize("load", EXPERT_LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_low_precision(backend, dtype, load):
    """Relative to the largest value, against the definition in float64 on the same (rounded) numbers."""
    inputs = expert_mlp_inputs(**EXPERT_LOADS[load], dtype=dtype)
    truth = values_and_grads(EXPERT_MLP["reference"], [t if t.dtype == torch.int64 else t.double() for t in inputs])
    for name, a, b in zip(NAMES, values_and_grads(EXPERT_MLP[backend], inputs), truth, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_two_runs_are_the_same_bits(backend, dtype):
    inputs = expert_mlp_inputs(**EXPERT_LOADS["even"], dtype=dtype)
    first, second = (values_and_grads(EXPERT_MLP[backend], inputs) for _ in range(2))
    compare(first, second, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_the_bits(dtype):
    inputs = expert_mlp_inputs(**EXPERT_LOADS["even"], dtype=dtype)
    threads = torch.get_num_threads()
    many = values_and_grads(EXPERT_MLP["cpp"], inputs)
    try:
        for n in (1, 5):  # five: more threads than stripes of columns
            torch.set_num_threads(n)
            compare(values_and_grads(EXPERT_MLP["cpp"], inputs), many, atol=0, rtol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_gradient_without_strides(backend):
    inputs = [t.requires_grad_(t.is_floating_point()) for t in expert_mlp_inputs(N=9, E=4, k=2, D=16, I=8)]
    y = EXPERT_MLP[backend](*inputs)
    (dx,) = torch.autograd.grad(y.sum(), inputs[0], retain_graph=True)
    assert_close(dx, torch.autograd.grad(y, inputs[0], torch.ones(y.shape))[0])


@pytest.mark.parametrize("backend", ON_CPU)
def test_frozen_experts(backend):
    """The gradients that are wanted do not depend on which others are."""
    inputs = expert_mlp_inputs(N=9, E=4, k=2, D=16, I=8)
    whole = values_and_grads(EXPERT_MLP[backend], inputs)
    for i in (0, 2):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        torch.manual_seed(1)
        y = EXPERT_MLP[backend](*leaves)
        (grad,) = torch.autograd.grad(y, leaves[i], torch.randn(y.shape))
        assert_close(grad, whole[1 if i == 0 else 2])


def test_without_gradients_it_says_the_same():
    inputs = expert_mlp_inputs(**EXPERT_LOADS["even"], dtype=torch.float32)
    with use_backend("cpp"), torch.no_grad():
        y = expert_mlp(*inputs)
    assert_close(y, values_and_grads(EXPERT_MLP["cpp"], inputs)[0], atol=0, rtol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(chosen=torch.zeros(3, 2, dtype=torch.int64)), "chosen: expected shape"),
        (dict(down=torch.zeros(4, 8, 16)), "gate_up: expected shape|down: expected shape"),
        (dict(gate_up=torch.zeros(4, 16, 16, dtype=torch.bfloat16)), "gate_up: expected x's dtype"),
        (dict(chosen=torch.full((9, 2), 4)), "chosen: expected 0 to 3, got 4 to 4"),
        (dict(chosen=torch.full((9, 2), -1)), "chosen: expected 0 to 3, got -1 to -1"),
    ],
    ids=["slots", "down", "dtype", "beyond", "negative"],
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_errors_name_the_argument(backend, wrong, message):
    names = ("x", "chosen", "weight", "gate_up", "down")
    inputs = dict(zip(names, expert_mlp_inputs(N=9, E=4, k=2, D=16, I=8), strict=True)) | wrong
    with use_backend(backend), pytest.raises(ValueError, match=message):
        unwrap(expert_mlp)(**inputs)  # without the type checker of the tests, which comes first


def test_a_backend_that_cannot_run_is_refused():
    inputs = expert_mlp_inputs(N=9, E=4, k=2, D=16, I=8, dtype=torch.float64)
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected float32 or bfloat16"):
        expert_mlp(*inputs)
