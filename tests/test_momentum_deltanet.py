"""The momentum delta rule beyond the laws of every op, and what the layer's gates promise."""

import math

import pytest
import torch
import torch.nn.functional as F
import traced
from cases import OPS
from test_ops import documents, values_and_grads
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.kernels.momentum_delta_rule import momentum_delta_rule
from seqzoo.kernels.momentum_delta_rule.op import BACKENDS
from seqzoo.layers.mixers.momentum_deltanet import MomentumDeltaNet
from seqzoo.layers.registry import build

ROWS = {op.name: op for op in OPS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_mu", [0.0, -0.01, -0.05, -0.3, -0.5, -1.0, -2.0, -8.0, -20.0, -200.0])
def test_fp32_is_exact_at_any_momentum(backend, log_mu):
    """Where a difference of ratios of running products is wrong by a part in two from -0.5 on, and NaN at -2."""
    B, T, H, K, V = 1, 256, 2, 32, 24
    q, v, k = torch.randn(B, T, H, K), torch.randn(B, T, H, V), F.normalize(torch.randn(B, T, H, K), dim=-1)
    log_alpha, beta, eta = -0.1 * torch.rand(B, T, H), torch.rand(B, T, H), torch.rand(B, T, H)
    eta *= min(1.0, 10 * -math.expm1(log_mu)) if log_mu else 0.1  # slow momentum with large steps grows without bound
    time = [q, k, v, k, log_alpha, torch.full((B, T, H), log_mu), beta, eta]
    state = torch.randn(B, H, 2, K, V)
    exact = values_and_grads(BACKENDS["reference"], [x.double() for x in time], state.double())
    for ours, truth in zip(values_and_grads(BACKENDS[backend], time, state), exact, strict=True):
        assert (ours.double() - truth).norm() <= 1e-5 * truth.norm() + 1e-35


def test_derivatives_by_differences():
    """The hand-derived backward against finite differences, packed and grouped."""
    time, state = ROWS["momentum_delta_rule-grouped"].draw(4, torch.float64)
    q, k, v, p, *gates = time
    tiny = q[:1, :, :1, :2], k[:1, :, :1, :2], v[:1, :, :2, :3], p[:1, :, :2, :2], *(x[:1, :, :2] for x in gates)
    starts = torch.tensor([[False, False, True, False]])
    leaves = [x.clone().requires_grad_() for x in (*tiny, state[:1, :2, :, :2, :3])]
    assert torch.autograd.gradcheck(lambda *x: BACKENDS["torch"](*x, starts), leaves)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # which knows no float64
def test_no_momentum_is_the_gated_delta_rule(backend):
    """mu = 0 and p = alpha k; the state's second half is then the last error alone."""
    (q, k, v, _, log_alpha, _, beta, eta), state = ROWS["momentum_delta_rule-grouped"].draw(70, torch.float64)
    p = log_alpha.exp()[..., None] * k.repeat_interleave(2, dim=2)
    starts = documents("random", 70)
    with use_backend(backend):
        none = torch.full_like(beta, -1e4)
        o, last = momentum_delta_rule(q, k, v, p, log_alpha, none, beta, eta, state=state, starts=starts)
        truth, memory = gated_delta_rule(q, k, v, log_alpha, beta * eta, state=state[:, :, 0], starts=starts)
    assert_close(o, truth)
    assert_close(last[:, :, 0], memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Half inputs, fp32 gates: near the definition on the same numbers in fp32; outputs and gradients keep dtypes."""
    time, state = ROWS["momentum_delta_rule-wide"].draw(130, torch.float32)
    time[:4] = [x.to(dtype) for x in time[:4]]
    starts = documents("random", 130)
    ours = values_and_grads(BACKENDS["torch"], time, state, starts)
    truth = values_and_grads(BACKENDS["reference"], [x.float() for x in time], state, starts)
    assert [x.dtype for x in ours] == [dtype, torch.float32, *[dtype] * 4, *[torch.float32] * 5]
    for a, b in zip(ours, truth, strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_long_decay_keeps_small_differences():
    """After a sum of decays of -600 inside a chunk, float32 alone would be wrong by 1e-5."""
    time, state = ROWS["momentum_delta_rule"].draw(64, torch.float32)
    for log in (4, 5):
        decay = torch.where(torch.arange(64)[:, None] < 30, -20.0, -0.01)
        time[log] = decay.expand_as(time[log]).contiguous()
    ours = values_and_grads(BACKENDS["torch"], time, state)
    truth = values_and_grads(BACKENDS["reference"], [x.double() for x in time], state.double())
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).abs().max() <= 4e-6 * b.abs().max()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


def test_training_keeps_the_inputs_and_makes_no_tensor_larger_than_a_chunk_squared():
    B, T, H, K, V, C = 1, 1024, 2, 32, 32, 32
    q, k, v, p = (torch.randn(B, T, H, K, requires_grad=True) for _ in range(4))
    gates = [torch.rand(B, T, H).mul(-0.5 if n < 2 else 0.5).requires_grad_() for n in range(4)]
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x)
    with Largest() as largest, hooks:
        o, _ = momentum_delta_rule(q, k, v, p, *gates)
        o.square().sum().backward()
    inputs = 4 * B * T * H * K + 4 * B * T * H + o.numel()
    assert sum(saved) < 1.1 * inputs + 4 * B * H * 2 * K * V
    assert largest.elements <= 2 * B * T * H * max(2 * K, C + 2)


def test_public_op_under_autocast():
    op = ROWS["momentum_delta_rule-grouped"]
    time, state = op.draw(70, torch.float32)
    for backend in BACKENDS:
        with use_backend(backend):
            plain, _ = momentum_delta_rule(*time, state=state)
            with torch.autocast("cpu", torch.bfloat16):
                o, last = momentum_delta_rule(*time, state=state)
        assert torch.equal(o, plain) and o.dtype == last.dtype == torch.float32
    o, last = momentum_delta_rule(*(x.bfloat16() for x in time))
    assert (o.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda x: x[0], "q, v and p: expected .* got"),
        ("q", lambda x: x[:, :0], "q, v and p: .* every size >= 1"),
        ("k", lambda x: x[..., 1:], r"k: expected shape \(2, 5, 2, 7\), got \(2, 5, 2, 6\)"),
        ("v", lambda x: x[:, :, :3], "v: expected a multiple of q's 2 heads, got 3"),
        ("p", lambda x: x[:, :, :3], "v: expected a multiple of p's 3 heads, got 4"),
        ("p", lambda x: x[..., :3], r"p: expected shape \(2, 5, 4, 7\), got \(2, 5, 4, 3\)"),
        ("log_mu", lambda x: x.mT, "log_mu: expected shape"),
        ("eta", lambda x: x.long(), "eta: expected a floating dtype, got torch.int64"),
        ("state", lambda x: x[:, :, 0], r"state: expected shape \(2, 4, 2, 7, 4\), got \(2, 4, 7, 4\)"),
        ("starts", lambda x: x.int(), "starts: expected bool, got torch.int32"),
    ],
)
def test_says_what_is_wrong(name, change, message):
    op = ROWS["momentum_delta_rule-grouped"]
    time, state = op.draw(5, torch.float32)
    inputs = dict(zip(op.inputs, time, strict=True), state=state, starts=torch.zeros(2, 5, dtype=torch.bool))
    inputs[name] = change(inputs[name])
    unchecked = momentum_delta_rule
    while hasattr(unchecked, "__wrapped__"):  # past the check of the annotations that tests add
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=f"momentum_delta_rule: {message}"):
        unchecked(**inputs)


TRACED = """
import torch
import traced
from seqzoo.kernels.momentum_delta_rule import momentum_delta_rule

torch.manual_seed(0)
shapes = [(2, 40, 2, 7), (2, 40, 2, 7), (2, 40, 4, 5), (2, 40, 4, 7), *[(2, 40, 4)] * 4]
inputs = [torch.rand(shape) / 3 for shape in shapes]
for log in (4, 5):
    inputs[log] = -inputs[log]
for learns, starts in ((True, torch.rand(2, 40) < 0.1), (False, None)):
    leaves = [x.detach().requires_grad_(learns) for x in inputs]
    run = lambda *x: momentum_delta_rule(*x, starts=starts)[0].square().sum()
    traced.agrees(run, leaves)
"""


def test_compiles():
    """Traced into one graph, packed or not; in a process without the type checks of tests, which cannot be traced."""
    traced.passes(TRACED)


def layer(D=32, **changes) -> MomentumDeltaNet:
    sizes = dict(num_key_heads=2, num_value_heads=8, key_width=16, value_width=8)
    return build("mixers", dict(kind="momentum_deltanet") | sizes | changes, D)


def by_hand(part, x, gates, ask_faded):
    """x [T, D] -> y [T, D]: the layer's formulas as they are written, head by head and token by token."""
    D, (H, HV, K, V), W = x.shape[1], (part.H, part.HV, part.K, part.V), part.conv.width
    padded = torch.cat([x.new_zeros(W - 1, D), x]) @ part.qkv_proj.weight.T
    qkv = F.silu(sum(part.conv.weight[:, w] * padded[w : w + len(x)] for w in range(W)))
    q, k, v = qkv.split(part.sizes, dim=-1)
    unit = lambda y: y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q, k, v = unit(q.unflatten(-1, (H, K))) / K**0.5, unit(k.unflatten(-1, (H, K))), v.unflatten(-1, (HV, V))
    b, a, m, e = (x @ part.bame_proj.weight.T).chunk(4, dim=-1)
    alpha = (-part.a_log.exp() * F.softplus(a + part.dt_bias)).exp()
    mu = (-part.mu_log.exp() * F.softplus(m + part.mu_bias)).exp()
    if gates == "mean":
        beta, eta = b.sigmoid(), (1 - mu) * e.sigmoid()
    else:
        eta = 1 + (e / D**0.5).tanh()
        r = eta * part.ratio_log.exp()
        beta, alpha = r**2 / (1 + r**2) * b.sigmoid(), alpha / (1 + r**2)
    z, out = F.silu(x @ part.gate_proj.weight.T).unflatten(-1, (HV, V)), torch.empty(len(x), HV, V).to(x)
    for h in range(HV):
        S, M = torch.zeros(2, K, V).to(x)
        for t in range(len(x)):
            key = k[t, h // (HV // H)]
            asked = alpha[t, h] * key if ask_faded else key
            M = mu[t, h] * M - torch.outer(eta[t, h] * key, v[t, h] - asked @ S)
            S = alpha[t, h] * S - beta[t, h] * M
            o = q[t, h // (HV // H)] @ S
            out[t, h] = part.norm.weight * o / (o.square().mean() + part.norm.eps).sqrt() * z[t, h]
    return out.flatten(1) @ part.out_proj.weight.T


@pytest.mark.parametrize("gates", ["mean", "coupled"])
@pytest.mark.parametrize("ask_faded", [True, False])
def test_the_layer_is_its_formulas(gates, ask_faded):
    part, x = layer(D=9, gates=gates, ask_faded=ask_faded).double(), torch.randn(1, 8, 9, dtype=torch.double)
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        assert_close(part(x)[0][0], by_hand(part, x[0], gates, ask_faded), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("gates", ["mean", "coupled"])
@pytest.mark.parametrize("ask_faded", [True, False])
def test_the_memory_stays_bounded(gates, ask_faded):
    """Long sequences and gates far from where they begin, every half-life of the errors: the state does not grow."""
    part = layer(gates=gates, ask_faded=ask_faded)
    torch.nn.init.constant_(part.dt_bias, -9.0)  # hardly fades by itself
    part.mu_log.data.copy_(torch.linspace(math.log(math.log(2) / 256), math.log(math.log(2)), 8))
    torch.nn.init.normal_(part.bame_proj.weight, std=0.3)
    x, held = torch.randn(1, 4096, 32), []
    with torch.no_grad():
        state = part.init_state(1, device=x.device, dtype=x.dtype)
        for piece in x.split(1024, dim=1):
            _, state = part(piece, state=state)
            held.append(state.memory[:, :, 0].square().mean((0, 2, 3)).sqrt())
    assert (held[-1] < 3 * held[0] + 0.1).all()


def test_a_sum_of_errors_would_not_stay_bounded():
    """Why `mean` has its 1 - mu: the same rule without it, half-life 16 tokens, steps of a quarter."""
    T = 2048
    k = F.normalize(torch.randn(1, T, 1, 32, dtype=torch.double), dim=-1)
    v, gate = torch.randn(1, T, 1, 8, dtype=torch.double), torch.full((1, T, 1), 0.5, dtype=torch.double)
    log_alpha, log_mu = gate * 0 - 0.03, gate * 0 - math.log(2) / 16
    late = lambda eta: momentum_delta_rule(k, k, v, k, log_alpha, log_mu, gate, eta)[0][:, -99:].square().mean().sqrt()
    assert late(gate) > 1e3 and late(-torch.expm1(log_mu) * gate) < 1


@pytest.mark.parametrize("gates", ["mean", "coupled"])
def test_where_the_gates_begin(gates):
    """Half-lives of the errors from 1 to 64 tokens, about evenly on a log scale; all gates within their bounds."""
    part = layer(gates=gates)
    half_lives = []
    for _ in range(50):
        part.reset_parameters()
        zero = torch.zeros(1, 1, 8)
        log_alpha, log_mu, beta, eta = part._gates(zero, zero + 0.5, zero, zero, 32)
        half_lives += (-math.log(2) / log_mu).flatten().tolist()
        assert (log_alpha <= 0).all() and (beta > 0).all() and (beta * eta < 1).all()
        assert (eta > 0).all() and (log_alpha >= -0.7).all()
    half_lives = torch.tensor(half_lives)
    assert half_lives.min() > 0.99 and half_lives.max() < 64.5
    assert abs((half_lives < 8).float().mean() - 0.5) < 0.1


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(gates="sum"), "gates: expected one of .*'coupled'.* got 'sum'"),
        (dict(num_value_heads=3), "num_value_heads: expected a multiple of num_key_heads=2, got 3"),
        (dict(key_width=0), "key_width: expected a whole number, at least 1, got 0"),
        (dict(value_width=1.5), "value_width: expected a whole number, got 1.5"),
        (dict(num_value_heads="8"), "num_value_heads: expected a whole number, got '8'"),
        (dict(ask_faded="no"), "ask_faded: expected true or false, got 'no'"),
    ],
    ids=str,
)
def test_the_layer_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=f"momentum_deltanet: {message}"):
        layer(**wrong)
