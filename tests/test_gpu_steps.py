"""Decoding from a pool of states: every step in place is its op's definition on the states it names, and no other."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from seqzoo.kernels.gated_delta_rule.step import gated_delta_rule_step_
from seqzoo.kernels.kimi_delta_rule.reference import kimi_delta_rule_reference
from seqzoo.kernels.kimi_delta_rule.step import kimi_delta_rule_step_
from seqzoo.kernels.linear_attention.reference import linear_attention_reference
from seqzoo.kernels.linear_attention.step import linear_attention_step_
from seqzoo.kernels.momentum_delta_rule.reference import momentum_delta_rule_reference
from seqzoo.kernels.momentum_delta_rule.step import momentum_delta_rule_step_
from seqzoo.kernels.strict_linear_attention.reference import strict_linear_attention_reference
from seqzoo.kernels.strict_linear_attention.step import strict_linear_attention_step_

B = 3
SLOTS = 7
INDEX = [5, -1, 0]  # shuffled, and a row without a slot


@pytest.fixture(autouse=True)
def where_kernels_run():
    """All that a test draws is on the GPU, if there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def normal(*shape):
    return torch.randn(*shape)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def decay(*shape):
    return F.logsigmoid(torch.randn(*shape))


def forgets(*shape):
    """Log decays, some of which forget everything."""
    return torch.where(torch.randn(*shape) > 1, -torch.inf, -torch.rand(*shape))


def weight(*shape):
    return torch.rand(*shape)


DELTA, LINEAR = (
    (gated_delta_rule_step_, gated_delta_rule_reference),
    (linear_attention_step_, linear_attention_reference),
)
MOMENTUM = momentum_delta_rule_step_, momentum_delta_rule_reference
KIMI = kimi_delta_rule_step_, kimi_delta_rule_reference
STRICT = strict_linear_attention_step_, strict_linear_attention_reference


def delta(H, HV, K, V):
    return dict(q=(normal, H, K), k=(unit, H, K), v=(normal, HV, V), g=(decay, HV), beta=(weight, HV)), (HV, K, V)


def kimi(H, K, V, g):
    return dict(q=(normal, H, K), k=(unit, H, K), v=(normal, H, V), g=(g, H, K), beta=(weight, H)), (H, K, V)


def linear(H, G, K, V, g=None):
    return dict(q=(normal, H, K), k=(unit, G, K), v=(normal, G, V)) | ({"g": g} if g else {}), (G, K, V)


def momentum(H, HP, HV, K, V):
    heads = dict(log_alpha=(decay, HV), log_mu=(decay, HV), beta=(weight, HV), eta=(weight, HV))
    return dict(q=(normal, H, K), k=(unit, H, K), v=(normal, HV, V), p=(unit, HP, K)) | heads, (HV, 2, K, V)


def strict(H, G, N, D):
    return dict(r=(unit, H, N), v=(normal, G, D)), (H, N, D)


ROWS = {  # step and definition; how each input is drawn; shape of a state; arguments after `starts`
    "gated_delta_rule": (*DELTA, *delta(2, 4, K=7, V=19), ()),
    "gated_delta_rule-odd": (*DELTA, *delta(1, 2, K=24, V=40), ()),
    "gated_delta_rule-wide": (*DELTA, *delta(1, 1, K=200, V=33), ()),
    "kimi_delta_rule": (*KIMI, *kimi(2, K=24, V=40, g=decay), ()),
    "kimi_delta_rule-wide": (*KIMI, *kimi(1, K=200, V=19, g=forgets), ()),
    "linear_attention": (*LINEAR, *linear(2, 2, K=5, V=8), ()),
    "linear_attention-head": (*LINEAR, *linear(6, 2, K=24, V=40, g=(decay, 2)), ()),
    "linear_attention-channel": (*LINEAR, *linear(3, 1, K=200, V=19, g=(forgets, 1, 200)), ()),
    "momentum_delta_rule": (*MOMENTUM, *momentum(2, 4, 4, K=7, V=19), ()),
    "momentum_delta_rule-wide": (*MOMENTUM, *momentum(1, 1, 2, K=130, V=40), ()),
    "strict_linear_attention": (*STRICT, *strict(4, 2, N=10, D=18), (torch.tensor([0.0, -0.01, -0.3, -5.0]),)),
    "strict_linear_attention-wide": (*STRICT, *strict(1, 1, N=300, D=40), ()),
}
BACKENDS = ("triton", "torch")


def drawn(name, T, dtype=torch.float32):
    """Time inputs and a pool for the row; its step and definition, and what they take after `starts`."""
    step, definition, inputs, state, rest = ROWS[name]
    time = {key: draw(B, T, *shape) for key, (draw, *shape) in inputs.items()}
    time = {key: x.to(dtype) if key in "qkvrp" else x for key, x in time.items()}
    if step is linear_attention_step_:
        time.setdefault("g", None)
    pool = torch.randn(SLOTS, *state)
    return time, pool, step, definition, [x.to(pool.device) for x in rest]


def picked(time, rows):
    return [None if x is None else x[rows] for x in time.values()]


@pytest.mark.parametrize("T", [1, 2, 16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ROWS)
def test_is_the_definition(name, backend, T):
    """On the states that the index names, with documents that start inside; nothing else in the pool is touched."""
    if T == 16 and "wide" in name:
        T = 3  # the interpreter is slow
    time, pool, step, definition, rest = drawn(name, T)
    index, starts, before = torch.tensor(INDEX, dtype=torch.int32 if T == 2 else torch.int64), None, pool.clone()
    if T > 1:
        starts = torch.rand(B, T) < 0.3
    live = index >= 0
    time = {
        key: None if x is None else torch.where(live.view(B, *(1,) * (x.ndim - 1)), x, torch.nan)
        for key, x in time.items()
    }
    with use_backend(backend):
        o = step(*time.values(), pool, index, starts, *rest)
    slots = index[live].long()
    wanted, states = definition(*picked(time, live), before[slots], None if starts is None else starts[live], *rest)
    torch.testing.assert_close(o[live], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool[slots], states, rtol=1e-4, atol=1e-5)
    assert not o[~live].any()
    others = [n for n in range(SLOTS) if n not in INDEX]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "linear_attention-head", "momentum_delta_rule", "strict_linear_attention"]
)
def test_no_index_is_every_row_its_own_slot(name, backend):
    time, pool, step, definition, rest = drawn(name, 2)
    before = pool.clone()
    with use_backend(backend):
        o = step(*time.values(), pool, None, None, *rest)
    wanted, states = definition(*time.values(), before[:B], None, *rest)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool[:B], states, rtol=1e-4, atol=1e-5)
    assert torch.equal(pool[B:], before[B:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_has_a_slot(backend):
    time, pool, step, _, _ = drawn("gated_delta_rule", 2)
    before = pool.clone()
    with use_backend(backend):
        assert not step(*time.values(), pool, torch.full((B,), -1)).any()
    assert torch.equal(pool, before)


@pytest.mark.parametrize("name", ROWS)
def test_same_bits_alone_and_token_by_token(name):
    """A row gets the bits it gets alone, whatever its slot; T tokens those of T steps of one."""
    time, pool, step, _, rest = drawn(name, 3)
    alone, single = pool.clone(), pool.clone()
    index = torch.tensor(INDEX)
    with use_backend("triton"):
        o = step(*time.values(), pool, index, None, *rest)
        for n in (0, 2):
            assert torch.equal(step(*picked(time, [n]), alone, index[n : n + 1], None, *rest), o[n : n + 1])
        one = [
            step(*(None if x is None else x[:, t : t + 1] for x in time.values()), single, index, None, *rest)
            for t in range(3)
        ]
    assert torch.equal(torch.cat(one, dim=1), o)
    assert torch.equal(alone, pool) and torch.equal(single, pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "linear_attention-head", "momentum_delta_rule", "strict_linear_attention-wide"]
)
def test_sixteen_bits(name, dtype):
    """Inputs in 16 bits are read as they are, the states stay in fp32."""
    time, pool, step, definition, rest = drawn(name, 4, dtype)
    wide = [None if x is None else x.float() for x in time.values()]
    wanted, states = definition(*wide, pool[:B].clone(), None, *rest)
    with use_backend("triton"):
        o = step(*time.values(), pool, None, None, *rest)
    assert o.dtype == dtype
    torch.testing.assert_close(o.float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(pool[:B], states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "linear_attention-head", "momentum_delta_rule", "strict_linear_attention"]
)
def test_strides(name):
    """Inputs that are views into wider tensors, and a pool whose slots stand apart, as one layer's of many."""
    time, pool, step, definition, rest = drawn(name, 3)
    wanted, states = definition(*time.values(), pool[:B].clone(), None, *rest)
    layers = torch.full((SLOTS, 2, *pool.shape[1:]), torch.nan)
    layers[:, 1] = pool
    apart = [torch.cat([x, x], dim=1)[:, :3] if x.ndim == 4 else x.mT.contiguous().mT for x in time.values()]
    with use_backend("triton"):
        o = step(*apart, layers[:, 1], None, None, *rest)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers[:B, 1], states, rtol=1e-4, atol=1e-5)
    assert layers[:, 0].isnan().all()


def test_beyond_the_pool():
    time, pool, step, _, _ = drawn("gated_delta_rule", 2)
    before, index = pool.clone(), torch.tensor([SLOTS, -1, 1])
    with use_backend("triton"):
        o = step(*time.values(), pool, index)
    assert o[0].isnan().all() and not o[1].any() and o[2:].isfinite().all()
    assert torch.equal(pool[[0, 2, 3, 4, 5, 6]], before[[0, 2, 3, 4, 5, 6]])
    if not torch.cuda.is_available():  # where torch's own check ends the process's use of the GPU
        with use_backend("torch"), pytest.raises(IndexError):
            step(*time.values(), before, index)


@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "linear_attention-head", "momentum_delta_rule", "strict_linear_attention"]
)
def test_bad_input_is_named(name):
    time, pool, step, _, _ = drawn(name, 2)
    index, first, key = torch.tensor(INDEX), next(iter(time)), step.__name__
    wide = {n: x.repeat(1, 9, *(1,) * (x.ndim - 2)) for n, x in time.items()}
    learns = {n: x.clone().requires_grad_() for n, x in time.items()}
    for arguments, message in (
        ((*wide.values(), pool), f"{first}: expected at most 16 tokens, got 18"),
        ((*time.values(), pool[0]), "pool: expected .slots, "),
        ((*time.values(), pool[:0]), "pool: expected .slots, "),
        ((*time.values(), pool[..., :-1].contiguous()), "pool: expected shape"),
        ((*time.values(), pool.double()), "pool: expected torch.float32, got torch.float64"),
        ((*time.values(), pool[..., :1].expand_as(pool)), "pool: expected slots that are contiguous"),
        ((*time.values(), pool[:1].expand_as(pool)), "pool: expected slots that are contiguous"),
        ((*time.values(), pool[:2]), "pool: expected a slot for each of 3 rows, got 2"),
        ((*time.values(), pool, index[:2]), "index: expected shape .3,., got .2,."),
        ((*time.values(), pool, index.short()), "index: expected torch.int64, got torch.int16"),
        ((*learns.values(), pool), f"{first}: expected no gradient"),
        ((*time.values(), pool.clone().requires_grad_()), "pool: expected no gradient"),
    ):
        with pytest.raises(ValueError, match=f"{key}: {message}"):
            inspect.unwrap(step)(*arguments)  # without the shapes of its signature, which only tests check
    with torch.no_grad():
        step(*learns.values(), pool)


TRACED = """
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gated_delta_rule.step import gated_delta_rule_step_
from seqzoo.kernels.linear_attention.step import linear_attention_step_
from seqzoo.kernels.momentum_delta_rule.step import momentum_delta_rule_step_
from seqzoo.kernels.strict_linear_attention.step import strict_linear_attention_step_

torch.manual_seed(0)
qk, v, head = [torch.rand(3, 2, 2, 4) / 2 for _ in range(3)], torch.rand(3, 2, 2, 5), torch.rand(4, 3, 2, 2) - 1
index, starts = torch.tensor([4, -1, 2]), torch.rand(3, 2) < 0.3
calls = {
    gated_delta_rule_step_: ((*qk[:2], v, head[0], -head[1]), (2, 4, 5)),
    linear_attention_step_: ((*qk[:2], v, head[0]), (2, 4, 5)),
    momentum_delta_rule_step_: ((*qk[:2], v, qk[2], *head[:2], *-head[2:]), (2, 2, 4, 5)),
    strict_linear_attention_step_: ((qk[0], v), (2, 4, 5)),
}
cases = [("triton", step, (index, starts)) for step in calls]
cases += [("triton", gated_delta_rule_step_, ()), ("torch", linear_attention_step_, (index,))]
for backend, step, more in cases:
    time, state = calls[step]
    def run(pool, *time):
        step(*time, pool, *more)
        return step(*time, pool, *more) + 1
    pool = torch.randn(6, *state)
    again = pool.clone()
    with use_backend(backend):
        torch._dynamo.reset()
        traced = torch.compile(run, backend="aot_eager", fullgraph=True)(pool, *time)
        torch.testing.assert_close(traced, run(again, *time))
    torch.testing.assert_close(pool, again)
"""


def test_compiles():
    """Traced into one graph, the pool written to; in a process without the type checks of tests."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
