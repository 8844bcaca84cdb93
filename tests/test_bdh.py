"""BDH: the fused level against its definition, the model against the published formulas, decoding, merging, counts."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
import traced
from cases import BLOCKS
from torch.testing import assert_close

from seqzoo.kernels import native
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.strict_linear_attention import bdh_level, level_cpp
from seqzoo.kernels.strict_linear_attention.level import LEVELS
from seqzoo.layers import rope
from seqzoo.layers.blocks.bdh import BDH
from seqzoo.layers.span import Span
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM

NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
BACKENDS = ["torch", pytest.param("cpp", marks=NEEDS_COMPILER)]
DTYPE = {"reference": torch.float64, "torch": torch.float64, "cpp": torch.float32}
TOLERANCE = {torch.float64: dict(atol=1e-9, rtol=1e-7), torch.float32: dict(atol=5e-5, rtol=5e-4)}
B, H = 2, 3


def level_inputs(T, N, D, rows=1):
    """v, the three weights, cos and sin; read memories are not near 0, where a layer norm is steep."""
    angle = 6 * torch.rand(rows, T, N // 2)
    v = F.layer_norm(torch.randn(B, T, D), (D,))
    return [v, *(torch.randn(H, N, D) * D**-0.5 for _ in range(3)), angle.cos(), angle.sin()]


def level_run(name, inputs, state, **rest):
    """u, the last memory, counts, and gradients."""
    dtype = DTYPE[name]
    leaves = [x.to(dtype).clone().requires_grad_() for x in (*inputs[:4], state)]
    turns, memory = [x.to(dtype) for x in inputs[4:]], leaves[-1]
    rest = dict(starts=None, decay=None, passed=None, dropout=0.0, norm_eps=1e-5, x_before=None) | rest
    u, last, active, _ = LEVELS[name](*leaves[:4], *turns, state=memory, **rest)
    torch.manual_seed(1)
    weights = [torch.randn(x.shape).to(x) for x in (u, last)]
    return [u, last, active, *torch.autograd.grad((u, last), leaves, weights)]


CASES = {
    "plain": dict(T=70, N=10, D=7),
    "one token": dict(T=1, N=10, D=7),
    "more than a segment, two blocks of neurons": dict(T=600, N=260, D=16),
    "packed": dict(T=130, N=14, D=9, packed=True),
    "dropout": dict(T=65, N=12, D=8, dropout=0.4),
    "fading, rows of their own": dict(T=140, N=12, D=8, decay=[0.0, -0.01, -0.7], rows=B),
    "all": dict(T=135, N=18, D=20, packed=True, dropout=0.2, decay=[-0.1, 0.0, -2.0], rows=B),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_level_is_the_definition(backend, case):
    """Outputs, memory, counts and every gradient, from a memory that is not empty."""
    what = dict(CASES[case])
    T, N, D, packed, dropout = what["T"], what["N"], what["D"], what.get("packed"), what.get("dropout", 0.0)
    inputs, state = level_inputs(T, N, D, what.get("rows", 1)), torch.randn(B, H, N, D)
    rest = dict(
        starts=torch.rand(B, T) < 0.03 if packed else None,
        passed=torch.rand(B, H, N, T) > dropout if dropout else None,
        dropout=dropout,
        decay=None if what.get("decay") is None else torch.tensor(what["decay"]),
    )
    truth = level_run("reference", inputs, state, **rest)
    names = ["u", "memory", "active", "v", "encoder", "gate", "decoder", "state"]
    for name, ours, wanted in zip(names, level_run(backend, inputs, state, **rest), truth, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        assert_close(
            ours.double() / scale,
            wanted.double() / scale,
            **TOLERANCE[DTYPE[backend]],
            msg=lambda m, n=name: f"{n}: {m}",
        )


@NEEDS_COMPILER
@pytest.mark.parametrize("quiet", [0.0, 0.9], ids=["half active", "few active"])
def test_sparse_steps_are_the_dense_level(quiet):
    """Token by token through active neurons only, with and without a document's start, and fading."""
    T, N, D = 9, 64, 24
    inputs, state = level_inputs(T, N, D), torch.randn(B, H, N, D)
    inputs[1][:, torch.rand(N) < quiet] = 0.0  # neurons that never fire
    starts, decay = torch.rand(B, T) < 0.2, torch.tensor([-0.1, 0.0, -0.5])
    rest = dict(starts=starts, decay=decay)
    truth = LEVELS["reference"](
        *inputs, state=state, passed=None, dropout=0.0, norm_eps=1e-5, x_before=None, **rest
    )  # fmt: skip
    memory, pieces, counted = state.clone(), [], 0
    with torch.no_grad(), use_backend("cpp"):
        for t in range(T):
            at = slice(t, t + 1)
            turns = [x[:, at] for x in inputs[4:]]
            before = memory
            u, memory, active, _ = bdh_level(
                inputs[0][:, at], *inputs[1:4], *turns, state=memory, starts=starts[:, at], decay=decay
            )
            assert memory.data_ptr() == before.data_ptr()  # written over, not copied
            pieces.append(u)
            counted += active
    assert_close(torch.cat(pieces, 1), truth[0], atol=2e-5, rtol=1e-4)
    assert_close(memory, truth[1], atol=2e-5, rtol=1e-4)
    assert torch.equal(counted, truth[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [1, 2, 3], ids=["encoder", "gate", "decoder"])
def test_nan_is_not_hidden(weight, backend):
    """By a relu least of all: a weight that is not finite shows, or training would go on over a dead neuron."""
    inputs = level_inputs(40, 6, 5)
    inputs[weight][0, 3] = math.nan
    with use_backend(backend):
        assert bdh_level(*inputs)[0].isnan().any()


@NEEDS_COMPILER
@pytest.mark.parametrize("T", [3, 150])
def test_same_bits_alone_and_in_a_batch(T):
    inputs = level_inputs(T, 20, 12)
    with torch.no_grad(), use_backend("cpp"):
        batch = bdh_level(*inputs)
        alone = bdh_level(inputs[0][1:], *inputs[1:])
    assert torch.equal(batch[0][1:], alone[0]) and torch.equal(batch[1][1:], alone[1])


def test_derivatives_by_differences():
    v, *weights, cos, sin = (x.double() for x in level_inputs(4, 4, 3))
    leaves = [x.requires_grad_() for x in (v[:1], *(w[:2] for w in weights), torch.randn(1, 2, 4, 3).double())]
    fn = lambda v, e, g, d, s: LEVELS["torch"](
        v, e, g, d, cos, sin, state=s, starts=None, decay=None, passed=None, dropout=0.0, norm_eps=1e-5, x_before=None
    )[:2]
    assert torch.autograd.gradcheck(fn, leaves, atol=1e-6)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("v", lambda x: x[0], r"v and encoder: expected \[B, T, D\]"),
        ("encoder", lambda x: x[:, 1:], "v and encoder: .* N even"),
        ("gate", lambda x: x.mT, "gate: expected shape"),
        ("cos", lambda x: x[:, 1:], "cos: expected shape"),
        ("state", lambda x: x.mT, "state: expected shape"),
        ("starts", lambda x: x.int(), "starts: expected bool, got torch.int32"),
        ("passed", lambda x: x.mT, "passed: expected shape"),
        ("decay", lambda x: x.long(), "decay: expected a floating dtype"),
    ],
)
def test_says_what_is_wrong(name, change, message):
    names = ("v", "encoder", "gate", "decoder", "cos", "sin")
    inputs = dict(zip(names, level_inputs(5, 6, 4), strict=True), state=torch.zeros(B, H, 6, 4))
    inputs |= dict(
        starts=torch.zeros(B, 5, dtype=torch.bool),
        passed=torch.ones(B, H, 6, 5, dtype=torch.bool),
        decay=torch.zeros(H),
    )
    inputs[name] = change(inputs[name])
    unchecked = bdh_level
    while hasattr(unchecked, "__wrapped__"):  # past the check of the annotations that tests add
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=f"bdh_level: {message}"):
        unchecked(**inputs)


def test_backend_says_what_it_cannot():
    inputs = [x.double() for x in level_inputs(4, 6, 4)]
    with use_backend("cpp"), pytest.raises(ValueError, match="backend cpp: expected float32"):
        bdh_level(*inputs)


# The model


def small(levels=3, hidden_size=12, neurons=48, num_heads=2, vocab_size=19, **options) -> SeqZooForCausalLM:
    spec = dict(kind="bdh", num_heads=num_heads, neurons=neurons, **options)
    return SeqZooForCausalLM(
        SeqZooConfig(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_hidden_layers=levels,
            pattern=["bdh"],
            blocks={"bdh": spec},
            tied=True,
            norm="layer",
            norm_eps=1e-5,
            embed_norm=True,
            final_norm=False,
            initializer_range=0.3,
        )  # fmt: skip
    ).eval()


def published(ids, embed, encoder, encoder_v, decoder, lm_head, levels):
    """Logits by the published formulas, all pairs of tokens at once. encoder, encoder_v [H, D, N]; decoder [H N, D]."""
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    T, N = ids.shape[1], encoder.shape[2]
    rate = 65536.0 ** -(torch.arange(N, dtype=torch.float64) // 2 * 2 / N)
    phase = torch.arange(T)[:, None] * rate
    v = norm(embed[ids])
    for _ in range(levels):
        x = torch.einsum("btd,hdn->bhtn", v, encoder).relu()
        swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        r = x * phase.cos().to(x) + swapped * phase.sin().to(x)
        a = torch.einsum("bhts,bsd->bhtd", torch.einsum("bhtn,bhsn->bhts", r, r).tril(-1), v)
        y = torch.einsum("bhtd,hdn->bhtn", norm(a), encoder_v).relu()
        v = norm(v + norm((x * y).transpose(1, 2).flatten(2) @ decoder))
    return v @ lm_head


def released_tensors(ours):
    """What the published formulas take, as views of ours."""
    block = ours.stack.blocks[0]
    return [
        ours.embed_tokens.weight, block.encoder.mT, block.encoder_v.mT, block.decoder.flatten(0, 1),
        ours.lm_head.weight.T,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_model_is_the_published_one(dtype):
    """Logits, and the gradient of every parameter."""
    ours, ids = small().to(dtype), torch.randint(19, (2, 90))
    logits = ours(ids, use_cache=False).logits
    wanted = published(ids, *released_tensors(ours), 3)
    close = dict(atol=1e-10, rtol=1e-9) if dtype == torch.float64 else dict(atol=3e-5, rtol=1e-4)
    assert_close(logits, wanted, **close)
    weight = torch.randn_like(wanted)
    grads = [torch.autograd.grad((x * weight).mean(), list(ours.parameters())) for x in (logits, wanted)]
    far = 1e-9 if dtype == torch.float64 else 1e-3  # in fp32 an x or y near 0 may fall on its relu's other side
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= far * b.norm()


def test_a_token_never_reads_itself():
    """A first token predicts from its own embedding alone; what it writes, only later tokens read."""
    ours, ids = small(), torch.randint(19, (1, 12))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 19
    a, b = (ours(x, use_cache=False).logits for x in (ids, other))
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5:], b[:, 5:])
    norm = lambda x: F.layer_norm(x, (12,), eps=1e-5)
    v = norm(ours.embed_tokens(ids[:, :1]))
    for _ in range(3):
        v = norm(v)
    assert_close(a[:, :1], ours.lm_head(v))


def test_dropout_is_of_the_products():
    """In training a share of x * y is gone and the rest is larger: on the mean nothing changes. Not in evaluation."""
    block, plain = (BDH(6, num_heads=2, neurons=20, dropout=p) for p in (0.4, 0.0))
    plain.load_state_dict(block.state_dict())
    v = F.layer_norm(torch.randn(1, 30, 6), (6,))
    assert torch.equal(block.eval()(v)[0], plain(v)[0])
    assert not torch.equal(block.train()(v)[0], plain(v)[0])
    passed = [block._passed(v) for _ in range(400)]
    cos, sin = rope.pair_turns(torch.arange(30)[None], 10, 65536.0, torch.float32)
    inputs = v, block.encoder, block.encoder_v, block.decoder, cos, sin
    with torch.no_grad():
        mean = sum(bdh_level(*inputs, passed=p, dropout=0.4)[0] for p in passed) / len(passed)
        wanted = bdh_level(*inputs)[0]
    assert (mean - wanted).norm() < 0.1 * wanted.norm()


def test_neurons_are_handed_on_from_level_to_level():
    """The paper's Def. 4 by hand: x grows from level to level, v has no stream of its own."""
    block = BDH(6, num_heads=2, neurons=20, levels=2, residual="neuron").double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    v, T = F.layer_norm(torch.randn(1, 8, 6, dtype=torch.double), (6,)), 8
    wanted, x = v, 0
    cos, sin = rope.pair_turns(torch.arange(T)[None], 10, 65536.0, torch.double)
    for _ in range(2):
        x = x + (wanted[:, None] @ block.encoder.mT).relu()
        r = torch.stack([x[..., ::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., ::2] * sin], -1).flatten(
            -2
        )
        a = (r @ r.mT).tril(-1) @ wanted[:, None]
        y = (F.layer_norm(a, (6,), eps=1e-5) @ block.encoder_v.mT).relu()
        wanted = F.layer_norm(((x * y) @ block.decoder).sum(1), (6,), eps=1e-5)
    assert_close(block(v)[0], wanted)


def test_counts_and_metrics():
    """Additive over calls; padding fires no neuron and is not counted."""
    block, v = BDH(8, num_heads=2, neurons=40, levels=2), F.layer_norm(torch.randn(2, 7, 8), (8,))
    _, _, stats = block(v)
    assert stats["neurons"] == 2 * 7 * 40 * 2
    x = (v[:, None] @ block.encoder.mT).relu()
    first = BDH(8, num_heads=2, neurons=40)
    first.load_state_dict(block.state_dict())
    assert first(v)[2]["x"] == (x > 0).sum()
    assert 0 < block.metrics(stats)["xy_density"] < block.metrics(stats)["x_density"] < 1
    valid = torch.tensor([[False] * 3 + [True] * 7]).expand(2, -1)
    padded = Span((torch.arange(10) - 3).clamp(min=0).expand(2, -1), valid)
    _, _, again = block(torch.cat([torch.randn(2, 3, 8), v], 1), padded)
    for name in stats:
        assert stats[name] == again[name]
    model = small()
    ids = torch.randint(19, (2, 9))
    out = model(ids, labels=ids)
    said = model.metrics(out.stats)
    assert out.aux_loss == 0 and len(said) == 2 * (1 + 3)
    assert said["xy_density"] == pytest.approx(sum(said[f"xy_density_{level}"] for level in range(3)) / 3)
    model.after_step(out.stats)


def test_levels_share_one_table_and_leave_none():
    """It lives as long as the positions do."""
    gc.collect()
    before = len(rope._PAIRS)
    positions = torch.arange(5)[None].expand(3, -1)
    cos, _ = rope.pair_turns(positions, 8, 65536.0, torch.float32)
    assert cos.shape == (1, 5, 4) and rope.pair_turns(positions, 8, 65536.0, torch.float32)[0] is cos
    assert rope.pair_turns(positions, 8, 65536.0, torch.float64)[0].dtype == torch.float64
    del positions
    assert len(rope._PAIRS) == before


def test_a_table_is_of_the_positions_as_they_are():
    """Written over, under inference mode too; and what inference made is no table to learn with."""
    turns = lambda positions: rope.pair_turns(positions, 8, 65536.0, torch.float32)[0]
    for inference in (False, True):
        with torch.inference_mode(inference):
            positions = torch.arange(5)[None].expand(3, -1)
            before = turns(positions)
            positions[0].add_(2)
            assert_close(turns(positions)[:, :-2], before[:, 2:])
            assert turns(positions) is turns(positions)
    for inference in (False, True):
        with torch.inference_mode(inference):
            positions = torch.arange(5)[None]
        with torch.inference_mode():
            turns(positions)
        x = torch.ones(1, 5, 4, requires_grad=True)
        (x * turns(positions)).sum().backward()


def test_phases_far_out_are_exact():
    """At a million tokens fp32 phases would be off by some hundredths."""
    at = 1_000_003
    cos, sin = rope.pair_turns(torch.tensor([[at]]), 8, 65536.0, torch.float32)
    for i in range(4):
        phase = at * 65536.0 ** (-2 * i / 8)
        assert_close(torch.stack([cos[0, 0, i], sin[0, 0, i]]), torch.tensor([math.cos(phase), math.sin(phase)]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=0), "num_heads: expected a whole number, at least 1, got 0"),
        (dict(levels=1.5), "levels: expected a whole number, at least 1, got 1.5"),
        (dict(neurons=25), "neurons: expected pairs for 2 heads x 1 ladders, got 25"),
        (dict(ladders=5), "neurons: expected pairs for 2 heads x 5 ladders, got 24"),
        (dict(residual="x"), "residual: expected 'model' or 'neuron', got 'x'"),
        (dict(decay=[0.1]), r"decay: expected 2 numbers from 0 on, one per head, got \[0.1\]"),
        (dict(decay=[0.1, -0.1]), r"decay: expected 2 numbers from 0 on, one per head, got \[0.1, -0.1\]"),
        (dict(decay=[math.nan, 0.0]), "decay: expected 2 numbers from 0 on, one per head, got .nan"),
        (dict(decay=0.1), "decay: expected 2 numbers from 0 on, one per head, got 0.1"),
        (dict(rope_theta=0.0), "rope_theta: expected more than 0, got 0.0"),
        (dict(dropout=1.0), "dropout: expected 0 to less than 1, got 1.0"),
    ],
    ids=str,
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=f"bdh: {message}"):
        BDH(8, **(BLOCKS["bdh"] | change))


@NEEDS_COMPILER
def test_memory_of_backward_is_of_the_model_width():
    """Kept between forward and backward: no T x N tensor, so that less than half of one is enough for all."""
    T, N, D = 1024, 512, 16
    inputs, kept = level_inputs(T, N, D), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        level_cpp.bdh_level_cpp(
            *(x.requires_grad_() for x in inputs[:4]), *inputs[4:], state=None, starts=None, decay=None, passed=None,
            dropout=0.0, norm_eps=1e-5,
        )  # fmt: skip
    tables = 2 * T * N // 2
    assert sum(kept) - tables < B * H * T * N / 2


TRACED = """
import sys
import torch
from seqzoo.kernels.dispatch import use_backend
from seqzoo.layers.blocks.bdh import BDH

torch.manual_seed(0)
for backend, residual in (("torch", "model"), ("torch", "neuron"), ("cpp", "model"))[:int(sys.argv[1])]:
    block = BDH(6, num_heads=2, neurons=20, levels=2, residual=residual)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    compiled, v = torch.compile(block, backend="aot_eager", fullgraph=True), torch.randn(2, 9, 6)
    state = lambda: block.init_state(2, device=v.device, dtype=v.dtype)
    with use_backend(backend):
        (u, _, stats), (u_, _, stats_) = compiled(v), block(v)
        torch.testing.assert_close((u, stats), (u_, stats_))
        grads = [torch.autograd.grad((x**3).sum(), list(block.parameters())) for x in (u, u_)]
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(v, None, state())[1], block(v, None, state())[1])
"""


def test_is_one_graph_of_torch_compile():
    """Levels, their gradients and the state; in a process without the type checks of tests."""
    backends = str(3 if native.available() else 2)
    traced.passes(TRACED, backends)
