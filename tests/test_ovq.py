"""OVQ attention: its definition, what it equals where nothing is merged, what its memory holds, and what is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import traced
from torch.testing import assert_close

from seqzoo.kernels import native
from seqzoo.kernels.causal_attention.reference import causal_attention_reference
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.ovq_attention import OVQRule, OVQState, ovq_attention
from seqzoo.kernels.ovq_attention.op import BACKENDS
from seqzoo.layers.registry import build
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM

B, T, H, G, K, V = 2, 23, 4, 2, 3, 5
EXACT = dict(atol=1e-10, rtol=1e-8)
RULE = OVQRule(chunk=4, slots=6)
RULES = {
    "default": {},
    "min": dict(schedule="min", slots=9),
    "linear": dict(schedule="linear", horizon=11),
    "shared": dict(first_chunk="shared"),
    "cosine": dict(similarity="cosine"),
    "random": dict(choice="random"),
    "step": dict(step=0.3),
    "no counts": dict(log_count=False),
    "norms": dict(norm_correction=True),
    "renormalised": dict(renormalise=True),
    "detached": dict(detach=True),
    "one slot": dict(slots=1),
    "more slots than can be filled": dict(slots=100),
    "chunk of one": dict(chunk=1),
    "one chunk": dict(chunk=50),
}
EXACT_BACKENDS = ["reference", "torch"]  # those that know float64
NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
backends = pytest.mark.parametrize("backend", EXACT_BACKENDS[1:])
all_backends = pytest.mark.parametrize("backend", [*EXACT_BACKENDS, pytest.param("cpp", marks=NEEDS_COMPILER)])
every_rule = pytest.mark.parametrize("rule", [dataclasses.replace(RULE, **x) for x in RULES.values()], ids=RULES)


def inputs(T=T, B=B, G=G, dtype=torch.float64):
    """q, k, v, scale."""
    q, k = (F.normalize(torch.randn(B, T, heads, K, dtype=torch.float64), dim=-1) for heads in (H, G))
    return [x.to(dtype) for x in (q, k, torch.randn(B, T, G, V, dtype=torch.float64), 0.5 + torch.rand(H) * 3)]


def empty(rule, B=B, dtype=torch.float64):
    return OVQState.empty(B, G, K, V, rule, device="cpu", dtype=dtype)


def cut(x, a, b):
    q, k, v, scale = x
    return [q[:, a:b], k[:, a:b], v[:, a:b], scale]


def packed():
    """Documents that begin inside a chunk, one after another, and after padding; a row of two chunks' tokens less."""
    starts, valid = torch.zeros(B, T, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    starts[0, [2, 9, 10, 15]], starts[1, [0, 12]] = True, True
    valid[0, :2] = False
    return starts, valid


def full_attention(q, k, v, scale):
    q = q * (scale * q.shape[-1] ** 0.5)[:, None]
    return causal_attention_reference(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@backends
@every_rule
@pytest.mark.parametrize("marks", [(None, None), packed()], ids=["one document", "packed"])
@pytest.mark.parametrize("at", [None, 9], ids="cut at {}".format)
def test_is_the_definition(backend, rule, marks, at):
    """Outputs, the state, and the gradient of every input, through the state too."""
    leaves = [x.requires_grad_() for x in inputs()]
    found = []
    for name in ("reference", backend):
        fn = BACKENDS[name]
        if at is None:
            outputs = [fn(*leaves, rule, None, *marks)[0]]
        else:
            state, pieces = empty(rule), []
            for a, b in ((0, at), (at, T)):
                here = [None if x is None else x[:, a:b] for x in marks]
                o, state = fn(*cut(leaves, a, b), rule, state, *here)
                pieces.append(o)
            open_ = torch.arange(rule.chunk - 1, 0, -1) <= state.tokens[:, None] % rule.chunk
            pending = state.pending * open_[..., None, None]
            outputs = [torch.cat(pieces, dim=1), state.memory, state.counts, state.tokens, pending]
        torch.manual_seed(1)
        learned = [y for y in outputs if y.requires_grad]
        weights = [torch.randn(y.shape, dtype=y.dtype) for y in learned]
        found.append([*outputs, *torch.autograd.grad(learned, leaves, weights)])
    for ours, truth in zip(*reversed(found), strict=True):
        assert ours.isfinite().all()
        assert_close(ours, truth, **EXACT)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize(
    "rule",
    [OVQRule(chunk=4, slots=T, schedule="min"), OVQRule(chunk=T, slots=3), OVQRule(chunk=8, slots=90, schedule="min")],
    ids=["a slot for every token", "one chunk", "more slots than tokens"],
)
def test_nothing_merged_is_full_attention(backend, rule):
    leaves, found = [x.requires_grad_() for x in inputs()], []
    weights = torch.randn(B, T, H, V, dtype=torch.float64)
    for fn in (lambda *x: BACKENDS[backend](*x, rule)[0], full_attention):
        o = fn(*leaves)
        found.append([o, *torch.autograd.grad(o, leaves, weights)])
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, **EXACT)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("first_chunk, same", [("farthest", True), ("shared", False)])
def test_few_distinct_keys(backend, first_chunk, same):
    """Means of equal keys are those keys, and counts their number: full attention, if each slot begins with its own."""
    q, _, v, scale = inputs(T=64)
    k = F.normalize(torch.randn(5, K, dtype=torch.float64), dim=-1)[torch.randint(5, (B, 64, G))]
    o, _ = BACKENDS[backend](q, k, v, scale, OVQRule(chunk=16, slots=24, first_chunk=first_chunk))
    assert torch.allclose(o, full_attention(q, k, v, scale), **EXACT) == same


@backends
@every_rule
def test_the_memory_holds_all_tokens(backend, rule):
    """Counts sum to the tokens merged, and means times counts to their keys and values."""
    time = inputs()
    _, state = BACKENDS[backend](*time, rule, empty(rule))
    merged = T // rule.chunk * rule.chunk
    assert (state.tokens == T).all() and (state.counts.sum(-1) == merged).all()
    assert ((state.counts > 0).sum(-1) == rule.used(merged)).all()
    assert state.memory.isfinite().all() and not state.memory[state.counts == 0].any()
    assert torch.equal(state.pending[:, merged - T or rule.chunk :], torch.cat(time[1:3], dim=-1)[:, merged:])
    if rule.step is None:
        total = torch.cat(time[1:3], dim=-1)[:, :merged].sum(1)
        kept = (state.counts[..., None] * state.memory).sum(2)
        width = slice(K, None) if rule.renormalise else slice(None)
        assert_close(kept[..., width], total[..., width], **EXACT)
    if rule.renormalise:
        assert_close(state.memory[state.counts > 0][:, :K].norm(dim=-1).min().item(), 1.0)


@backends
@pytest.mark.parametrize("t", [0, 7, 8, 15, T - 1])
def test_causal(backend, t):
    """Whatever a token is, what comes before it keeps its very bits."""
    before, after = inputs(), inputs()
    changed = [torch.cat([a[:, :t], b[:, t:]], dim=1) for a, b in zip(before[:3], after[:3], strict=True)]
    a, b = (BACKENDS[backend](*x, before[3], RULE)[0] for x in (before[:3], changed))
    assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t], b[:, t])


@every_rule
def test_token_by_token_is_training(rule):
    """Rows that stand at different places of their chunks, one with padding before it."""
    time, (starts, valid) = inputs(), packed()
    whole, nothing = ovq_attention(*time, rule, starts=starts, valid=valid)
    state, pieces = empty(rule), []
    for t in range(T):
        marks = dict(starts=starts[:, t : t + 1], valid=valid[:, t : t + 1])
        o, state = ovq_attention(*cut(time, t, t + 1), rule, state=state, **marks)
        pieces.append(o)
    assert nothing is None
    assert_close(torch.cat(pieces, dim=1), whole, **EXACT)


@all_backends
def test_a_row_of_padding_stays(backend):
    time, valid = inputs(dtype=torch.float32), torch.tensor([[False] * 6, [True] * 6])
    _, before = BACKENDS[backend](*cut(time, 0, 11), RULE, empty(RULE, dtype=torch.float32))
    o, after = BACKENDS[backend](*cut(time, 11, 17), RULE, before, None, valid)
    assert not o[0].any()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[0], new[0])
    o, after = BACKENDS[backend](*cut(time, 11, 17), RULE, before, None, valid & False)
    assert not o.any() and all(map(torch.equal, before, after))


@backends
def test_gradients_are_right(backend):
    time = [x.requires_grad_() for x in inputs(T=11, B=1)]
    for options in ({}, dict(norm_correction=True, step=0.4), dict(renormalise=True, first_chunk="shared")):
        rule = dataclasses.replace(RULE, **options)
        assert torch.autograd.gradcheck(lambda *x, rule=rule: BACKENDS[backend](*x, rule)[0], time, fast_mode=True)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("detach", [False, True])
def test_detach_ends_gradients_at_chunks(backend, detach):
    time = [x.requires_grad_() for x in inputs()]
    o, _ = BACKENDS[backend](*time, dataclasses.replace(RULE, detach=detach))
    d_k, d_v = torch.autograd.grad(o[:, 9].sum(), time[1:3])
    assert bool(d_k[:, :8].any()) == bool(d_v[:, :8].any()) == (not detach) and d_v[:, 8:10].any()


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=NEEDS_COMPILER)])
def test_what_backward_keeps(backend):
    """A memory for each chunk, and a few times the inputs: no [T, N] scores, which would be 8 times all of it."""
    T, rule = 512, OVQRule(chunk=64, slots=256)
    q, k, v = (torch.randn(1, T, h, 2, requires_grad=True) for h in (8, 1, 1))
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        BACKENDS[backend](q, k, v, torch.ones(8), rule)[0].sum()
    scores = 8 * sum(64 * rule.used(t) for t in range(0, T, 64))
    assert sum(kept.values()) < scores / 3


@all_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    """On the same numbers as in fp32 no key goes to another slot: they are compared in fp32."""
    time = inputs(T=200, dtype=dtype)
    o, state = BACKENDS[backend](*time, RULE, empty(RULE, dtype=dtype))
    truth, exact = BACKENDS[backend](*(x.float() for x in time), RULE, empty(RULE, dtype=torch.float32))
    assert [x.dtype for x in (o, *state)] == [dtype, torch.float32, torch.float32, dtype, torch.int64]
    assert torch.equal(state.counts, exact.counts)
    assert (o.float() - truth).norm() < 5e-3 * truth.norm()


def test_autocast_and_one_token_change_nothing():
    time = inputs(dtype=torch.float32)
    o, _ = ovq_attention(*time, RULE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ovq_attention(*time, RULE)[0], o)
    with use_backend("reference"):
        assert_close(ovq_attention(*time, RULE)[0], o)
    assert_close(ovq_attention(*cut(time, 0, 1), RULE)[0], o[:, :1])


NATIVE = {name: RULES[name] for name in ("default", "min", "linear", "shared", "no counts", "one slot", "chunk of one")}
NATIVE |= {
    "more slots than can be filled": dict(slots=100),
    "larger": dict(chunk=32, slots=40),
    "one chunk": dict(chunk=90),
}


@NEEDS_COMPILER
@pytest.mark.parametrize("rule", [dataclasses.replace(RULE, **x) for x in NATIVE.values()], ids=NATIVE)
@pytest.mark.parametrize("heads, widths", [((4, 2), (3, 5)), ((3, 3), (17, 33))], ids=str)
@pytest.mark.parametrize("kind", ["one document", "packed", "in pieces", "packed in pieces"])
def test_native_is_the_definition(rule, heads, widths, kind):
    """Outputs and the gradient of every input; in pieces outputs and the state."""
    T, (H, G), (K, V) = 70, heads, widths
    q, k = (F.normalize(torch.randn(B, T, n, K), dim=-1) for n in (H, G))
    leaves = [x.requires_grad_("pieces" not in kind) for x in (q, k, torch.randn(B, T, G, V), 0.5 + torch.rand(H) * 3)]
    starts, valid = None, None
    if "packed" in kind:
        starts, valid = torch.rand(B, T) < 0.05, torch.arange(T).expand(B, -1) >= torch.tensor([[3], [0]])
    found = []
    for name in ("reference", "cpp"):
        fn, state, pieces = BACKENDS[name], None, []
        if "pieces" in kind:
            state = OVQState.empty(B, G, K, V, rule, device="cpu", dtype=torch.float32)
        for a, b in ((0, 9), (9, 10), (10, 11), (11, 39), (39, T)) if state else ((0, T),):
            marks = [None if x is None else x[:, a:b] for x in (starts, valid)]
            o, state = fn(*cut(leaves, a, b), rule, state, *marks)
            pieces.append(o)
        outputs = [torch.cat(pieces, dim=1)]
        if state is None:
            torch.manual_seed(1)
            outputs += torch.autograd.grad(outputs, leaves, torch.randn(outputs[0].shape))
        found.append([*outputs, *(state or ())[:2], *(state or ())[3:]])
    for ours, truth in zip(*reversed(found), strict=True):
        assert_close(ours, truth, atol=2e-5, rtol=1e-4)


@NEEDS_COMPILER
@pytest.mark.parametrize("options", [dict(chunk=2**33), dict(slots=2**40, schedule="min")], ids=str)
def test_native_room_is_for_the_tokens_there_are(options):
    """Not for chunks that are never full, or slots that are never used: nothing is merged in either."""
    leaves, found = [x.requires_grad_() for x in inputs(dtype=torch.float32)], []
    for fn in (lambda *x: BACKENDS["cpp"](*x, dataclasses.replace(RULE, **options))[0], full_attention):
        o = fn(*leaves)
        found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, atol=2e-5, rtol=1e-4)


@NEEDS_COMPILER
def test_native_bits():
    """The same again, on any number of threads, and for a document alone, in a batch, or packed."""
    time = [x.requires_grad_() for x in inputs(T=150, dtype=torch.float32)]
    rule, starts = dataclasses.replace(RULE, chunk=16, slots=20), torch.zeros(B, 150, dtype=torch.bool)
    starts[0, 37] = True

    def run(x, starts=None):
        o, _ = BACKENDS["cpp"](*x, rule, None, starts)
        return [y.detach() for y in (o, *torch.autograd.grad(o.square().sum(), x)[:3])]

    first, threads = run(time, starts), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, run(time, starts), first))
    finally:
        torch.set_num_threads(threads)
    for row, a, b in ((0, 0, 37), (0, 37, 150), (1, 0, 150)):
        alone = [x.detach()[row : row + 1, a:b].requires_grad_() for x in time[:3]]
        for whole, part in zip(first, run([*alone, time[3]]), strict=True):
            assert torch.equal(whole[row, a:b], part[0])


def test_native_says_what_it_cannot():
    time = inputs(dtype=torch.float32)
    with use_backend("cpp"):
        for x, rule, state in (
            (inputs(), RULE, None),
            (time, dataclasses.replace(RULE, similarity="cosine"), None),
            (time, dataclasses.replace(RULE, detach=True), None),
            ([time[0].requires_grad_(), *time[1:]], RULE, empty(RULE, dtype=torch.float32)),
        ):
            with pytest.raises(ValueError, match="ovq_attention: backend cpp: expected"):
                ovq_attention(*x, rule, state=state)


TRACED = """
import torch
import traced
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.ovq_attention import OVQRule, ovq_attention

torch.manual_seed(0)
inputs, rule = [torch.randn(2, 40, n, 8) / 3 for n in (4, 2, 2)] + [torch.ones(4)], OVQRule(chunk=16, slots=20)
for backend, starts in (("torch", None), ("cpp", None), ("cpp", torch.rand(2, 40) < 0.1)):
    leaves = [x.detach().requires_grad_() for x in inputs]
    run = lambda *x: ovq_attention(*x, rule, starts=starts)[0].square().sum()
    with use_backend(backend):
        traced.agrees(run, leaves, fullgraph=starts is None)
"""


@NEEDS_COMPILER
def test_compiles():
    """Into one graph, or around packed documents; in a process without the type checks of tests."""
    traced.passes(TRACED)


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3)], ids=["greedy", "beams"])
def test_generation_over_many_chunks(how):
    """From the state and without it, rows of one batch at different places of their chunks; beams take their memories
    with them."""
    window = dict(kind="attention", num_heads=2, num_kv_heads=1, head_width=8, window=5)
    far = dict(kind="ovq_attention", num_heads=4, num_kv_heads=2, head_width=8, chunk=4, slots=7)
    sizes = dict(hidden_size=32, vocab_size=50, num_hidden_layers=2, max_position_embeddings=128)
    mixers, channels = dict(near=window, far=far), dict(mlp=dict(kind="swiglu", width=32))
    model = SeqZooForCausalLM(SeqZooConfig(**sizes, pattern=["near/mlp", "far/mlp"], mixers=mixers, channels=channels))
    for p in model.eval().parameters():
        torch.nn.init.normal_(p, std=0.2)
    prompt, mask = torch.randint(3, 50, (3, 13)), torch.ones(3, 13, dtype=torch.int64)
    mask[0, :3], mask[2, :11] = 0, 0
    options = dict(attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, **how)
    cached, whole = (model.generate(prompt, use_cache=x, **options) for x in (True, False))
    assert torch.equal(cached, whole)


def test_schedules():
    """Table of the specification: floor(t N / (t + N))."""
    used = lambda N, *times, **more: [OVQRule(chunk=64, slots=N, **more).used(t) for t in times]
    assert used(128, 128, 512, 1024, 4096, 16384, 65536) == [64, 102, 113, 124, 127, 127]
    assert used(2048, 128, 512, 1024, 4096, 16384, 65536) == [120, 409, 682, 1365, 1820, 1985]
    assert used(128, 64, 128, 192, schedule="min") == [64, 128, 128]
    assert used(128, 0, 64, 128, 512, 4096, schedule="linear", horizon=512) == [0, 16, 32, 128, 128]
    assert used(1, 0, 64, 128) == [0, 1, 1]  # the formula says 0, which would leave the tokens nowhere to go


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_which_tokens_get_slots(backend):
    """By hand: angles on a circle."""
    turn = torch.tensor([0, 10, 90, 180, 5, 270, 180, 80], dtype=torch.float64)[:, None, None].deg2rad()
    k = torch.cat([turn.cos(), turn.sin()], dim=-1)[None]
    v = torch.arange(8.0, dtype=torch.float64).view(1, 8, 1, 1)
    rule = OVQRule(chunk=4, slots=3, schedule="min")

    def slots(first_chunk, tokens):
        options = dataclasses.replace(rule, first_chunk=first_chunk, schedule="linear", horizon=6)  # 2 slots, then 3
        start = OVQState.empty(1, 1, 2, 1, options, device="cpu", dtype=torch.float64)
        args = k[:, :tokens], k[:, :tokens], v[:, :tokens], torch.ones(1, dtype=torch.float64)
        _, state = BACKENDS[backend](*args, options, start)
        return list(zip(state.memory[0, 0, :, 2].round(decimals=9).tolist(), state.counts[0, 0].tolist(), strict=True))

    assert slots("farthest", 4) == [(1.0, 3), (3.0, 1), (0.0, 0)]  # 0, 10 and 90 degrees; 180
    assert slots("shared", 4) == [(1.0, 3), (3.0, 1), (0.0, 0)]
    assert slots("farthest", 8) == [(14 / 5, 5), (4.5, 2), (5.0, 1)]  # 5 and 80 join; 180; 270 is new
    turn[2] = torch.tensor(170.0).deg2rad()
    k = torch.cat([turn.cos(), turn.sin()], dim=-1)[None]
    assert slots("farthest", 4) == [(0.5, 2), (2.5, 2), (0.0, 0)]
    assert slots("shared", 4) == [(1.0, 3), (3.0, 1), (0.0, 0)]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(slots=0), "slots: expected a whole number, 1 or more, got 0"),
        (dict(chunk=0), "chunk: expected a whole number, 1 or more, got 0"),
        (dict(schedule="log"), "schedule: expected one of .*'plateau'.*, got 'log'"),
        (dict(schedule="linear"), "horizon: expected 6 tokens, .*, got None"),
        (dict(schedule="linear", horizon=5), "horizon: expected 6 tokens, .*, got 5"),
        (dict(horizon=9), "horizon: expected None with schedule 'plateau', got 9"),
        (dict(first_chunk="x"), "first_chunk: expected one of"),
        (dict(similarity="x"), "similarity: expected one of"),
        (dict(choice="x"), "choice: expected one of"),
        (dict(step=0.0), "step: expected None, or above 0 and up to 1, got 0.0"),
        (dict(chunk=True), "chunk: expected a whole number, got True"),
        (dict(norm_eps=0.0), "norm_eps: expected more than 0, got 0.0"),
        (dict(output_gate="yes"), "output_gate: expected true or false, got 'yes'"),
        (dict(step="0.5"), "step: expected a number or null, got '0.5'"),
        (dict(num_kv_heads=3), "num_heads: expected a multiple of num_kv_heads=3, got 4"),
        (dict(head_width=0), "head_width: expected a whole number, 1 or more, got 0"),
        (dict(head_width=6.0), "head_width: expected a whole number, got 6.0"),
    ],
    ids=str,
)
def test_bad_configs(change, message):
    spec = dict(kind="ovq_attention", num_heads=4, num_kv_heads=2, head_width=6, chunk=4, slots=6)
    with pytest.raises(ValueError, match=f"ovq_attention: {message}"):
        build("mixers", spec | change, 16)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda x: x[0], "q and v: expected .* got"),
        ("q", lambda x: x.long(), "q: expected a floating dtype, got torch.int64"),
        ("q", lambda x: x[:, :, :3], "q: expected a multiple of v's 2 heads, got 3"),
        ("k", lambda x: x[..., 1:], r"k: expected shape \(2, 23, 2, 3\), got \(2, 23, 2, 2\)"),
        ("v", lambda x: x[:1], "k: expected shape|v: expected shape"),
        ("scale", lambda x: x[1:], r"scale: expected shape \(4,\), got \(3,\)"),
        ("starts", lambda x: x.int(), "starts: expected bool, got torch.int32"),
        ("valid", lambda x: x[:, 1:], "valid: expected shape"),
        ("state", lambda x: x._replace(memory=x.memory[:, :, 1:]), "state.memory: expected shape"),
        ("state", lambda x: x._replace(tokens=x.tokens.float()), "state.tokens: expected torch.int64"),
    ],
)
def test_says_what_is_wrong(name, change, message):
    starts, valid = packed()
    wanted = dict(zip(["q", "k", "v", "scale"], inputs(), strict=True), starts=starts, valid=valid, state=empty(RULE))
    wanted[name] = change(wanted[name])
    unchecked = ovq_attention
    while hasattr(unchecked, "__wrapped__"):  # past the check of the annotations that tests add
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=f"ovq_attention: {message}"):
        unchecked(rule=RULE, **wanted)


WRONG_TYPES = """
import torch
from seqzoo.kernels.ovq_attention import OVQRule, OVQState, ovq_attention

def message(fn, *args, **options):
    try:
        fn(*args, **options)
    except ValueError as error:
        return str(error)

sizes = dict(chunk=4, slots=6)
for options, expected in (
    (dict(schedule="linear", horizon=6.5), "6 tokens, one per slot, or more with schedule 'linear', got 6.5"),
    (dict(step="0.5"), "None, or above 0 and up to 1, got '0.5'"),
    (dict(log_count="no"), "True or False, got 'no'"),
    (dict(detach=0), "True or False, got 0"),
):
    found, name = message(OVQRule, **sizes, **options), list(options)[-1]
    assert found == f"ovq_attention: {name}: expected {expected}", found
rule, x, scale = OVQRule(**sizes), torch.randn(1, 3, 2, 5), torch.ones(2)
state = OVQState.empty(1, 2, 5, 5, rule, device="cpu", dtype=torch.float32)
for name, args, state in (
    ("scale", (2.0, rule), None), ("rule", (scale, sizes), None), ("state", (scale, rule), tuple(state))
):
    found = message(ovq_attention, x, x, x, *args, state=state)
    assert found.startswith(f"ovq_attention: {name}: expected "), found
"""


def test_wrong_types_are_named():
    """In a process without the type checks of tests, as users run it."""
    traced.passes(WRONG_TYPES)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=NEEDS_COMPILER)])
def test_a_state_of_fewer_than_no_tokens(backend):
    """Refused, for what would be read lies before the memory."""
    state = empty(RULE, dtype=torch.float32)._replace(tokens=torch.tensor([5, -3]))
    with pytest.raises(ValueError, match=r"ovq_attention: state.tokens: expected 0 or more, got \[5, -3\]"):
        BACKENDS[backend](*inputs(dtype=torch.float32), RULE, state)


def test_state_does_not_grow():
    part = build("mixers", dict(kind="ovq_attention", num_heads=4, num_kv_heads=2, head_width=6, chunk=4, slots=6), 16)
    assert len({part.state_bytes(t, torch.bfloat16) for t in (1, 100, 10**6)}) == 1
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        kept = sum(x.nbytes for x in part.init_state(1, device="cpu", dtype=dtype))
        assert part.state_bytes(1, dtype) == kept
    matrices = 2 * sum(p.numel() for p in part.parameters() if p.ndim == 2)
    assert part.flops(3) - matrices == 4 * 2 * 4 * 6  # 1, 2 and 3 tokens are seen, none merged
    read = [4 * t * 4 * 6 for t in (1, 2, 3, 4, 2 + 1, 2 + 2)]  # of 4 tokens 2 slots remain
    assert part.flops(6) - matrices == (sum(read) + 2 * 4 * 4 * 2 * 6) // 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_rule
def test_on_a_gpu(rule):
    time, (starts, valid) = [x.requires_grad_() for x in inputs()], packed()
    there = [x.detach().cuda().requires_grad_() for x in time]
    o, state = ovq_attention(*time, rule, state=empty(rule), starts=starts, valid=valid)
    begin = OVQState(*(x.cuda() for x in empty(rule)))
    ours, after = ovq_attention(*there, rule, state=begin, starts=starts.cuda(), valid=valid.cuda())
    pairs = [(ours, o), *zip(after[:2], state[:2], strict=True)]
    pairs += zip(torch.autograd.grad(ours.sum(), there), torch.autograd.grad(o.sum(), time), strict=True)
    for a, b in pairs:
        assert_close(a.cpu(), b, **EXACT)
