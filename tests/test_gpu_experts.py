"""expert_mlp in Triton and torch's grouped product: the definition, however the load falls, in no other order."""

import os
import subprocess
import sys
from inspect import unwrap

import pytest
import torch
import torch.nn.functional as F
from cases import EXPERT_LOADS, expert_mlp_inputs
from test_expert_mlp import NAMES, TOLERANCE, compare, values_and_grads
from torch.testing import assert_close

from seqzoo.kernels.dispatch import choose, use_backend
from seqzoo.kernels.expert_mlp import expert_mlp, gpu, grouped_product
from seqzoo.kernels.expert_mlp.grouped import _one_by_one
from seqzoo.kernels.expert_mlp.op import BACKENDS
from seqzoo.kernels.gpu import usable
from seqzoo.kernels.gpu.traffic import counting

triton, reference = BACKENDS["triton"], BACKENDS["reference"]
LOADS = {name: load for name, load in EXPERT_LOADS.items() if name not in ("one takes all", "large")}
LOADS |= {
    "one takes all": dict(N=101, E=4, k=1, D=16, I=24, only=2),
    "unaligned": dict(N=21, E=5, k=3, D=13, I=5),
    "wide": dict(N=9, E=3, k=2, D=600, I=520),
}
loads = pytest.mark.parametrize("load", LOADS)
pytestmark = pytest.mark.skipif(not usable(), reason="no triton")


@pytest.fixture(autouse=True)
def interpreted(request):
    """On a GPU, only what is written for one."""
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu") is None:
        pytest.skip("for Triton's interpreter")


@loads
def test_is_the_definition(load):
    inputs = expert_mlp_inputs(**LOADS[load])
    compare(values_and_grads(triton, inputs), values_and_grads(reference, inputs), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("load", ["few", "twice the same", "aligned"])
def test_low_precision(dtype, load):
    """Relative to the largest value, in float64 on the same (rounded) numbers; dtypes stay."""
    inputs = expert_mlp_inputs(**LOADS[load], dtype=dtype)
    truth = values_and_grads(reference, [t if t.dtype == torch.int64 else t.double() for t in inputs])
    for name, a, b in zip(NAMES, values_and_grads(triton, inputs), truth, strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3), f"{name}: {error}"


def test_weights_of_another_dtype():
    """As under autocast: what the router says is in fp32, the rest in bf16."""
    x, chosen, weight, gate_up, down = expert_mlp_inputs(**LOADS["few"], dtype=torch.bfloat16)
    inputs = [x, chosen, weight.float() / 3, gate_up, down]
    ours, truth = values_and_grads(triton, inputs), values_and_grads(reference, inputs)
    assert ours[2].dtype == torch.float32
    for a, b in zip(ours, truth, strict=True):
        assert (a.float() - b.float()).abs().max() < 3e-2 * b.abs().max()


def test_slots_have_one_place_each():
    """`place` is the inverse of `order`, experts come in order, and a token's slots with them."""
    chosen = torch.randint(9, (70, 3))
    order, place, ends = gpu.sort(chosen, 11)
    assert torch.equal(order[place.long()].flatten(), torch.arange(210))
    assert torch.equal(chosen.flatten()[order], chosen.flatten().sort(stable=True).values)
    assert torch.equal(ends.long(), chosen.flatten().bincount(minlength=11).cumsum(0))
    assert ends.dtype == place.dtype == torch.int32


def test_permutation_kernels():
    """Each beside its formula, on rows that are not whole tiles."""
    chosen = torch.randint(5, (37, 3))
    order, place, _ = gpu.sort(chosen, 5)
    x, rows, gates, weight = (torch.randn(*s) for s in ((37, 530), (111, 530), (111, 2 * 70), (37, 3)))
    assert_close(gpu.spread(x, order, 3), x[order // 3], atol=0, rtol=0)
    assert_close(gpu.collect(rows, place), rows[place.long()].sum(1))
    gates.requires_grad_(), weight.requires_grad_()
    gate, up = gates.chunk(2, dim=-1)
    want = F.silu(gate) * up * weight.flatten()[order, None]
    given = torch.randn(111, 70)
    assert_close(gpu.gate(gates.detach(), weight.detach(), order), want.detach())
    found = gpu.gate_backward(gates.detach(), weight.detach(), order, given)
    assert_close(found, (want.detach(), *torch.autograd.grad(want, (gates, weight), given)))


@pytest.mark.parametrize("A, C, sizes", [(20, 70, [3, 0, 80, 1]), (130, 16, [0, 0, 5]), (64, 64, [64, 64])], ids=str)
def test_grouped_products(A, C, sizes):
    """Triton's beside a loop: experts without rows and with several tiles, widths that are no whole tiles."""
    ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows, matrices, d = torch.randn(sum(sizes), A), torch.randn(len(sizes), C, A), torch.randn(sum(sizes), C)
    assert_close(grouped_product.start_rows(rows, matrices, ends), _one_by_one(rows, matrices, ends))
    assert_close(grouped_product.start_rows(d, matrices.mT, ends), _one_by_one(d, matrices.mT, ends))
    found = grouped_product.start_matrices(d, rows, matrices, ends)
    assert_close(found, grouped_product.matrices_gradient(d, rows, matrices, ends))
    assert all((g == 0).all() for g, n in zip(found, sizes, strict=True) if n == 0)


@pytest.mark.parametrize("load", ["few", "unaligned"])
def test_is_the_definition_with_our_product(load, monkeypatch):
    monkeypatch.setattr(grouped_product, "in_triton", lambda *_: True)
    inputs = expert_mlp_inputs(**LOADS[load])
    compare(values_and_grads(triton, inputs), values_and_grads(reference, inputs), **TOLERANCE[torch.float32])


def test_the_same_in_any_batch():
    """To the bit, forward and backward: a token's rows wherever they stand, an expert's that alone is asked."""
    x, chosen, weight, gate_up, down = expert_mlp_inputs(N=40, E=4, k=2, D=32, I=16)
    rows = gpu.spread(x, gpu.sort(chosen, 4)[0], 2)
    for n in (1, 17):
        order, place, _ = gpu.sort(chosen[:n], 4)
        few = gpu.spread(x[:n], order, 2)
        assert_close(gpu.collect(few, place), gpu.collect(rows, gpu.sort(chosen, 4)[1])[:n], atol=0, rtol=0)
    first, second = (values_and_grads(triton, (x, chosen, weight, gate_up, down)) for _ in range(2))
    compare(first, second, atol=0, rtol=0)


@pytest.mark.parametrize("wanted", [(0,), (2,), (3,), (4,)], ids=str)
def test_gradients_of_some(wanted):
    inputs = expert_mlp_inputs(N=9, E=4, k=2, D=16, I=8)
    whole = values_and_grads(triton, inputs)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    y = triton(*leaves)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(y, [leaves[i] for i in wanted], torch.randn(y.shape))
    assert_close(grad, whole[(1, None, 2, 3, 4)[wanted[0]]])


def test_no_token_at_all():
    inputs = expert_mlp_inputs(N=4, E=4, k=2, D=16, I=8)
    inputs[:3] = [t[:0] for t in inputs[:3]]
    y, *grads = values_and_grads(triton, inputs)
    assert y.shape == (0, 16) and all((g == 0).all() for g in grads)


def test_rows_are_not_kept():
    """For backward: what came in, the gates, and three vectors of places. No row of width D for each slot."""
    N, k, D, I = 60, 4, 64, 8
    inputs = [t.requires_grad_(t.is_floating_point()) for t in expert_mlp_inputs(N=N, E=5, k=k, D=D, I=I)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        triton(*inputs)
    new = [t for t in kept if not any(t.data_ptr() == x.data_ptr() for x in inputs)]
    assert sum(t.numel() for t in new) == N * k * 2 * I + 2 * N * k + 5


def test_traffic():
    """Each row is read once and written once, whatever the width."""
    N, k, D, I = 32, 3, 600, 40
    x, chosen, weight, *_ = expert_mlp_inputs(N=N, E=5, k=k, D=D, I=I, dtype=torch.bfloat16)
    order, place, _ = gpu.sort(chosen, 5)
    rows, gates = torch.randn(N * k, D).bfloat16(), torch.randn(N * k, 2 * I).bfloat16()
    with counting() as counts:
        gpu.spread(x, order, k), gpu.collect(rows, place), gpu.gate(gates, weight, order)
        gpu.gate_backward(gates, weight, order, gates[:, :I].contiguous())
    R, strips = N * k, 2
    assert counts["spread_rows"].moved == R * (2 * 2 * D + 8 * strips)
    assert counts["collect_rows"].moved == 2 * (R + N) * D + 4 * R * strips
    assert counts["gate_rows"].moved == R * (2 * 3 * I + 8 + 2)
    assert counts["gate_rows_backward"].moved == R * (2 * 6 * I + 8 + 2 + 4)


STARTED = """
from seqzoo.kernels.expert_mlp import gpu
from seqzoo.kernels.gpu import recording
from seqzoo.kernels.gpu.examples import on_meta

with recording() as launches:
    for _, call in gpu.examples(on_meta):
        call()
names = {(x.kernel.__name__, p.name) for x in launches for p in x.kernel.params if p.do_not_specialize}
rows = dict(spread_rows="R", collect_rows="N", gate_rows="R", gate_rows_backward="R")
assert names == set(rows.items()), names
"""


def test_lengths_compile_once():
    """Numbers of tokens are no constants of a kernel; asked of compiled kernels, which nothing runs."""
    environment = os.environ | dict(TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_is_chosen_on_a_gpu():
    x, chosen = torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.int64)
    for name in ("triton", "torch"):
        able = lambda _, name=name: gpu.runs(x.double() if name == "torch" else x, chosen)
        assert choose(BACKENDS, tokens=6, device=torch.device("cuda"), able=able) == name
    assert not gpu.runs(x, chosen.repeat(1, 40))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict.fromkeys(("x", "gate_up", "down")), "triton: expected float32, bfloat16 or float16, got torch.float64"),
        (dict(chosen=torch.full((9, 2), 4)), "chosen: expected 0 to 3, got 4 to 4"),
        (dict(chosen=torch.zeros(9, 65).long(), weight=torch.zeros(9, 65)), "at most 64 slots per token, got 65"),
        (dict(hidden=lambda x: x), "backend triton: expected no `hidden`, got one"),
    ],
    ids=["dtype", "expert", "slots", "hidden"],
)  # fmt: skip
def test_errors_name_the_argument(change, message):
    names = ("x", "chosen", "weight", "gate_up", "down")
    inputs = dict(zip(names, expert_mlp_inputs(N=9, E=4, k=2, D=16, I=8), strict=True))
    inputs |= {name: inputs[name].double() if given is None else given for name, given in change.items()}
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        unwrap(expert_mlp)(**inputs)


TRACED = """
import torch
from seqzoo.kernels.expert_mlp import op
from seqzoo.layers.channels.moe import MoE

torch.manual_seed(0)
layer = MoE(16, num_experts=6, num_experts_per_token=2, expert_width=8, shared_width=12)
x = torch.randn(2, 9, 16, requires_grad=True)
leaves = [x, *layer.parameters()]

def run(x):
    y, stats = layer(x)
    return y.square().sum() + layer.loss(stats)

for backend in ("triton", "cpp", "torch"):
    op.choose = lambda *args, **how: backend  # of this op alone: the layer's others have no triton
    torch._dynamo.reset()
    if backend == "torch":  # the only dtype of which tracing knows the grouped product
        layer, x = layer.bfloat16(), x.detach().bfloat16().requires_grad_()
        leaves = [x, *layer.parameters()]
    for learns in (True, False) if backend == "triton" else (True,):
        with torch.set_grad_enabled(learns):
            traced, direct = torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x)
            torch.testing.assert_close(traced, direct)
            if learns:
                torch.testing.assert_close(torch.autograd.grad(traced, leaves), torch.autograd.grad(direct, leaves))
"""


def test_the_layer_compiles():
    """Into one graph, routing and counting with it: on a GPU's backend, on a CPU's, and (in bf16) on torch's."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@loads
def test_on_a_gpu(load, dtype):
    inputs = expert_mlp_inputs(**LOADS[load], dtype=dtype)
    truth = values_and_grads(reference, [t if t.dtype == torch.int64 else t.double() for t in inputs])
    inputs = [t.cuda() for t in inputs]
    x, chosen, weight, gate_up, down = (t.clone().requires_grad_(t.is_floating_point()) for t in inputs)
    torch.manual_seed(1)
    cotangent = torch.randn(x.shape).to(dtype).cuda()
    torch.cuda.set_sync_debug_mode("error" if dtype == torch.bfloat16 else "default")  # fp32 is exact, by a loop
    try:
        y = triton(x, chosen, weight, gate_up, down)
        ours = [y, *torch.autograd.grad(y, (x, weight, gate_up, down), cotangent)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        error = (a.double().cpu() - b).abs().max() / b.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3), f"{name}: {error}"
