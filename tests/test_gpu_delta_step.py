"""Gated DeltaNet's step in one launch: what its parts are one after the other, on the states that are named."""

import subprocess
import sys

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.delta_inputs.reference import delta_inputs_reference
from seqzoo.kernels.delta_step import delta_step_
from seqzoo.kernels.delta_step.reference import delta_step_reference
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from seqzoo.kernels.gpu.launch import instead, run
from seqzoo.kernels.rms_norm.reference import gated_rms_norm_reference
from seqzoo.kernels.short_conv.reference import short_conv_reference
from seqzoo.layers.mixers.gated_deltanet import GatedDeltaNet
from seqzoo.layers.span import Span

B, SLOTS, EPS = 3, 7, 1e-5
INDEX = [5, -1, 0]
SIZES = [dict(H=2, HV=4, K=7, V=19, W=4), dict(H=1, HV=1, K=24, V=40, W=2), dict(H=1, HV=2, K=3, V=5, W=1)]
SIZES += [dict(H=1, HV=2, K=130, V=70, W=5)]  # columns in two slices
NEAR = dict(rtol=1e-4, atol=1e-5)
BETA = pytest.mark.parametrize("beta_scale", [1.0, 2.0])


@pytest.fixture(autouse=True)
def where_kernels_run():
    """All that a test draws is on the GPU, if there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def drawn(T, H, HV, K, V, W, dtype=torch.float32):
    """Inputs of a step before its pools, and the two pools."""
    C = 2 * H * K + HV * V
    time = torch.randn(B, T, C), torch.randn(B, T, 2 * HV), torch.randn(B, T, HV, V)
    constant = torch.randn(C, W), torch.randn(HV), torch.randn(HV) - 1, torch.randn(V)
    inputs = [x.to(dtype) for x in (*time, *constant)]
    return inputs, torch.randn(SLOTS, W - 1, C).to(dtype), torch.randn(SLOTS, HV, K, V)


def some(inputs, rows):
    return [x[rows] if n < 3 else x for n, x in enumerate(inputs)]


@BETA
@pytest.mark.parametrize("sizes", SIZES)
def test_is_its_parts(sizes, beta_scale):
    """The definition, in fp64, where nothing is rounded between them."""
    inputs, past, state = drawn(5, **sizes, dtype=torch.float64)
    qkv, ba, gate, filters, a_log, dt_bias, weight = inputs
    starts, past, state = torch.rand(B, 5) < 0.3, past[:B], state[:B].double()
    y, window, last = delta_step_reference(*inputs, past, state, starts, EPS, beta_scale)
    mixed, expected_window = short_conv_reference(qkv, filters, past, starts)
    ready = delta_inputs_reference(mixed, ba, a_log, dt_bias, sizes["H"], sizes["K"], beta_scale)
    o, expected = gated_delta_rule_reference(*ready, state, starts)
    torch.testing.assert_close(y, gated_rms_norm_reference(o, gate, weight, EPS))
    torch.testing.assert_close((window, last), (expected_window, expected))


@pytest.mark.parametrize("T, beta_scale", [(1, 1.0), (5, 2.0)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("sizes", SIZES)
def test_is_the_definition(sizes, backend, T, beta_scale):
    """On the states that the index names, with documents that start inside; nothing else in the pools is touched."""
    inputs, conv_pool, pool = drawn(T, **sizes)
    index, starts, before = (
        torch.tensor(INDEX),
        torch.rand(B, T) < 0.3 if T > 1 else None,
        (conv_pool.clone(), pool.clone()),
    )
    live = index >= 0
    slots = index[live]
    for x in inputs[:3]:
        x[~live] = torch.nan
    with use_backend(backend):
        y = delta_step_(*inputs, conv_pool, pool, index, starts, eps=EPS, beta_scale=beta_scale)
    expected = delta_step_reference(
        *some(inputs, live), *(x[slots] for x in before), None if starts is None else starts[live], EPS, beta_scale
    )
    torch.testing.assert_close((y[live], conv_pool[slots], pool[slots]), expected, **NEAR)
    assert not y[~live].any()
    others = [n for n in range(SLOTS) if n not in INDEX]
    assert torch.equal(conv_pool[others], before[0][others]) and torch.equal(pool[others], before[1][others])


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_same_bits_alone_and_token_by_token(sizes):
    inputs, conv_pool, pool = drawn(3, **sizes)
    alone, single = (conv_pool.clone(), pool.clone()), (conv_pool.clone(), pool.clone())
    index = torch.tensor(INDEX)
    with use_backend("triton"):
        y = delta_step_(*inputs, conv_pool, pool, index, eps=EPS)
        for n in (0, 2):
            assert torch.equal(delta_step_(*some(inputs, [n]), *alone, index[[n]], eps=EPS), y[[n]])
        steps = [[x[:, t : t + 1] if n < 3 else x for n, x in enumerate(inputs)] for t in range(3)]
        one = [delta_step_(*step, *single, index, eps=EPS) for step in steps]
    assert torch.equal(torch.cat(one, dim=1), y)
    for pair in (alone, single):
        assert torch.equal(pair[0], conv_pool) and torch.equal(pair[1], pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """All is in fp32 but what comes in and goes out."""
    inputs, conv_pool, pool = drawn(4, **SIZES[0], dtype=dtype)
    wide = [x.float() for x in inputs]
    y, window, state = delta_step_reference(*wide, conv_pool[:B].clone(), pool[:B].clone(), None, EPS, 1.0)
    with use_backend("triton"):
        got = delta_step_(*inputs, conv_pool, pool, eps=EPS)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), y, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close((conv_pool[:B], pool[:B]), (window, state), **NEAR)


def test_beyond_the_pools():
    inputs, conv_pool, pool = drawn(2, **SIZES[0])
    with use_backend("triton"):
        y = delta_step_(*inputs, conv_pool, pool, torch.tensor([SLOTS, -1, 1]), eps=EPS)
    assert y[0].isnan().all() and not y[1].any() and y[2:].isfinite().all()


def test_bad_input_is_named():
    inputs, conv_pool, pool = drawn(2, **SIZES[0])
    qkv, ba, gate, filters, a_log, dt_bias, weight = inputs
    bad = {
        "ba: expected shape": (qkv, ba[..., :-1], gate, filters, a_log, dt_bias, weight, conv_pool, pool),
        "qkv: expected 4 . 19 channels": (
            qkv[..., :-1],
            ba,
            gate,
            filters[:-1],
            a_log,
            dt_bias,
            weight,
            conv_pool,
            pool,
        ),
        "filters: expected": (qkv, ba, gate, filters[:, 0], a_log, dt_bias, weight, conv_pool, pool),
        "weight: expected shape": (*inputs[:-1], weight[1:], conv_pool, pool),
        "conv_pool: expected shape": (*inputs, conv_pool[:, 1:], pool),
        "conv_pool: expected pool's 6 slots, got 7": (*inputs, conv_pool, pool[:6]),
        "pool: expected torch.float32": (*inputs, conv_pool, pool.double()),
        "pool: expected .slots, 4, K, 19": (*inputs, conv_pool, pool[0]),
        "filters: expected no gradient": (*inputs[:3], filters.clone().requires_grad_(), *inputs[4:], conv_pool, pool),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=f"delta_step_: {message}"):
            delta_step_.__wrapped__(*arguments, eps=EPS)
    with pytest.raises(ValueError, match="delta_step_: beta_scale: expected 1 or 2, got 0.5"):
        delta_step_(*inputs, conv_pool, pool, eps=EPS, beta_scale=0.5)


@BETA
def test_the_layer_decodes_by_it(monkeypatch, beta_scale):
    """Prefill by the parts, then steps of one and more tokens, of which one begins a document: as on a CPU."""
    layer = GatedDeltaNet(16, num_key_heads=2, num_value_heads=4, key_width=6, value_width=10, beta_scale=beta_scale)
    x, starts, cuts = torch.randn(2, 21, 16), torch.zeros(2, 21, dtype=torch.bool), ((0, 17), (17, 18), (18, 21))
    starts[1, 19] = True

    def decoded():
        state, outputs = layer.init_state(2, device=x.device, dtype=x.dtype), []
        for a, b in cuts:
            y, state = layer(x[:, a:b], Span(torch.arange(a, b).expand(2, -1), starts=starts[:, a:b]), state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    with torch.no_grad():
        expected = decoded()
        monkeypatch.setitem(dispatch.FAST, "cpu", ("triton",))  # the CPU is taken for a GPU
        started = []
        with instead(lambda this: (started.append(this.kernel.fn.__name__), run(this))):
            torch.testing.assert_close(decoded(), expected, **NEAR)
    assert started[-2:] == ["delta_steps"] * 2 and started.count("delta_steps") == 2


TRACED = """
import torch
from seqzoo.kernels.delta_step import delta_step_
from seqzoo.kernels.dispatch import use_backend

torch.manual_seed(0)
H, HV, K, V, W = 1, 2, 4, 5, 4
C = 2 * H * K + HV * V
time = torch.rand(3, 2, C), torch.rand(3, 2, 2 * HV), torch.rand(3, 2, HV, V)
constant = torch.rand(C, W), torch.rand(HV), torch.rand(HV), torch.rand(V)
index, starts = torch.tensor([4, -1, 2]), torch.rand(3, 2) < 0.3

def run(conv_pool, pool, *inputs):
    delta_step_(*inputs, conv_pool, pool, index, starts, eps=1e-6)
    return delta_step_(*inputs, conv_pool, pool, index, starts, eps=1e-6) + 1

pools = torch.rand(6, W - 1, C), torch.rand(6, HV, K, V)
again = [x.clone() for x in pools]
with use_backend("triton"):
    traced = torch.compile(run, backend="aot_eager", fullgraph=True)(*pools, *time, *constant)
    torch.testing.assert_close(traced, run(*again, *time, *constant))
torch.testing.assert_close(list(pools), again)
"""


def test_compiles():
    """Traced into one graph, both pools written to; in a process without the type checks of tests."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
