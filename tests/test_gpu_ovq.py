"""OVQ attention read by Triton kernels, all chunks at once: the definition, in outputs, states and every gradient."""

import dataclasses
import os
import subprocess
import sys
from contextlib import contextmanager
from inspect import unwrap

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqzoo.kernels.dispatch import choose, use_backend
from seqzoo.kernels.gpu import usable
from seqzoo.kernels.gpu.traffic import counting
from seqzoo.kernels.ovq_attention import OVQRule, OVQState, gpu, layout, ovq_attention
from seqzoo.kernels.ovq_attention.op import BACKENDS
from seqzoo.kernels.ovq_attention.read import InTurn

CLOSE = dict(atol=2e-5, rtol=2e-4)
RULE = OVQRule(chunk=4, slots=5)
# B, T, query heads, key heads, K, V, marks ("packed", "state" or none), options of the rule
CASES = {
    "plain": (2, 11, 2, 1, 3, 5, "", {}),
    "grouped": (1, 9, 6, 2, 24, 40, "", {}),
    "packed": (2, 14, 2, 1, 6, 5, "packed", {}),
    "state": (1, 14, 2, 2, 5, 7, "state", {}),
    "packed, state": (2, 11, 2, 1, 4, 6, "packed state", {}),
    "no counts": (1, 9, 2, 1, 6, 5, "", dict(log_count=False)),
    "norms": (1, 13, 2, 1, 6, 5, "", dict(norm_correction=True)),
    "unit length": (1, 13, 2, 1, 6, 5, "", dict(renormalise=True, similarity="cosine", step=0.3)),
    "detached": (1, 13, 2, 1, 6, 5, "", dict(detach=True)),
    "several blocks": (1, 170, 1, 1, 4, 6, "", dict(chunk=80, slots=70, schedule="min")),
    "values beyond 128": (1, 9, 2, 1, 40, 144, "", dict(norm_correction=True)),
    "one chunk": (1, 7, 2, 1, 3, 5, "", dict(chunk=50)),
}


pytestmark = pytest.mark.skipif(not usable(), reason="no triton")


@pytest.fixture(autouse=True)
def interpreted(request):
    """On a GPU, only what is written for one."""
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu") is None:
        pytest.skip("for Triton's interpreter")


def drawn(B, T, H, G, K, V, dtype=torch.float32):
    q, k = (F.normalize(torch.randn(B, T, heads, K), dim=-1) for heads in (H, G))
    return [x.to(dtype) for x in (q, k, torch.randn(B, T, G, V))] + [0.5 + torch.rand(H) * 3]


def marks(B, T):
    """Documents that begin inside a chunk, one behind another, and behind padding."""
    starts, valid = torch.zeros(B, T, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    starts[0, [2, 9]], starts[-1, 0], starts[-1, T - 3] = True, True, True
    valid[0, :2] = False
    return starts, valid


def everything(backend, inputs, rule, how, gradients=True):
    """Outputs, the state after, and the gradients of all inputs, through the state where there is one."""
    leaves = [x.detach().clone().requires_grad_(gradients) for x in inputs]
    q, k, v, scale = leaves
    B, T, G, V = v.shape
    seen = marks(B, T) if "packed" in how else (None, None)
    fn = BACKENDS[backend]
    if "state" not in how:
        outputs = [fn(*leaves, rule, None, *seen)[0]]
    else:
        state = OVQState.empty(B, G, q.shape[-1], V, rule, device="cpu", dtype=v.dtype)
        pieces = []
        for a, b in ((0, 6), (6, 7), (7, T)):
            here = [None if x is None else x[:, a:b] for x in seen]
            o, state = fn(q[:, a:b], k[:, a:b], v[:, a:b], scale, rule, state, *here)
            pieces.append(o)
        outputs = [torch.cat(pieces, dim=1), state.memory, state.counts, state.tokens]
    if not gradients:
        return outputs
    torch.manual_seed(1)
    learned = [y for y in outputs if y.requires_grad]
    weights = [torch.randn(y.shape).to(y.dtype) for y in learned]
    return [*outputs, *torch.autograd.grad(learned, leaves, weights)]


def setting(name, dtype=torch.float32):
    *sizes, how, options = CASES[name]
    return drawn(*sizes, dtype), dataclasses.replace(RULE, **options), how


@pytest.mark.parametrize("name", CASES)
def test_is_the_definition(name):
    inputs, rule, how = setting(name)
    ours, truth = (everything(backend, inputs, rule, how) for backend in ("triton", "torch"))
    for a, b in zip(ours, truth, strict=True):
        assert a.isfinite().all()
        assert_close(a, b, **CLOSE)
    if name in ("plain", "packed, state", "norms"):  # torch's own is held against the definition elsewhere
        for a, b in zip(ours, everything("reference", inputs, rule, how), strict=True):
            assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    """In the norm, beside fp32 on the same (rounded) numbers; dtypes stay."""
    inputs, rule, how = setting("grouped", dtype)
    ours = everything("triton", inputs, rule, how)
    truth = everything("torch", [x.float() for x in inputs], rule, how)
    for a, b, x in zip(ours, truth, [inputs[2], *inputs], strict=True):
        assert a.dtype == x.dtype
        assert (a.float() - b).norm() < (2e-2 if dtype == torch.bfloat16 else 3e-3) * b.norm()


def test_the_same_alone_and_in_a_batch():
    """To the bit, gradients too."""
    (*time, scale), rule, _ = setting("plain")
    whole = everything("triton", [*time, scale], rule, "")
    alone = everything("triton", [*(x[1:] for x in time), scale], rule, "", gradients=False)
    assert_close(alone[0], whole[0][1:], atol=0, rtol=0)
    torch.manual_seed(0)
    weight = torch.randn(whole[0].shape)
    found = []
    for rows in (slice(None), slice(1, None)):
        leaves = [x[rows].clone().requires_grad_() for x in time]
        o, _ = BACKENDS["triton"](*leaves, scale, rule)
        found.append(torch.autograd.grad(o, leaves, weight[rows]))
    for both, one in zip(*found, strict=True):
        assert_close(both[1:], one, atol=0, rtol=0)


def test_the_same_alone_and_packed():
    """A document of 18 tokens and one of 5, in a row and each by itself: the same bits, gradients too."""
    *time, scale = drawn(1, 23, 2, 1, 6, 5)
    starts = torch.zeros(1, 23, dtype=torch.bool)
    starts[0, 18] = True
    weight = torch.randn(1, 23, 2, 5)

    def run(a, b, seen):
        leaves = [x[:, a:b].clone().requires_grad_() for x in time]
        o, _ = BACKENDS["triton"](*leaves, scale, OVQRule(chunk=20, slots=5), None, seen)
        return [o, *torch.autograd.grad(o, leaves, weight[:, a:b])]

    whole = run(0, 23, starts)
    first = run(0, 18, None)
    for x, y in zip(whole, first, strict=True):
        assert_close(x[:, :18], y, atol=0, rtol=0)


@pytest.mark.parametrize("C, new", [(1, 1), (33, 9), (60, 20), (40, 40)])
def test_first_slots(C, new):
    """Chosen in one program as by torch, also where likenesses are equal."""
    k = torch.randint(-2, 3, (2, 3, C, 4)).float()
    likeness = k @ k.mT
    assert torch.equal(gpu.farthest(likeness, new), InTurn.farthest(likeness, new))


@torch.no_grad()
def test_few_memories_wait_without_gradients(monkeypatch):
    """Read in several pieces: the same bits, state too."""
    inputs, rule, _ = setting("packed")
    for how in ("", "packed"):
        whole = everything("triton", inputs, rule, how, gradients=False)
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "MANY", 20)
            with recording_reads(patch) as reads:
                pieces = everything("triton", inputs, rule, how, gradients=False)
        assert len(reads) > 1
        assert_close(pieces, whole, atol=0, rtol=0)


@contextmanager
def recording_reads(patch):
    reads, read = [], gpu.read
    patch.setattr(gpu, "read", lambda *args: reads.append(len(args[0])) or read(*args))
    yield reads


def test_no_scores_are_kept():
    """For backward: inputs, outputs, each chunk's memory once. Nothing of tokens times slots."""
    (q, k, v, scale), rule, _ = setting("several blocks")
    leaves = [x.requires_grad_() for x in (q, k, v, scale)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        BACKENDS["triton"](*leaves, rule)
    assert max(t.numel() for t in kept.values()) < 170 * 70


def test_traffic():
    """Queries and outputs once; memory and tokens once for every strip of rows that reads them."""
    *time, scale = drawn(1, 64, 2, 1, 32, 16, torch.bfloat16)
    rule = OVQRule(chunk=32, slots=32, schedule="min")
    leaves = [x.requires_grad_() for x in time]
    with counting() as counts:
        o, _ = BACKENDS["triton"](*leaves, scale, rule)
        torch.autograd.grad(o.sum(), leaves)
    rows, keys = (
        2 * 64,
        2 * 32,
    )  # of queries; the tokens of two chunks, of which the first one's are slots of the second
    read = rows * (2 * 32 + 4) + rows * (2 * 16 + 4) + (keys + 32) * 2 * 48 + 32 * 4
    assert counts["joint_read"].moved - 2 * 8 * 8 == read
    assert counts["joint_read"].flops == 2 * 3 * 64 * 64 * (32 + 16)  # three blocks of 64 rows and 64 keys


def test_marks_are_looked_up_once(monkeypatch):
    """For all layers with the same tensors; what changed in place, or has another chunk, is another thing."""
    looked = []
    whole = layout.documents
    monkeypatch.setattr(layout, "documents", lambda *args: looked.append(args[1]) or whole(*args))
    (q, k, v, scale), (starts, valid) = drawn(2, 14, 2, 1, 6, 5), marks(2, 14)
    run = lambda chunk: BACKENDS["torch"](q, k, v, scale, OVQRule(chunk=chunk, slots=5), None, starts, valid)[0]
    first, again = run(4), run(4)
    assert torch.equal(first, again) and looked == [4]
    run(3), run(4)
    starts[0, 5] = True
    changed = run(4)
    assert looked == [4, 3, 4, 4]
    assert_close(changed, BACKENDS["reference"](q, k, v, scale, OVQRule(chunk=4, slots=5), None, starts, valid)[0])


STARTED = """
from seqzoo.kernels.gpu import recording
from seqzoo.kernels.gpu.examples import on_meta
from seqzoo.kernels.ovq_attention import gpu

with recording() as launches:
    for _, call in gpu.examples(on_meta):
        call()
free = {p.name for x in launches for p in x.kernel.params if p.do_not_specialize}
assert free == {"strips", "C", "new"}, free
"""


def test_lengths_compile_once():
    """Numbers that follow the call are no constants of a kernel; asked of compiled kernels, which nothing runs."""
    environment = os.environ | dict(TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_is_chosen_on_a_gpu():
    x = torch.zeros(1, 2, 1, 8)
    able = lambda name: name == "triton" and gpu.runs(x.bfloat16(), x.bfloat16())
    assert choose(BACKENDS, tokens=2, device=torch.device("cuda"), able=able) == "triton"
    assert not gpu.runs(x, x) and not gpu.runs(torch.zeros(1, 2, 1, 300).bfloat16(), x.bfloat16())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(v=torch.zeros(1, 9, 2, 4, dtype=torch.float64)), "triton: expected float32, bfloat16 or float16, got"),
        (dict(v=torch.zeros(1, 9, 2, 257)), "backend triton: expected heads at most 256 wide, got 24 and 257"),
    ],
    ids=["dtype", "width"],
)  # fmt: skip
def test_errors_name_the_argument(change, message):
    inputs = dict(zip(("q", "k", "v", "scale"), setting("grouped")[0], strict=True)) | change
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        unwrap(ovq_attention)(**inputs, rule=RULE)


TRACED = """
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.ovq_attention import OVQRule, ovq_attention

torch.manual_seed(0)
shapes = dict(q=(1, 11, 2, 6), k=(1, 11, 1, 6), v=(1, 11, 1, 5), scale=(2,))
for learns in (True, False):
    leaves = [torch.rand(shape).requires_grad_(learns) for shape in shapes.values()]
    run = lambda *x: ovq_attention(*x, OVQRule(chunk=4, slots=5))[0].square().sum()
    with use_backend("triton"):
        traced, direct = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves), run(*leaves)
    torch.testing.assert_close(traced, direct)
    if learns:
        torch.testing.assert_close(torch.autograd.grad(traced, leaves), torch.autograd.grad(direct, leaves))
"""


def test_compiles():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (24, 40), (128, 192)])
def test_on_a_gpu(K, V, norms, dtype):
    """Beside fp32 on a CPU; the second time nothing waits for the device, and the bits are the same."""
    rule = OVQRule(chunk=128, slots=200, norm_correction=norms)
    inputs = drawn(2, 700, 8, 2, K, V, dtype)
    leaves = [x.float().requires_grad_() for x in inputs]
    o, _ = BACKENDS["torch"](*leaves, rule)
    weight = torch.randn(o.shape)
    truth = [o, *torch.autograd.grad(o, leaves, weight)]
    found = []
    for mode in ("default", "error"):
        leaves = [x.cuda().requires_grad_() for x in inputs]
        given = weight.cuda().to(dtype)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            o, _ = BACKENDS["triton"](*leaves, rule)
            found.append([o, *torch.autograd.grad(o, leaves, given)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, again, b in zip(*found, truth, strict=True):
        assert torch.equal(a, again)
        assert (a.float().cpu() - b).norm() < (4e-2 if dtype == torch.bfloat16 else 5e-3) * b.norm()
