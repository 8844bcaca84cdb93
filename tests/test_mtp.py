"""Multi-token prediction: its loss is a plain loop's, its tensors are Qwen3-Next's, and nobody else looks at it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from runs import HYBRID, run, written
from safetensors.torch import load_file, save_file
from small_qwen3_next import VOCAB, small
from torch import nn
from torch.testing import assert_close
from transformers import Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer, Qwen3NextRMSNorm

from seqzoo.layers.span import Span
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM, mtp
from seqzoo.models.convert import convert, qwen3_5_text, qwen3_next
from seqzoo.models.cost import cost
from seqzoo.models.losses import IGNORED
from seqzoo.train import model_config
from seqzoo.training.objectives import MultiToken, NextToken

WITH = "+model.mtp={pattern: [full/moe]}"
WEIGHT = 0.4


def made(*more):
    with initialize_config_module("seqzoo.configs", version_base=None):
        return SeqZooForCausalLM(model_config(compose("train", overrides=[*HYBRID, WITH, *more])))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = made("model.channels.moe.balance_coefficient=0.1").train()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def loop(model, ids, targets):
    """One document alone, a place after the other: nats of the token after the next, summed."""
    ids, e = ids[None], model.embed_tokens(ids)
    h = model.stack(model.embed_tokens(ids), Span.whole(ids))[0][0]
    u = []
    for t in range(len(e)):
        after = e[t + 1] if t + 1 < len(e) else torch.zeros_like(e[t])
        u.append(F.linear(torch.cat([model.mtp.embed_norm(after), model.mtp.hidden_norm(h[t])]), model.mtp.proj.weight))
    p = model.mtp.stack(torch.stack(u)[None], Span.whole(ids))[0][0]
    nats = torch.zeros(())
    for t in range(len(e) - 1):
        if targets[t + 1] != IGNORED:
            nats = nats - model.lm_head(p[t]).log_softmax(-1)[targets[t + 1]]
    return nats


def packed():
    """Two rows of documents of 7, 1 and 5, and of 13 tokens; the ends of documents are targets, some others are not."""
    ids, targets = torch.randint(100, (2, 13)), torch.randint(100, (2, 13))
    targets[0, 4] = targets[1, 2] = targets[1, 9] = IGNORED
    positions = torch.stack([torch.cat([torch.arange(n) for n in (7, 1, 5)]), torch.arange(13)])
    documents = [(0, slice(0, 7)), (0, slice(7, 8)), (0, slice(8, 13)), (1, slice(0, 13))]
    return dict(input_ids=ids, shift_labels=targets, position_ids=positions), documents


def test_is_a_plain_loop_over_documents(model):
    inputs, documents = packed()
    ids, targets = inputs["input_ids"], inputs["shift_labels"]
    wanted = sum(loop(model, ids[at], targets[at]) for at in documents) / 23
    with_logits = model(**inputs, mtp_weight=WEIGHT)
    assert_close(with_logits.mtp_loss, wanted)
    out = model(**inputs, mtp_weight=WEIGHT, return_logits=False)
    assert_close(out.mtp_loss, wanted)
    names, leaves = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (out.mtp_loss, wanted))
    for name, a, b in zip(names, ours, theirs, strict=True):
        if b is not None:
            assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item(), msg=lambda said, name=name: f"{name}: {said}")
        assert not name.startswith("mtp.") or a.any(), name


@pytest.mark.parametrize("positions", [None, torch.arange(11)[None]], ids=["from the mask", "through the padding"])
def test_padding_on_the_left_and_labels_not_moved(model, positions):
    ids = torch.randint(100, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    out = model(ids, attention_mask=mask, position_ids=positions, labels=labels, mtp_weight=WEIGHT, use_cache=False)
    moved = F.pad(ids, (0, 1), value=IGNORED)[:, 1:]
    nats = loop(model, ids[0], moved[0]) + loop(model, ids[1, 4:], moved[1, 4:])
    assert_close(out.mtp_loss, nats / (10 + 7))  # the last padding predicts a first token, which labels do not say


def test_the_loss_is_the_sum_of_its_parts(model):
    inputs, _ = packed()
    plain, out = model(**inputs), model(**inputs, mtp_weight=WEIGHT)
    assert plain.mtp_loss is None and len(plain.stats) == 4 and len(out.stats) == 5
    assert_close(plain.loss - plain.aux_loss, out.loss - out.aux_loss - WEIGHT * out.mtp_loss)
    assert_close(out.aux_loss, model.added_loss(out.stats))
    gradient = torch.autograd.grad(out.aux_loss, model.mtp.stack.blocks[0].channel.router.weight)[0]
    assert gradient.any() and out.aux_loss != plain.aux_loss
    model.after_step(out.stats)
    assert model.metrics(out.stats).keys() == model.metrics(plain.stats).keys()


def test_micro_batches_make_the_batch(model):
    inputs, _ = packed()
    objective, parts = MultiToken(model, weight=WEIGHT), []
    whole = objective(model, inputs, 23, None)
    for row in range(2):
        parts.append(objective(model, {name: x[row : row + 1] for name, x in inputs.items()}, 23, None))
    assert_close(sum(part.shown for part in parts), whole.shown)
    shown = model(**inputs)
    assert_close(whole.shown, shown.loss - shown.aux_loss)


def test_nobody_else_looks_at_it(model):
    without = SeqZooForCausalLM(SeqZooConfig.from_dict(model.config.to_dict() | dict(mtp=None))).train()
    found = without.load_state_dict(model.state_dict(), strict=False)
    assert not found.missing_keys and {x.partition(".")[0] for x in found.unexpected_keys} == {"mtp"}
    inputs, _ = packed()
    assert torch.equal(model(**inputs).loss, without(**inputs).loss)
    ids = torch.randint(100, (1, 5))
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.eval().generate(ids, **how), without.eval().generate(ids, **how))
    model.train()
    assert {n.partition(".")[0] for n, _ in model.named_parameters() if not NextToken().learns(n)} == {"mtp"}


def test_a_stretch_of_a_sequence_takes_the_next_ranks_first_place(monkeypatch):
    whole = x, targets, positions = (
        torch.randn(2, 12, 3), torch.randint(9, (2, 12)), torch.tensor([[*range(6), *range(6)], [*range(12)]]),
    )  # fmt: skip
    found, parts = [], [slice(0, 4), slice(4, 8), slice(8, 12)]
    for rank, here in enumerate(parts):

        def gathered(first, here=here):
            of = next(w for w in whole if torch.equal(first, w[:, here][:, :1]))
            return torch.stack([of[:, part][:, :1] for part in parts])

        monkeypatch.setattr(mtp, "ranks", lambda rank=rank: SimpleNamespace(rank=rank, size=3))
        monkeypatch.setattr(mtp, "gathered", gathered)
        found.append(mtp.one_on(x[:, here], targets[:, here], Span(positions[:, here])))
    monkeypatch.undo()
    for got, wanted in zip(zip(*found, strict=True), mtp.one_on(x, targets, Span(positions)), strict=True):
        assert_close(torch.cat(got, dim=1), wanted)


@pytest.mark.parametrize(
    "more, error",
    [
        ("+model.mtp={pattern: [far/moe]}", r"mtp: pattern: 'far/moe' names no block"),
        ("+model.mtp={pattern: []}", r"mtp: expected {'pattern': \[entry, ...\]}, got"),
        ("+model.mtp={depth: 1}", r"mtp: expected {'pattern': \[entry, ...\]}, got {'depth': 1}"),
        ("+model.num_sink_tokens=2", "mtp: expected a model with num_sink_tokens=0, got 2"),
    ],
)
def test_bad_configs(more, error):
    overrides = [*HYBRID, more] if "mtp" in more else [*HYBRID, WITH, more]
    with initialize_config_module("seqzoo.configs", version_base=None), pytest.raises(ValueError, match=error):
        model_config(compose("train", overrides=overrides))


def test_bad_calls(model):
    ids, without = torch.randint(100, (1, 5)), SeqZooForCausalLM(SeqZooConfig(pattern=[]))
    for wrong, more in ((model, {}), (without, dict(labels=ids))):
        with pytest.raises(ValueError, match="mtp_weight: expected a model with mtp, labels and no past, or 0"):
            wrong(ids, mtp_weight=WEIGHT, **more)
    with pytest.raises(ValueError, match="objective: mtp: expected a model with mtp in its config, got one without"):
        MultiToken(without, weight=WEIGHT)
    with pytest.raises(ValueError, match="objective.weight: expected a number above 0, got -1"):
        MultiToken(model, weight=-1)


def test_cost_counts_it(model):
    counted = cost(model, context=100)
    (part,) = (part for part in counted.parts if part.name == "mtp")
    assert part.parameters == sum(p.numel() for p in model.mtp.parameters())
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    without = cost(SeqZooConfig.from_dict(model.config.to_dict() | dict(mtp=None)), context=100)
    assert counted[1:4] == without[1:4]  # a token that is generated does not meet it


def test_training_and_going_on(tmp_path):
    """A run that stops half way and goes on is the run that does not; one on the next token leaves the module alone."""
    how = dict(model=HYBRID, steps=4, checkpoint_every=2, sample_tokens=2, gradient_checkpointing="true")
    run(tmp_path / "whole", WITH, "objective=mtp", **how)
    run(tmp_path / "cut", WITH, "objective=mtp", **how | dict(max_minutes=1e-9))
    run(tmp_path / "cut", WITH, "objective=mtp", **how, resume="auto")
    run(tmp_path / "next", WITH, **how)
    whole, cut, next_token = (
        load_file(tmp_path / name / "checkpoints" / "step-00000004" / "model.safetensors")
        for name in ("whole", "cut", "next")
    )
    assert_close(cut, whole, rtol=0, atol=0)
    shown = [line for line in written(tmp_path / "whole") if line["split"] == "train"]
    assert shown == [line for line in written(tmp_path / "cut") if line["split"] == "train"]
    for line in shown:  # a new model knows nothing: both are near a guess among all tokens
        assert abs(line["mtp_loss"] - math.log(264)) < 1 and line["mtp_loss"] != line["loss"]
    assert all("mtp_loss" not in line for line in written(tmp_path / "next"))
    first = SeqZooForCausalLM.from_pretrained(tmp_path / "next" / "checkpoints" / "step-00000002")
    for name, x in first.state_dict().items():
        assert torch.equal(x, next_token[name]) == name.startswith("mtp."), name


# Checkpoints


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small Qwen3-Next with mtp.*, as the release has it: folder, transformers' model, its modules, the tensors."""
    folder, donor, theirs = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("donor"), small()
    c = theirs.config
    D, full = c.hidden_size, c.layer_types.index("full_attention")
    norm = lambda: Qwen3NextRMSNorm(D, c.rms_norm_eps)
    parts = dict(
        pre_fc_norm_embedding=norm(), pre_fc_norm_hidden=norm(), fc=nn.Linear(2 * D, D, bias=False), norm=norm()
    )
    layer = Qwen3NextDecoderLayer(c, full)
    torch.manual_seed(2)
    for part in (*parts.values(), layer):
        for p in part.parameters():
            nn.init.normal_(p, std=0.25)
    other = small()
    other.model.layers[full].load_state_dict(layer.state_dict())
    other.save_pretrained(donor)  # which writes each expert's matrices by themselves
    at, saved = f"model.layers.{full}.", load_file(donor / "model.safetensors")
    extra = {x.replace(at, "mtp.layers.0."): value for x, value in saved.items() if x.startswith(at)}
    extra |= {f"mtp.{name}.weight": part.weight.detach() for name, part in parts.items()}
    theirs.save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(num_nextn_predict_layers=1), indent=2))
    return SimpleNamespace(folder=folder, model=theirs, parts=parts, layer=layer, tensors=extra)


def test_names_are_those_of_the_release(published):
    experts = {x for x in published.tensors if ".experts." in x}
    assert len(published.tensors) - len(experts) == 17 and len(experts) == 3 * 6
    assert published.tensors["mtp.fc.weight"].shape == (24, 48)


def test_converted_it_predicts_what_theirs_predicts(published, tmp_path):
    """transformers has no module for it: one is put together of its layers."""
    convert(published.folder, tmp_path / "ours")
    ours = SeqZooForCausalLM.from_pretrained(tmp_path / "ours")
    assert (
        ours.config.mtp == {"pattern": ["full/moe"]} and not (tmp_path / "ours" / "seqzoo_extra.safetensors").exists()
    )
    ids, T = torch.randint(1, VOCAB, (2, 17)), 16
    base, parts = published.model.model, published.parts
    with torch.no_grad():
        hidden, embeds = base(ids[:, :-1]).last_hidden_state, base.embed_tokens(ids[:, 1:])
        x = parts["fc"](torch.cat([parts["pre_fc_norm_embedding"](embeds), parts["pre_fc_norm_hidden"](hidden)], -1))
        rotary = base.rotary_emb(x, torch.arange(T)[None])
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        x = published.layer(x, position_embeddings=rotary, attention_mask=mask)
        wanted = published.model.lm_head(parts["norm"](x))
        h = ours.stack(ours.embed_tokens(ids[:, :-1]), Span.whole(ids[:, :-1]))[0]
        got = ours.lm_head(ours.mtp(ours.embed_tokens(ids[:, 1:]), h, Span.whole(h))[0])
    assert_close(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    loss = ours(ids, labels=ids, mtp_weight=WEIGHT).mtp_loss
    assert_close(loss, F.cross_entropy(wanted[:, :-1].mT, ids[:, 2:], reduction="sum") / (2 * 16), rtol=1e-4, atol=0)


def test_the_way_back(published, tmp_path):
    """Byte for byte; and as new, without what was remembered of the origin, under the same names."""
    convert(published.folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (published.folder / name).read_bytes(), name
    (tmp_path / "ours" / "seqzoo_origin.json").unlink()
    convert(tmp_path / "ours", tmp_path / "new", to="qwen3_next")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    made = load_file(tmp_path / "new" / "model.safetensors")
    assert published.tensors.keys() == {x for x in made if x.startswith("mtp.")}
    assert_close({x: made[x] for x in published.tensors}, published.tensors, rtol=0, atol=0)
    theirs, ids = Qwen3NextForCausalLM.from_pretrained(tmp_path / "new"), torch.randint(VOCAB, (1, 9))
    theirs.set_experts_implementation("eager")
    assert torch.equal(theirs(ids).logits, published.model(ids).logits)


def test_a_config_that_does_not_ask_keeps_them_as_they_are(published, tmp_path):
    (tmp_path / "theirs").mkdir()
    for path in published.folder.iterdir():
        (tmp_path / "theirs" / path.name).write_bytes(path.read_bytes())
    config = json.loads((published.folder / "config.json").read_text())
    change = lambda **more: (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | more))
    change(num_nextn_predict_layers=0)
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert SeqZooConfig.from_pretrained(tmp_path / "ours").mtp is None
    assert load_file(tmp_path / "ours" / "seqzoo_extra.safetensors").keys() == published.tensors.keys()
    for count, error in (
        (2, "mtp.layers.1"),
        (-1, "num_nextn_predict_layers: expected a whole number, 0 or more, got -1"),
    ):
        change(num_nextn_predict_layers=count)
        with pytest.raises(ValueError, match=error):
            convert(tmp_path / "theirs", tmp_path / f"wrong {count}")


def test_parts_by_other_names_are_the_same_model(published):
    theirs = json.loads((published.folder / "config.json").read_text())
    ours = qwen3_next.to_ours(theirs)
    text = ours.to_json_string().replace("full", "attends").replace('"moe": {', '"experts": {')
    renamed = SeqZooConfig.from_dict(json.loads(text.replace("/moe", "/experts")))
    assert renamed.mtp == {"pattern": ["attends/experts"]}
    assert qwen3_next.to_theirs(renamed) == qwen3_next.to_theirs(ours)


def test_architectures_without_it_say_so(model):
    with pytest.raises(ValueError, match="mtp layer 0"):
        qwen3_5_text.to_theirs(model.config)
