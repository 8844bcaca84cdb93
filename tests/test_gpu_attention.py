"""causal_attention by PyTorch's own kernels: the definition in every way of looking, and masks of blocks that miss
nothing.

On a CPU flex_attention runs as its formula, which knows the mask of single pairs only; the blocks are tested apart.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from test_attention_op import LOW, SHAPES, TOLERANCE, Largest, case, compare, documents, values_and_grads
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.testing import assert_close

from seqzoo.kernels.causal_attention import block_mask as masks
from seqzoo.kernels.causal_attention import causal_attention, flex
from seqzoo.kernels.causal_attention.op import BACKENDS
from seqzoo.kernels.dispatch import choose, use_backend

PLAIN = ["short", "odd", "window wider than all", "all are sinks", "past, short"]  # causal without a mask, or none
FEW = [
    *("one query", "one query in a window", "few queries, many keys", "few queries in a window"),
    *("documents, few queries", "documents, one query", "sinks, few queries in a window", "sinks, some queries"),
    *("sinks, one query in a window", "sinks, documents, few queries", "sinks, documents, one query"),
]
MASKED = [
    *("window 1", "window 100", "past", "past in a window", "documents", "documents in a window"),
    *("documents, past, window", "sinks and a wider window", "sinks and past", "sinks, past, window"),
    *("sinks, documents in a window", "sinks among the queries", "one key head of nine, past"),
]
COMPILED = [  # on a GPU, where every kind of mask takes seconds to compile
    *("window 100", "past in a window", "documents, past, window", "sinks, documents in a window", "as in training"),
]
COMPILED_EXACT = [("documents in a window", torch.float32), ("as in training", torch.float32)]
OURS = {
    "as in training": (2, 4, 2, 500, 500, 64, 64, 200, 150),
    "past, short": (2, 4, 2, 96, 100, 6, 5, None, None, 4),
    "sinks, some queries": (1, 4, 2, 15, 300, 16, 24, 50, None, 100),
    "one key head of nine, past": (1, 9, 1, 45, 60, 8, 6, None, None),
}
shapes = pytest.mark.parametrize("shape", [*PLAIN, *FEW, *MASKED])


@pytest.fixture(autouse=True)
def on_a_cpu(request, monkeypatch):
    """As on a GPU, but for the kernel: uncompiled, and with gradients, which torch refuses on a CPU."""
    for name, shape in OURS.items():
        monkeypatch.setitem(SHAPES, name, shape)
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
        monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@shapes
def test_is_the_definition(shape):
    inputs, seen = case(shape, torch.float64)
    ours, truth = (values_and_grads(name, inputs, seen) for name in ("flex", "reference"))
    compare(ours, truth, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape, way", [(x, w) for w, xs in dict(sdpa=PLAIN + FEW, flex=MASKED).items() for x in xs])
def test_flex_only_where_it_must(shape, way, monkeypatch):
    ran = []
    whole = flex._flex
    monkeypatch.setattr(flex, "_flex", lambda *args: ran.append("flex") or whole(*args))
    inputs, seen = case(shape, torch.float32)
    with use_backend("flex"):
        causal_attention(*inputs, **seen)
    assert ran == ["flex"] * (way == "flex")


@LOW
@pytest.mark.parametrize("shape", ["odd", "documents, few queries", "sinks, documents in a window"])
def test_is_near_the_definition(dtype, shape):
    inputs, seen = case(shape, dtype)
    ours, truth = (
        values_and_grads("flex", inputs, seen),
        values_and_grads("reference", [x.double() for x in inputs], seen),
    )
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, truth, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * b.norm(), name


@pytest.mark.parametrize("T", [1, 3, 37])
def test_who_sees_nothing_reads_nothing(T):
    inputs = [torch.randn(2, n, L, 8, dtype=torch.float64) for n, L in ((4, T), (2, 50), (2, 50))]
    document = torch.zeros(2, 50, dtype=torch.int64)
    document[0] = -1
    document[1, 47:] = -1
    seen = dict(key_document=document)
    ours = values_and_grads("flex", inputs, seen)
    compare(ours, values_and_grads("reference", inputs, seen), **TOLERANCE[torch.float64])
    assert all((x[0] == 0).all() for x in ours)


MASKS = {  # T, S, window, documents, sinks
    "causal": (300, 300, None, None, 0),
    "whole blocks": (512, 512, None, None, 0),
    "window": (520, 520, 100, None, 0),
    "wide window": (700, 700, 400, None, 0),
    "past": (150, 700, None, None, 0),
    "past in a window": (150, 700, 130, None, 0),
    "documents": (700, 700, None, 60, 0),
    "large documents": (900, 900, None, 400, 0),
    "documents, window, past": (300, 700, 200, 300, 0),
    "sinks": (300, 600, 50, None, 300),
    "sinks, documents": (520, 650, None, 200, 130),
    "sinks among the queries": (300, 330, 20, 100, 150),
}


@pytest.mark.parametrize("name", MASKS)
def test_blocks_miss_nothing(name):
    """Against the mask of all pairs: what a full block holds is seen, what no block holds is not; both ways round."""
    T, S, window, mean, sinks = MASKS[name]
    key = None if mean is None else documents(2, S, mean)
    if key is not None:
        key[0, :20] = key[1, 500:540] = -1  # padding, and a gap
    query = None if key is None else key[:, S - T :]
    mask = masks.block_mask(T, S, window, query, key, sinks, torch.device("cpu"))
    B = 1 if key is None else 2
    b, i, j = torch.arange(B)[:, None, None], torch.arange(T)[:, None], torch.arange(S)
    pairs = mask.mask_mod(b, torch.zeros_like(b), i, j).expand(B, T, S)
    room = (0, -S % masks.BLOCK, 0, -T % masks.BLOCK)
    tiles = torch.nn.functional.pad(pairs, room).unflatten(2, (-1, masks.BLOCK)).unflatten(1, (-1, masks.BLOCK))
    some, all_ = tiles.any(4).any(2), tiles.all(4).all(2)  # [B, M, N]

    def dense(count, order, columns):
        there = torch.zeros(*order.shape[:2], order.shape[2], columns, dtype=torch.bool)
        return there.scatter(-1, order.long(), torch.arange(columns) < count[..., None])[:, 0]

    M, N = some.shape[1:]
    partial, full = (
        dense(mask.kv_num_blocks, mask.kv_indices, N),
        dense(mask.full_kv_num_blocks, mask.full_kv_indices, N),
    )
    assert torch.equal(partial, dense(mask.q_num_blocks, mask.q_indices, M).mT)
    assert torch.equal(full, dense(mask.full_q_num_blocks, mask.full_q_indices, M).mT)
    assert not (partial & full).any() and (full <= all_).all() and (some <= partial | full).all()
    exact = 1.0 if mean is None else 0.6  # documents may end anywhere in a block of both
    assert (some.sum() >= exact * (partial | full).sum()) and (mean is not None or torch.equal(full, all_))
    assert mask.shape[-2:] == (T, S)


def test_blocks_skip_what_is_far():
    """Work that grows with T, not with its square: three blocks of keys at most per block of queries."""
    mask = masks.block_mask(4096, 4096, 200, None, None, 0, torch.device("cpu"))
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).max() == 3
    document = torch.arange(4096)[None] // 128
    mask = masks.block_mask(4096, 4096, None, document, document, 0, torch.device("cpu"))
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).max() == 1


@pytest.mark.parametrize("mean", [None, 100], ids=["one document", "documents"])
def test_blocks_take_little_memory(mean):
    document = None if mean is None else documents(1, 4096, mean)
    with Largest() as seen:
        masks.block_mask(4096, 4096, 16, document, document, 0, torch.device("cpu"))
    assert seen.elements <= 4096


def test_is_chosen_on_a_gpu():
    table, cuda = list(BACKENDS), torch.device("cuda")
    assert choose(table, tokens=9, device=cuda) == "flex" and choose(table, tokens=1, device=cuda) == "flex"
    q = torch.zeros(1, 1, 2, 8)
    assert flex.takes(q, q) and flex.takes(q.bfloat16(), q) and not flex.takes(q.double(), q)
    assert not flex.takes(q, torch.zeros(1, 1, 2, 300))


TRACED = """
import warnings
import torch
import torch.nn.attention.flex_attention as torch_flex
from seqzoo.kernels.causal_attention import causal_attention
from seqzoo.kernels.causal_attention.flex import _compiled
from seqzoo.kernels.dispatch import use_backend

torch.manual_seed(0)
torch_flex._validate_device = lambda *_: None
_compiled(4, 0, True, False)  # torch.compile takes what is asked of it
document = torch.tensor([[0] * 9 + [1] * 31, [0] * 40])
for T, S, how in (
    (37, 40, dict(key_document=document, window=7)),
    (3, 40, dict(key_document=document)),
):
    leaves = [torch.randn(2, n, L, W, requires_grad=True) for n, L, W in ((4, T, 8), (2, S, 8), (2, S, 6))]
    def run(*x):
        return causal_attention(*x, **how).square().sum()
    with use_backend("flex"):
        traced = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
    with use_backend("reference"):
        direct = run(*leaves)
    torch.testing.assert_close(traced, direct)
    torch.testing.assert_close(torch.autograd.grad(traced, leaves), torch.autograd.grad(direct, leaves))
"""


def test_compiles():
    """Traced into one graph, the mask's blocks with it."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_is_wrapped_around_what_is_compiled():
    """The type checks of tests cannot be traced, on a GPU neither."""
    traced = [flex._flex, *(getattr(masks, name) for name in ("block_mask", "seen_by", "blocks", "extremes", "listed"))]
    assert not any(hasattr(f, "__wrapped__") for f in traced)
    seen = masks.seen_by(3, 3, None, None, None, 0, torch.device("cpu"))
    assert not hasattr(seen, "__wrapped__")


def test_what_is_compiled_in():
    """Lengths and the batch become symbols where they change; heads, widths, the window and the scale never do."""
    found = []

    def look(graph, _):
        (node,) = (n for n in graph.graph.nodes if "flex_attention" in str(n.target))
        shapes = [x.meta["example_value"].shape for x in node.args[:3]]
        found.append((node.args[5], *((x[1], x[3]) for x in shapes), isinstance(shapes[0][2], torch.SymInt)))
        return graph.forward

    torch._dynamo.reset()
    traced = torch.compile(flex._flex, backend=look, fullgraph=True)
    for H, G, T, K, V, window in ((4, 2, 41, 20, 16, 50), (6, 2, 43, 6, 5, 32), (6, 3, 61, 25, 40, 7)):
        q, k, v = torch.randn(1, H, T, K), torch.randn(1, G, 2 * T, K), torch.randn(1, G, 2 * T, V)
        document = torch.zeros(1, 2 * T, dtype=torch.int32)
        traced(q, k, v, window, document[:, T:], document, 0)
    sizes = [[(4, 20), (2, 20), (2, 16)], [(6, 16), (2, 16), (2, 16)], [(6, 25), (3, 25), (3, 40)]]
    scales = [20**-0.5, 6**-0.5, 25**-0.5]
    assert found == [(scale, *size, n > 0) for n, (scale, size) in enumerate(zip(scales, sizes, strict=True))]
    assert all(is_concrete_int(x) for _, *size, _ in found for pair in size for x in pair)
    assert all(type(scale) is float for scale, *_ in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "shape, dtype", [(x, torch.bfloat16) for x in PLAIN + FEW + COMPILED] + COMPILED_EXACT, ids=str
)
def test_on_a_gpu(shape, dtype):
    """The compiled kernels, forward and backward, beside the definition in float64; nothing waits for the device."""
    inputs, seen = case(shape, dtype)
    B, H, _, T, _, _, V, *_ = SHAPES[shape]
    cotangent = torch.randn(B, H, T, V).to(dtype)
    truth = values_and_grads("reference", [x.double() for x in inputs], seen, cotangent.double())
    seen = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in seen.items()}
    inputs, cotangent = [x.cuda() for x in inputs], cotangent.cuda()
    for mode in ("default", "error"):  # the second time all is compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            ours = values_and_grads("flex", inputs, seen, cotangent)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, truth, strict=True):
        if name in ("o", "dv") or not (SHAPES[shape][4] == 1 or seen["window"] == 1):
            assert (a.double().cpu() - b).norm() < (2e-2 if dtype == torch.bfloat16 else 2e-3) * b.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_lengths_are_not_compiled_anew():
    """A second length makes the graph's sizes symbols; a third and a fourth find it ready."""
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    counts = []
    for T in (256, 320, 384, 1000, 4096):
        q, k, v = (torch.randn(1, n, T, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
        with use_backend("flex"):
            BACKENDS["flex"](q, k, v, 100)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[1], counts


def test_two_ways_to_say_the_same_window():
    inputs, _ = case("short", torch.float64)
    assert_close(values_and_grads("flex", inputs, dict(window=13)), values_and_grads("flex", inputs, dict()))
