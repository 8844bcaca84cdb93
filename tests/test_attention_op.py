"""The laws of causal_attention: every backend is the definition, in output and every gradient, whatever is seen."""

from inspect import unwrap

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.kernels import native
from seqzoo.kernels.causal_attention import causal_attention as checked
from seqzoo.kernels.causal_attention.cpp import _differentiable
from seqzoo.kernels.causal_attention.op import BACKENDS
from seqzoo.kernels.dispatch import use_backend

causal_attention = unwrap(checked)  # without the type checker of the tests, which would come before the op's own errors
TOLERANCE = {torch.float64: dict(atol=1e-10, rtol=1e-8), torch.float32: dict(atol=1e-5, rtol=1e-4)}
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # norm of the error over the norm
ROUGH = 2  # times that for torch, which rounds one query's scores to bf16
cpp = pytest.param("cpp", marks=pytest.mark.skipif(not native.available(), reason="no C++ compiler"))
every = pytest.mark.parametrize("backend", ["torch", cpp])
DTYPE = {"torch": torch.float64, "cpp": torch.float32}
LOW = pytest.mark.parametrize("dtype", RELATIVE, ids=str)

# B, H, G, T, S, K, V, window, tokens per document, sinks (none where not said)
SHAPES = {
    "one token": (2, 4, 2, 1, 1, 5, 7, None, None),
    "short": (2, 4, 2, 13, 13, 5, 7, None, None),
    "odd": (1, 6, 2, 131, 131, 33, 21, None, None),
    "values wider": (1, 2, 2, 70, 70, 16, 40, None, None),
    "one key head of nine": (1, 9, 1, 45, 45, 8, 6, None, None),
    "several tiles": (1, 4, 2, 261, 261, 64, 32, None, None),
    "wide heads": (1, 4, 1, 99, 99, 136, 128, None, None),
    "window 1": (2, 4, 2, 37, 37, 6, 5, 1, None),
    "window 4": (1, 4, 2, 203, 203, 6, 5, 4, None),
    "window 100": (1, 4, 2, 333, 333, 24, 16, 100, None),
    "window wider than all": (2, 4, 2, 37, 37, 6, 5, 400, None),
    "past": (2, 4, 2, 37, 210, 6, 5, None, None),
    "past in a window": (1, 4, 2, 41, 239, 20, 16, 100, None),
    "past, long": (1, 4, 1, 300, 500, 20, 16, None, None),
    "few queries, many keys": (2, 4, 2, 3, 1300, 33, 21, None, None),
    "some queries, many keys": (1, 4, 2, 17, 1300, 16, 12, 1100, None),
    "one query": (2, 4, 2, 1, 700, 33, 21, None, None),
    "one query, many heads": (1, 12, 1, 1, 700, 33, 21, None, None),
    "one query in a window": (2, 4, 2, 1, 700, 16, 24, 100, None),
    "few queries in a window": (2, 4, 2, 3, 700, 16, 24, 100, None),
    "documents, few queries": (2, 4, 2, 4, 400, 16, 24, 150, 60),
    "documents": (2, 4, 2, 257, 257, 6, 5, None, 20),
    "documents of a token or two": (2, 4, 2, 130, 130, 6, 5, None, 1.5),
    "documents in a window": (2, 4, 2, 257, 257, 6, 5, 9, 30),
    "documents and past": (2, 4, 2, 60, 300, 6, 5, None, 25),
    "documents, past, window": (1, 6, 2, 90, 300, 6, 5, 32, 50),
    "documents, one query": (2, 4, 2, 1, 900, 6, 5, None, 300),
    "sinks": (2, 4, 2, 37, 48, 6, 5, None, None, 11),
    "sinks, several tiles": (1, 6, 2, 150, 281, 33, 21, None, None, 131),
    "sinks and a window": (2, 4, 2, 203, 208, 6, 5, 4, None, 5),
    "sinks and a wider window": (1, 4, 2, 333, 464, 24, 16, 100, None, 131),
    "sinks and past": (1, 4, 2, 60, 210, 6, 5, None, None, 30),
    "sinks, past, window": (1, 6, 2, 90, 700, 6, 5, 32, None, 101),
    "sinks, one query": (2, 4, 2, 1, 700, 33, 21, None, None, 40),
    "sinks, one query in a window": (2, 4, 2, 1, 1400, 16, 24, 100, None, 130),
    "sinks, one query in a window wider than all": (2, 4, 2, 1, 60, 16, 24, 100, None, 13),
    "sinks, few queries in a window": (2, 4, 2, 3, 700, 16, 24, 50, None, 3),
    "sinks, some queries in a window": (1, 4, 2, 15, 1500, 16, 24, 50, None, 100),
    "sinks, documents": (2, 4, 2, 257, 270, 6, 5, None, 20, 13),
    "sinks, documents in a window": (2, 4, 2, 257, 377, 6, 5, 9, 30, 120),
    "sinks, documents, past, window": (1, 6, 2, 90, 300, 6, 5, 32, 50, 60),
    "sinks, documents, few queries": (2, 4, 2, 2, 600, 6, 5, 32, 50, 200),
    "sinks, documents, one query": (2, 4, 2, 1, 600, 6, 5, None, 50, 7),
    "sinks among the queries": (2, 4, 2, 60, 70, 6, 5, 3, 20, 31),
    "all are sinks": (2, 4, 2, 130, 130, 6, 5, None, None, 130),
    "all are sinks, few queries": (2, 4, 2, 2, 2, 6, 5, None, None, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def documents(B, S, mean):
    """Numbers that go up at random places, other ones in each row."""
    return (torch.rand(B, S) < 1 / mean).long().cumsum(1)


def case(shape, dtype):
    B, H, G, T, S, K, V, window, mean, *sinks = SHAPES[shape]
    q, k, v = (torch.randn(B, n, L, width).to(dtype) for n, L, width in ((H, T, K), (G, S, K), (G, S, V)))
    document = None if mean is None else documents(B, S, mean)
    return (2 * q, k, v), dict(window=window, key_document=document, sinks=sum(sinks))


def values_and_grads(backend, inputs, seen, cotangent=None):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with use_backend(backend):
        o = causal_attention(*leaves, **seen)
    torch.manual_seed(1)
    cotangent = torch.randn(o.shape).to(o.dtype) if cotangent is None else cotangent
    return [o, *torch.autograd.grad(o, leaves, cotangent)]


def compare(ours, truth, **tolerance):
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, truth, strict=True):
        assert_close(a, b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@shapes
@every
def test_is_the_definition(backend, shape):
    inputs, seen = case(shape, DTYPE[backend])
    ours, truth = (values_and_grads(name, inputs, seen) for name in (backend, "reference"))
    compare(ours, truth, **TOLERANCE[DTYPE[backend]])


@shapes
@LOW
@every
def test_is_near_the_definition(backend, dtype, shape):
    """In the norm, against float64 on the same (rounded) numbers; and without gradients the same bits."""
    inputs, seen = case(shape, dtype)
    ours, truth = (
        values_and_grads(backend, inputs, seen),
        values_and_grads("reference", [x.double() for x in inputs], seen),
    )
    one_key = SHAPES[shape][4] == 1 or seen["window"] == 1  # dq and dk are zero but for rounding
    limit = RELATIVE[dtype] * (ROUGH if backend == "torch" else 1)
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, truth, strict=True):
        assert a.dtype == dtype
        if name in ("o", "dv") or not one_key:
            assert (a.double() - b).norm() < limit * b.norm(), name
    with torch.no_grad(), use_backend(backend):
        assert_close(causal_attention(*inputs, **seen), ours[0], atol=0, rtol=0)


def test_the_definition_is_a_softmax():
    """By hand: two tokens, two query heads on one key head."""
    q, k, v = torch.randn(1, 2, 2, 3), torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 4)
    with use_backend("reference"):
        o = causal_attention(q, k, v)
    assert_close(o[0, :, 0], v[0, 0, :1].expand(2, -1))
    for h in range(2):
        weight = ((q[0, h, 1] @ k[0, 0].T) / 3**0.5).exp()
        assert_close(o[0, h, 1], (weight / weight.sum()) @ v[0, 0])


@every
def test_hidden_keys_change_nothing(backend):
    """Keys of -1, here padding on the left and a gap: not one bit, in outputs and gradients; theirs is zero."""
    inputs, _ = case("past", DTYPE[backend])
    document = torch.zeros(2, 210, dtype=torch.int64)
    document[0, :100] = document[1, :3] = document[1, 120:150] = -1
    seen = dict(query_document=document[:, -37:], key_document=document)
    ours = values_and_grads(backend, inputs, seen)
    hidden = (document < 0)[:, None, :, None]
    changed = values_and_grads(backend, [inputs[0], *(x.masked_fill(hidden, 50.0) for x in inputs[1:])], seen)
    compare(changed, ours, atol=0, rtol=0)
    compare(ours, values_and_grads("reference", inputs, seen), **TOLERANCE[DTYPE[backend]])
    assert all((x.masked_select(hidden) == 0).all() for x in ours[2:])


@pytest.mark.parametrize("shape", ["past", "past in a window", "short", "one query"])
@every
def test_who_sees_nothing_reads_nothing(backend, shape):
    """Padding that nobody sees, itself not either: zeros, and zero gradients, never NaN."""
    inputs, seen = case(shape, DTYPE[backend])
    B, _, _, T, S, *_ = SHAPES[shape]
    document = torch.zeros(B, S, dtype=torch.int64)
    document[0] = -1
    document[-1, S - 2 :] = -1
    seen |= dict(key_document=document)
    ours = values_and_grads(backend, inputs, seen)
    compare(ours, values_and_grads("reference", inputs, seen), **TOLERANCE[DTYPE[backend]])
    assert all((x[0] == 0).all() for x in ours) and (ours[0][-1, :, -1] == 0).all()


@every
def test_sinks_are_seen_by_all(backend):
    """By a query that sees nothing else, beyond the window, in another document, and whatever number they have."""
    inputs, seen = case("sinks, documents in a window", DTYPE[backend])
    document = seen["key_document"]
    document[0, -10:] = -1  # queries of no document
    ours = values_and_grads(backend, inputs, seen)
    compare(ours, values_and_grads("reference", inputs, seen), **TOLERANCE[DTYPE[backend]])
    q, k, v = inputs
    with use_backend("reference"):
        alone = causal_attention(q[:1, :, -10:], k[:1, :, :120], v[:1, :, :120], sinks=120)
    assert_close(ours[0][:1, :, -10:], alone, **TOLERANCE[DTYPE[backend]])
    for number in (-1, 0, 7, torch.arange(120)):
        queries, document = document[:, -257:], document.clone()
        document[:, :120] = number
        other = values_and_grads(backend, inputs, seen | dict(query_document=queries, key_document=document))
        compare(other, ours, **TOLERANCE[DTYPE[backend]])


@every
def test_documents_in_any_order(backend):
    """Numbers need not go up: a document may go on after another one, and in the queries only."""
    inputs, _ = case("short", DTYPE[backend])
    document = torch.tensor([[0, 0, 3, 3, 0, 1, 1, 0, 3, 3, 2, 0, 1], [5, 4, 4, 5, 5, 5, 0, 0, 4, 4, 5, 0, 2]])
    for seen in (dict(key_document=document), dict(key_document=document, window=5)):
        ours, truth = (values_and_grads(name, inputs, seen) for name in (backend, "reference"))
        compare(ours, truth, **TOLERANCE[DTYPE[backend]])


@every
def test_one_query_over_a_ring(backend):
    """The query's own key need not be the last one, nor that one be seen."""
    inputs, _ = case("one query", DTYPE[backend])
    key = torch.where(torch.rand(2, 700) < 0.5, 0, -1)
    key[:, -1] = -1
    seen = dict(query_document=torch.zeros(2, 1, dtype=torch.int64), key_document=key)
    o = values_and_grads(backend, inputs, seen)[0]
    for row in range(2):
        q, k, v = (x[row : row + 1] for x in inputs)
        there = key[row] == 0
        with use_backend("reference"):
            want = causal_attention(q, k[:, :, there], v[:, :, there])
        assert_close(o[row : row + 1], want, **TOLERANCE[DTYPE[backend]])


@LOW
@every
def test_large_scores(backend, dtype):
    """Far beyond what e^x holds."""
    (q, k, v), _ = case("several tiles", dtype)
    truth = values_and_grads("reference", [(200 * q).double(), k.double(), v.double()], {})[0]
    o = values_and_grads(backend, [200 * q, k, v], {})[0]
    assert (o.double() - truth).norm() < 10 * RELATIVE[dtype] * truth.norm()


@pytest.mark.parametrize(
    "shape", ["several tiles", "one query", "past in a window", "documents", "sinks, documents in a window"]
)
@LOW
@every
def test_strides(backend, dtype, shape):
    """A layer's views, a piece of a larger buffer, one row for all: the same bits as contiguous ones."""
    inputs, seen = case(shape, dtype)
    whole = values_and_grads(backend, inputs, seen)
    with use_backend(backend):
        for change in (
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            lambda x: torch.cat([x, x], dim=-1)[..., x.shape[-1] :],
            lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
            lambda x: x.mT.contiguous().mT,
        ):
            leaves = [change(x).requires_grad_() for x in inputs]
            o = causal_attention(*leaves, **seen)
            torch.manual_seed(1)
            cotangent = change(torch.randn(o.shape).to(dtype))
            strict = dict(atol=0, rtol=0) if backend == "cpp" else dict(atol=2e-2, rtol=2e-2)
            compare([o, *torch.autograd.grad(o, leaves, cotangent)], whole, **strict)
        q, k, v = (x[:1] for x in inputs)
        seen = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in seen.items()}
        same = causal_attention(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), **{
            name: x.expand(3, -1) if isinstance(x, torch.Tensor) else x for name, x in seen.items()
        })  # fmt: skip
        assert_close(same[2:], causal_attention(q, k, v, **seen))


@every
def test_a_gradient_without_strides(backend):
    """What `sum` sends back."""
    inputs, seen = case("odd", DTYPE[backend])
    ones = torch.ones(1, 6, 131, 21, dtype=DTYPE[backend])
    bare = values_and_grads(backend, inputs, seen, ones[:, :1, :1, :1].expand(1, 6, 131, 21))
    compare(bare, values_and_grads(backend, inputs, seen, ones))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
@every
def test_gradients_of_some(backend, wanted):
    inputs, seen = case("documents", DTYPE[backend])
    whole = values_and_grads(backend, inputs, seen)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    with use_backend(backend):
        o = causal_attention(*leaves, **seen)
    torch.manual_seed(1)
    grads = torch.autograd.grad(o, [leaves[i] for i in wanted], torch.randn(o.shape).to(o.dtype))
    for i, grad in zip(wanted, grads, strict=True):
        assert_close(grad, whole[1 + i])


@pytest.mark.parametrize("shape", ["several tiles", "documents in a window", "few queries, many keys"])
@LOW
@every
def test_two_runs_are_the_same_bits(backend, dtype, shape):
    inputs, seen = case(shape, dtype)
    compare(*(values_and_grads(backend, inputs, seen) for _ in range(2)), atol=0, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        *("several tiles", "window 100", "one query", "few queries, many keys", "documents"),
        *("sinks and a wider window", "sinks, some queries in a window", "sinks, one query in a window"),
    ],
)
@LOW
@pytest.mark.parametrize("backend", [cpp])
def test_the_same_alone_in_a_batch_and_on_more_threads(backend, dtype, shape):
    """Outputs and dq to the bit; dk and dv are sums whose number of parts follows the threads."""
    (q, k, v), seen = case(shape, dtype)
    threads = torch.get_num_threads()
    many = [x.repeat_interleave(5, dim=0) for x in (q, k, v)]
    documents = seen["key_document"]
    batch = seen | dict(key_document=None if documents is None else documents.repeat_interleave(5, dim=0))
    torch.manual_seed(1)
    cotangent = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    truth = values_and_grads(backend, (q, k, v), seen, cotangent)
    try:
        for n in (1, 3, 7):
            torch.set_num_threads(n)
            for inputs, how, w in ((many, batch, cotangent.repeat_interleave(5, dim=0)), ((q, k, v), seen, cotangent)):
                ours = [x[:: x.shape[0] // q.shape[0]] for x in values_and_grads(backend, inputs, how, w)]
                assert_close(ours[:2], truth[:2], atol=0, rtol=0)
                for a, b in zip(ours[2:], truth[2:], strict=True):
                    assert (a.double() - b.double()).norm() < RELATIVE[dtype] * b.double().norm()
    finally:
        torch.set_num_threads(threads)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize("sinks", [0, 40])
@pytest.mark.parametrize("mean", [None, 100], ids=["one document", "documents"])
@every
def test_memory_grows_with_the_window_only(backend, mean, sinks):
    """Nothing as large as T x T: the largest tensor, forward and backward, doubles when T does."""
    largest = []
    for T in (1024, 2048):
        q, k, v = (torch.randn(1, n, L, 4) for n, L in ((2, T), (1, sinks + T), (1, sinks + T)))
        document = None if mean is None else documents(1, sinks + T, mean)
        with Largest() as seen:
            values_and_grads(backend, (q, k, v), dict(window=16, key_document=document, sinks=sinks))
        largest.append(seen.elements)
    assert largest[1] <= 2.2 * largest[0] and largest[1] < 2048 * 2048 / 8, largest


@pytest.mark.parametrize("sinks", [0, 40])
@every
def test_packed_documents_make_no_mask(backend, sinks):
    q, k, v = (torch.randn(1, n, L, 4) for n, L in ((2, 2048), (1, sinks + 2048), (1, sinks + 2048)))
    with Largest() as seen:
        values_and_grads(backend, (q, k, v), dict(key_document=documents(1, sinks + 2048, 200), sinks=sinks))
    assert seen.elements < 2048 * 2048 / 8


def test_the_memory_test_can_fail():
    q, k, v = (torch.randn(1, n, 2048, 4) for n in (2, 1, 1))
    with Largest() as seen, torch.no_grad(), use_backend("reference"):
        causal_attention(q, k, v, window=16)
    assert seen.elements >= 2048 * 2048


@pytest.mark.parametrize("backend", [cpp])
def test_traces_as_an_operator(backend):
    """Schema, shapes and strides without running, gradients: what torch.compile relies on."""
    inputs, _ = case("documents", torch.float32)
    document = documents(2, 257, 20)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(
        _differentiable,
        (*leaves, 9, 3, document, document, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("backend", [cpp])
def test_runs_by_itself_on_a_cpu(backend, monkeypatch):
    """Float32 and bfloat16 go to C++ without being asked to, everything else to torch."""
    ran = []
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, lambda *args, f=BACKENDS[name], name=name: ran.append(name) or f(*args))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        causal_attention(*case("short", dtype)[0])
    assert ran == ["cpp", "cpp", "torch", "torch"]


def test_autocast():
    """As torch's own attention: what comes in is rounded."""
    inputs, _ = case("short", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = causal_attention(inputs[0], inputs[1].bfloat16(), inputs[2])
    assert o.dtype == torch.bfloat16
    assert_close(o, causal_attention(*(x.bfloat16() for x in inputs)), atol=0, rtol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(k=torch.zeros(2, 2, 13, 6)), r"k: expected shape \(2, 2, 13, 5\), got \(2, 2, 13, 6\)"),
        (dict(v=torch.zeros(2, 2, 12, 7)), r"v: expected shape \(2, 2, 13, 7\), got"),
        (dict(q=torch.zeros(2, 4, 14, 5)), "q: expected 1 to S=13 queries, got 14"),
        (dict(q=torch.zeros(2, 4, 0, 5)), "q: expected 1 to S=13 queries, got 0"),
        (dict(q=torch.zeros(2, 3, 13, 5)), "q: expected a multiple of the keys' 2 heads, got 3"),
        (dict(window=0), "window: expected None or 1 and more tokens, got 0"),
        (dict(sinks=14), "sinks: expected 0 to S=13 keys, got 14"),
        (dict(sinks=-1), "sinks: expected 0 to S=13 keys, got -1"),
        (
            dict(query_document=torch.zeros(2, 13, dtype=torch.int64)),
            "key_document: expected one beside query_document",
        ),
        (
            dict(key_document=torch.zeros(2, 12, dtype=torch.int64)),
            r"key_document: expected shape \(2, 13\), got \(2, 12\)",
        ),
        (
            dict(v=torch.zeros(2, 2, 13, 7, dtype=torch.bfloat16)),
            "v: expected q's dtype torch.float32, got torch.bfloat16",
        ),
    ],
    ids=lambda x: x.split(":")[0] if isinstance(x, str) else "",
)
def test_errors_name_the_argument(wrong, message):
    q, k, v = case("short", torch.float32)[0]
    with pytest.raises(ValueError, match=message):
        causal_attention(**(dict(q=q, k=k, v=v) | wrong))


def test_a_backend_that_cannot_run_is_refused():
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected float32 or bfloat16 on a CPU, got"):
        causal_attention(*case("short", torch.float64)[0])
    with use_backend("triton"), pytest.raises(ValueError, match="expected a backend of this op"):
        causal_attention(*case("short", torch.float32)[0])
