"""The laws of sink tokens: seen from everywhere, no part of any sequence, run once."""

import json
from itertools import pairwise

import pytest
import torch
from hydra import compose, initialize_config_module
from torch.testing import assert_close

from seqzoo.layers.registry import build
from seqzoo.layers.span import Span
from seqzoo.layers.state import map_state
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.cost import cost
from seqzoo.train import model_config

N, B, D = 5, 2, 16
ATTENTION = dict(num_heads=4, num_kv_heads=2, head_width=6)
MIXERS = {
    "full": dict(kind="attention", **ATTENTION),
    "window": dict(kind="attention", window=4, qk_norm="zero_centred", **ATTENTION),
    "recurrent": dict(kind="gated_deltanet", num_key_heads=2, num_value_heads=2, key_width=3, value_width=5),
    "momentum": dict(kind="momentum_attention", gamma=0.8, **ATTENTION),
    "momentum in a window": dict(kind="momentum_attention", gamma=0.8, window=4, placement="pre", **ATTENTION),
    "beside each other": dict(
        kind="parallel",
        branches=dict(
            near=dict(kind="attention", window=3, **ATTENTION),
            far=dict(kind="gated_deltanet", num_key_heads=1, num_value_heads=2, key_width=4, value_width=3),
        ),
    ),
}
MOE = dict(kind="moe", num_experts=4, num_experts_per_token=2, expert_width=6)
every = pytest.mark.parametrize("name", MIXERS)


def model(name, double=True, **other):
    """Three blocks with that mixer; the recurrent one has a block of attention in their midst, that looks at sinks."""
    pattern = ["mixer/mlp", "full/mlp", "mixer/mlp"] if name == "recurrent" else ["mixer/mlp"]
    config = SeqZooConfig(
        hidden_size=D, vocab_size=31, num_hidden_layers=3, mixers=dict(mixer=MIXERS[name], full=MIXERS["full"]),
        channels=dict(mlp=dict(kind="swiglu", width=12), moe=MOE),
        **{"pattern": pattern, "num_sink_tokens": N, **other},
    )  # fmt: skip
    ours = SeqZooForCausalLM(config).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return ours.double() if double else ours


def ids(*shape):
    return torch.randint(31, shape)


@pytest.mark.parametrize("name", ["window", "beside each other"])
def test_far_tokens_depend_on_sinks(name):
    """All of them, at every place, though the window is long past."""
    ours = model(name)
    for t in (0, 3, 39):
        (grad,) = torch.autograd.grad(ours(ids(1, 40)).logits[0, t].square().sum(), ours.sink_tokens)
        assert (grad.abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize("name", ["full", "window"])
def test_is_one_sequence_under_a_mask(name):
    """The whole model by hand: sinks and tokens in one row, the sinks at position 0, seen by all, each other too."""
    ours, x = model(name, embed_norm=True), ids(B, 9)
    h = ours.stack.embed_norm(torch.cat([ours.sink_tokens.expand(B, -1, -1), ours.embed_tokens(x)], 1))
    positions = torch.cat([torch.zeros(N, dtype=torch.int64), torch.arange(9)]).expand(B, -1)
    back = torch.arange(N + 9)[:, None] - torch.arange(N + 9)
    seen = (back >= 0) & (back < (MIXERS[name].get("window") or 99))
    seen[:N] = False
    seen[:, :N] = True
    for block in ours.stack.levels():
        part, normed = block.mixer, block.mixer_norm(h)
        k, v = part.keys(normed)
        q, k = part.turn(part.queries(normed), k, Span(positions))
        k, v = (y.repeat_interleave(part.H // part.G, dim=2) for y in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) * part.K**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        h = h + part.out(torch.einsum("bhts,bshk->bthk", weights, v), normed)
        h = h + block.channel(block.channel_norm(h))[0]
    assert_close(ours(x).logits, ours.lm_head(ours.stack.norm(h))[:, N:], atol=1e-8, rtol=1e-8)


@every
def test_a_row_of_documents_is_its_documents(name):
    ours, documents = model(name), [ids(1, n) for n in (5, 1, 9)]
    alone = torch.cat([ours(d).logits for d in documents], 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = ours(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    assert_close(packed, alone, atol=1e-6, rtol=1e-5)


@every
@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 4, 9), tuple(range(1, 12))], ids=str)
@pytest.mark.parametrize("learns", [False, True], ids=["", "with gradients"])
def test_cut_anywhere(name, cuts, learns):
    ours, x = model(name), ids(B, 12)
    whole = ours(x, use_cache=False).logits
    past, pieces = None, []
    with torch.set_grad_enabled(learns):
        for a, b in zip((0, *cuts), (*cuts, 12), strict=True):
            out = ours(x[:, a:b], past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole, atol=1e-6, rtol=1e-5)


@every
@pytest.mark.parametrize("cuts", [[0, 4, 5, 9, 10, 14], [0, 6, 7, 14], range(15)], ids=str)
def test_documents_in_pieces(name, cuts):
    """A document that begins in a later call, be it of a token, sees the sinks that the first call brought."""
    cuts = pairwise(cuts)
    ours, x, positions = model(name), ids(1, 14), torch.tensor([[*range(6), *range(8)]])
    whole = ours(x, position_ids=positions, use_cache=False).logits
    past, pieces = None, []
    for a, b in cuts:
        out = ours(x[:, a:b], position_ids=positions[:, a:b], past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole, atol=1e-6, rtol=1e-5)


@every
def test_left_padding_is_nothing(name):
    ours, x = model(name), ids(1, 9)
    whole = ours(x).logits
    padded, mask = torch.cat([ids(1, 6), x], 1), torch.tensor([[0] * 6 + [1] * 9])
    assert_close(ours(padded, attention_mask=mask, use_cache=False).logits[:, 6:], whole, atol=1e-6, rtol=1e-5)
    past, pieces = None, []
    for a, b in ((0, 4), (4, 11), (11, 12), (12, 15)):  # the first call is all padding
        out = ours(padded[:, a:b], attention_mask=mask[:, :b], past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1)[:, 6:], whole, atol=1e-6, rtol=1e-5)


@every
@pytest.mark.parametrize("how", [dict(), dict(num_beams=3)], ids=str)
def test_generates_the_full_forward(name, how, tmp_path):
    model(name, double=False).save_pretrained(tmp_path)
    ours = SeqZooForCausalLM.from_pretrained(tmp_path).eval()
    assert ours.config.num_sink_tokens == N
    out = [
        ours.generate(ids, max_new_tokens=12, use_cache=use_cache, do_sample=False, **how)
        for ids in [ids(2, 7)] for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*out)


@every
def test_sinks_run_once(name, monkeypatch):
    """In the first call, one row of them whatever the batch; decoding finds them in the states."""
    ours, rows = model(name), []
    for block in ours.stack.blocks:
        block.mixer.register_forward_hook(lambda part, inputs, output: rows.append(tuple(inputs[0].shape[:2])))
    past = ours(ids(3, 4), use_cache=True).past_key_values
    assert rows == [(3, 4), (1, N), (3, 4), (1, N), (3, 4)]  # what the last block would make of them, nobody sees
    rows.clear()
    ours(ids(3, 1), past_key_values=past)
    assert rows == [(3, 1)] * 3


@every
def test_state_bytes_count_them(name):
    ours = model(name, double=False)
    held = []
    for state in ours(ids(B, 20), use_cache=True).past_key_values.states:
        map_state(lambda t: held.append(t[0].numel() * t.element_size()), state)
    counted = cost(ours, context=20, dtype=torch.float32)
    assert sum(held) == counted.state_bytes
    assert counted.parameters == sum(p.numel() for p in ours.parameters())
    assert next(part.parameters for part in counted.parts if part.name == "sinks") == N * D
    more = cost(model(name, double=False, num_sink_tokens=2 * N), context=20).flops_per_token
    assert more > counted.flops_per_token


def test_sinks_that_nobody_looks_at_are_refused():
    assert "sink_tokens" not in model("recurrent", num_sink_tokens=0, pattern=["mixer/mlp"]).state_dict()
    with pytest.raises(ValueError, match="num_sink_tokens: expected 0 where no mixer looks at sinks, got 5"):
        model("recurrent", pattern=["mixer/mlp"])


def test_no_expert_counts_sinks():
    stats = model("full", pattern=["mixer/moe"]).train()(ids(B, 9)).stats
    assert [int(counted["tokens"]) for counted in stats] == [B * 9] * 3


def test_gradients_by_finite_differences():
    ours, x = model("momentum in a window", tied=True), ids(B, 7)
    logits = lambda sinks: torch.func.functional_call(ours, {"sink_tokens": sinks}, (x,), {"use_cache": False}).logits
    assert torch.autograd.gradcheck(logits, ours.sink_tokens, fast_mode=True, atol=1e-5)


@every
def test_generates_a_padded_batch(name):
    """Each row what it is alone, in beams too."""
    ours, x = model(name), ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [8]])).long()
    for how in (dict(), dict(num_beams=3)):
        run = lambda x, mask, how=how: ours.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, **how)
        for row, out in enumerate(run(x, mask)):
            own = mask[row].bool()
            assert torch.equal(out[9:], run(x[row : row + 1, own], mask[row : row + 1, own])[0, own.sum() :])


def test_attention_by_hand():
    """One layer, no positions: softmax over all sinks and the window's tokens; the sinks' keys without a turn."""
    part = build("mixers", MIXERS["window"], D).double()
    x, sinks = torch.randn(B, 9, D).double(), torch.randn(N, D).double()
    y, _ = part(x, Span.whole(x)._replace(sinks=sinks))
    q, (k, v) = part.queries(x), part.keys(x)
    q, k = part.turn(q, k, Span.whole(x))
    more_k, more_v = part.keys(sinks[None])
    for t in (0, 8):
        low = max(0, t - 3)
        k_t = torch.cat([more_k.expand(B, -1, -1, -1), k[:, low : t + 1]], 1).repeat_interleave(2, 2)
        v_t = torch.cat([more_v.expand(B, -1, -1, -1), v[:, low : t + 1]], 1).repeat_interleave(2, 2)
        weights = (torch.einsum("bhk,bshk->bsh", q[:, t], k_t) * 6**-0.5).softmax(1)
        assert_close(y[:, t], part.out_proj(torch.einsum("bsh,bshk->bhk", weights, v_t).flatten(-2)))


@pytest.mark.parametrize("name", ["full", "window", "momentum"])
def test_sinks_see_each_other_both_ways(name):
    part, x = build("mixers", MIXERS[name], D).double(), torch.randn(1, N, D).double().requires_grad_()
    y, state = part(x, Span.of_sinks(x))
    assert state is None
    for t in range(N):
        (grad,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        assert (grad.abs().amax(2) > 0).all()
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(part(x[:, order], Span.of_sinks(x))[0], y[:, order])  # they stand nowhere: no order among them


def test_sinks_twice_are_refused():
    part, x = build("mixers", MIXERS["full"], D), torch.randn(B, 3, D)
    span = Span.whole(x)._replace(sinks=torch.randn(N, D))
    _, state = part(x, span, part.init_state(B, device=x.device, dtype=x.dtype))
    with pytest.raises(ValueError, match="attention: span.sinks: expected None, the state has 5 sinks"):
        part(x, span, state)


@every
def test_gradient_checkpointing_changes_nothing(name):
    ours, x, grads = model(name).train(), ids(B, 17), []
    for _ in range(2):
        ours.zero_grad()
        ours(x, labels=x).loss.backward()
        grads.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
        getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    assert grads[0].keys() == grads[1].keys() and "sink_tokens" in grads[0]
    for n in grads[0]:
        assert_close(grads[1][n], grads[0][n], msg=lambda m, n=n: f"{n}: {m}")


def test_reentrant_checkpoints_are_refused():
    """Their gradients would not reach the sinks, nor a router what its experts count."""
    ours = model("full", pattern=["mixer/moe"]).train()
    how = getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)
    how({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant: expected False, got True"):
        ours(ids(B, 5))
    how({"use_reentrant": False})
    ours(ids(B, 5))


def test_a_folder_of_before_means_what_it_meant(tmp_path):
    """Its config.json lacks the keys that came later."""
    ours, x = model("full", double=False, num_sink_tokens=0), ids(B, 9)
    ours.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    for name in ("norm", "embed_norm", "final_norm", "num_sink_tokens", "blocks", "spikes", "quantisation"):
        del said[name]
    for spec in said["mixers"].values():
        del spec["out_bias"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert torch.equal(SeqZooForCausalLM.from_pretrained(tmp_path).eval()(x).logits, ours(x).logits)


def test_from_a_yaml_and_drawn_as_embeddings():
    with initialize_config_module("seqzoo.configs", version_base=None):
        config = model_config(
            compose("train", ["model=transformer", "+model.num_sink_tokens=64", "+model.initializer_range=0.5"])
        )
    assert 0.48 < SeqZooForCausalLM(config).sink_tokens.std() < 0.52
    for wrong, expected in ((-1, "0 or more"), (2.5, "a whole number"), (None, "a whole number")):
        with pytest.raises(ValueError, match=f"num_sink_tokens: expected {expected}, got {wrong}"):
            SeqZooConfig(num_sink_tokens=wrong)
