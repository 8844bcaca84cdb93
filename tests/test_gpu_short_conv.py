"""The short convolution in Triton: a row depends on no other, cuts anywhere are nothing, steps keep to their slots."""

from inspect import unwrap

import pytest
import torch
from test_gpu_small_ops import HERE, SMALL, same
from test_small_ops import conv
from torch.testing import assert_close

from seqzoo.kernels import gpu
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gpu.tables import using
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.short_conv.step import short_conv_step_

pytestmark = pytest.mark.skipif(not gpu.usable(), reason="no triton")


@pytest.fixture(autouse=True)
def where_kernels_run():
    with torch.device(HERE):
        yield


@pytest.fixture
def small_blocks():
    forward, backward = ((op, kernel) for op, kernel in SMALL if op == "short_conv")
    with using(*forward, SMALL[forward]), using(*backward, SMALL[backward]):
        yield


def values_and_grads_of(fn, x, weight, past, starts):
    """y, the next past, and the gradients of x and past, for dy = y and no gradient of the next past."""
    x, past = (t.detach().clone().requires_grad_() for t in (x, past))
    y, last = fn(x, weight, past, starts)
    return y, last, *torch.autograd.grad(y, (x, past), y.detach())


def test_conv_of_a_row_depends_on_no_other(small_blocks):
    """A row alone and in a batch, a document alone and packed: outputs and the gradients of inputs are the same."""
    backends, (x, weight, past), (starts,) = conv(3, 9, 6, 4, documents=True)
    run = lambda x, past, starts: values_and_grads_of(backends["triton"], x, weight, past, starts)
    whole = run(x, past, starts)
    for row in (slice(0, 1), slice(2, 3)):
        same(run(x[row], past[row], starts[row]), [t[row] for t in whole])
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[0, 5] = True
    y, last, dx, dpast = run(x[:1], past[:1], starts)
    y1, _, dx1, dpast1 = run(x[:1, :5], past[:1], None)
    y2, last2, dx2, _ = run(x[:1, 5:], torch.zeros_like(past[:1]), None)
    same([y, last, dx, dpast], [torch.cat([y1, y2], 1), last2, torch.cat([dx1, dx2], 1), dpast1])


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_conv_cut_anywhere(cut, small_blocks):
    """The next past is all there is to remember."""
    backends, (x, weight, past), (starts,) = conv(2, 9, 5, 4, documents=True)
    fn = backends["triton"]
    whole, end = fn(x, weight, past, starts)
    first, middle = fn(x[:, :cut], weight, past, starts[:, :cut])
    second, last = fn(x[:, cut:], weight, middle, starts[:, cut:])
    same([torch.cat([first, second], dim=1), last], [whole, end])


STEPS = [(1, 4, "some"), (3, 4, "all"), (5, 3, "some"), (2, 1, "some")]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("T, W, named", STEPS)
def test_conv_step(T, W, named, backend):
    """As the op on the slots that are named; of the others, and of a row without a slot, nothing is touched."""
    x, weight, pool = torch.randn(3, T, 9), torch.randn(9, W), torch.randn(5, W - 1, 12)[..., 2:-1]
    starts = torch.rand(3, T) < 0.3 if T > 1 else None
    index = torch.tensor([3, -1, 0], dtype=torch.int32) if named == "some" else None
    rows, slots = ([0, 2], [3, 0]) if named == "some" else ([0, 1, 2], [0, 1, 2])
    expected, after = torch.zeros_like(x), pool.clone()
    marks = None if starts is None else starts[rows]
    expected[rows], after[slots] = short_conv(x[rows], weight, pool[slots], marks)
    with use_backend(backend):
        y = short_conv_step_(x, weight, pool, index, starts)
    assert_close(y, expected, atol=1e-6, rtol=1e-5)
    assert_close(pool, after, atol=0, rtol=0)


def test_conv_step_beyond_the_pool():
    x, pool = torch.randn(2, 1, 4), torch.randn(2, 3, 4)
    with use_backend("triton"):
        y = short_conv_step_(x, torch.randn(4, 4), pool, torch.tensor([2, 1]))
    assert y[0].isnan().all() and y[1].isfinite().all()


def wrong_steps():
    x, w, pool = torch.zeros(2, 3, 8), torch.zeros(8, 4), torch.zeros(5, 3, 8)
    step = unwrap(short_conv_step_)
    yield "x: expected .* T of 1 to 16, got", lambda: step(torch.zeros(2, 17, 8), w, pool)
    yield "weight: expected shape", lambda: step(x, w[:7], pool)
    yield "pool: expected shape", lambda: step(x, w, pool[:, 1:])
    yield "pool: expected a slot for each of 2 rows", lambda: step(x, w, pool[:1])
    yield "pool: expected channels side by side", lambda: step(x, w, pool.mT.contiguous().mT)
    yield "index: expected torch.int64, got torch.float32", lambda: step(x, w, pool, torch.zeros(2))
    yield "index: expected shape", lambda: step(x, w, pool, torch.zeros(3, dtype=torch.int64))
    yield "weight: expected no gradient to be recorded", lambda: step(x, w.clone().requires_grad_(), pool)


@pytest.mark.parametrize("message", [message for message, _ in wrong_steps()])
def test_conv_step_errors(message):
    with pytest.raises(ValueError, match=f"short_conv_step_: {message}"):
        dict(wrong_steps())[message]()
