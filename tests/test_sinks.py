"""The laws of sink tokens: seen from everywhere, no part of any sequence, run once."""

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
    "window": dict(kind="attention", window=4, qk_norm=True, **ATTENTION),
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
every = pytest.mark.parametrize("name", MIXERS)


def model(name, double=True, **other):
    mixers = dict(mixer=MIXERS[name])
    config = SeqZooConfig(
        hidden_size=D, vocab_size=31, num_hidden_layers=3, pattern=["mixer/mlp"], mixers=mixers,
        channels=dict(mlp=dict(kind="swiglu", width=12)), **{"num_sink_tokens": N, **other},
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
def test_documents_in_pieces(name):
    """A document that begins in a later call sees the sinks that the first call brought."""
    ours, x, positions = model(name), ids(1, 14), torch.tensor([[*range(6), *range(8)]])
    whole = ours(x, position_ids=positions, use_cache=False).logits
    past, pieces = None, []
    for a, b in ((0, 4), (4, 5), (5, 9), (9, 10), (10, 14)):
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
    assert more > counted.flops_per_token or name == "recurrent"


def test_without_sinks_nothing_changes():
    """Nor with sinks that no mixer looks at."""
    ours, plain = model("recurrent"), model("recurrent", num_sink_tokens=0)
    assert "sink_tokens" not in plain.state_dict()
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "sink_tokens"})
    x = ids(B, 9)
    assert torch.equal(ours(x).logits, plain(x).logits)


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
    assert grads[0].keys() == grads[1].keys() and ("sink_tokens" in grads[0] or name == "recurrent")
    for n in grads[0]:
        assert_close(grads[1][n], grads[0][n], msg=lambda m, n=n: f"{n}: {m}")


def test_from_a_yaml_and_drawn_as_embeddings():
    with initialize_config_module("seqzoo.configs", version_base=None):
        config = model_config(
            compose("train", ["model=transformer", "+model.num_sink_tokens=64", "+model.initializer_range=0.5"])
        )
    assert 0.48 < SeqZooForCausalLM(config).sink_tokens.std() < 0.52
    with pytest.raises(ValueError, match="num_sink_tokens: expected 0 or more, got -1"):
        SeqZooConfig(num_sink_tokens=-1)
