"""Transformers into other layouts: what is learned is used again, what stays attention is the same, the rest is new."""

import json
from copy import deepcopy

import pytest
import torch
from checkpoints import SMALL, VOCAB, small
from test_convert import assert_relative
from torch.testing import assert_close

import seqzoo
from seqzoo.data.tokenizer import load_tokenizer
from seqzoo.layers.registry import build, complete, kinds
from seqzoo.models.calls import mixer_calls
from seqzoo.models.checkpoints import Folder
from seqzoo.models.convert import convert, int8
from seqzoo.models.convert.adopt import adopter, adopters
from seqzoo.models.convert.approximate import RECORD, Fresh, to_layout, transfer
from seqzoo.models.convert.calibration import (
    calibration_ids,
    changed_layers,
    importance,
    layer_errors,
    most_important,
)
from seqzoo.models.convert.cli import main
from seqzoo.models.convert.layouts import layout, layouts
from seqzoo.models.quantise import quantise

SOURCES = [
    ("llama", "plain"),
    ("llama", "biases, tied"),
    ("qwen2", "plain, tied"),
    ("qwen3", "plain"),
    ("qwen3_moe", "plain"),
]
OPTIONS = {  # a mixer that can be made of attention -> what it must be told
    "attention": dict(window=5),
    "gated_deltanet": {},
    "kimi_delta_attention": {},
    "latent_attention": dict(latent_width=12, shared_width=4, rope_theta=1e3),
    "lightning_attention": {},
    "linear_attention": dict(feature="relu", decay="channel", decay_rank=3),
    "momentum_attention": dict(gamma=0.5),
    "momentum_deltanet": {},
    "ovq_attention": dict(chunk=8, slots=16),
    "parallel": dict(
        branches=dict(
            a=dict(kind="linear_attention"),
            b=dict(kind="attention", window=7, output_gate=True),
            c=dict(kind="latent_attention", latent_width=9),
        )
    ),
}


def one(kind, **options):
    return layout(dict(mixers=dict(new=dict(kind=kind, **(options or OPTIONS[kind]))), pattern=["new", "keep"]))


@pytest.fixture(scope="module", params=SOURCES, ids=str)
def folder(request, tmp_path_factory):
    """Of theirs."""
    path = tmp_path_factory.mktemp("theirs")
    small(*request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def source(folder):
    return seqzoo.load(folder)


def test_every_mixer_has_a_row():
    assert sorted(OPTIONS) == adopters() == kinds("mixers")  # all of the zoo can be made of attention


@pytest.mark.parametrize("kind", OPTIONS)
def test_made_of_attention(source, kind):
    """Runs, steps as it runs whole, learns in every tensor; kept layers and all else are the very tensors."""
    made = to_layout(source, one(kind)).eval()
    assert changed_layers(source.config, made.config) == [0, 2]
    ids = torch.randint(VOCAB, (2, 21))
    whole, cache = made(ids).logits, None
    for part in ids.split([9, 1, 1, 10], dim=1):
        out = made(part, cache=cache, use_cache=True)
        cache = out.cache
    assert_relative(out.logits, whole[:, -10:], bound=1e-4)
    made = to_layout(source, one(kind)).train()
    made(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)
    source.zero_grad()
    theirs = source.state_dict()
    for name, x in made.state_dict().items():
        if ".1." in name or ".channel" in name or "mixer_norm" in name or not name.startswith("stack.blocks"):
            assert x.data_ptr() == theirs[name].data_ptr(), name


@pytest.mark.parametrize(
    "kind, same",
    [
        ("attention", dict(window=64)), ("attention", dict(output_gate=True)), ("momentum_attention", dict(gamma=0.0)),
    ],
)  # fmt: skip
def test_what_changes_nothing_changes_nothing(source, kind, same):
    ids = torch.randint(VOCAB, (2, 21))
    assert_relative(to_layout(source, one(kind, **same)).eval()(ids).logits, source(ids).logits, bound=1e-6)


def latents_of(attention, wanted, width):
    """An attention layer and the latent one that is made of it."""
    spec = complete("mixers", dict(kind="attention", num_heads=4, head_width=6, rotary_width=0) | attention)
    made = complete("mixers", adopter("latent_attention").complete(spec, dict(kind="latent_attention") | wanted))
    torch.manual_seed(0)
    theirs, ours = build("mixers", spec, width), build("mixers", made, width)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    have = theirs.state_dict()
    for those, these, how in adopter("latent_attention").rows(spec, made):
        those, these = ((x,) if isinstance(x, str) else x for x in (those, these))
        for name, x in zip(these, how.there(*(have[n] for n in those)), strict=True):
            assert ours.get_parameter(name).shape == x.shape, name
            ours.get_parameter(name).data = x
    return theirs, ours


@pytest.mark.parametrize("bias, out", [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("query_rank", [None, 24])
def test_latents_are_the_attention(bias, out, query_rank):
    """At full width, but for the norms of latents, which attention without turns does not have; biases and all."""
    attention = dict(num_kv_heads=2, bias=bias, out_bias=out)
    theirs, ours = latents_of(attention, dict(latent_width=24, shared_width=3, query_rank=query_rank), 24)
    ours.kv_norm = torch.nn.Identity()
    ours.q_norm = torch.nn.Identity() if query_rank else None
    x = torch.randn(2, 11, 24)
    assert_relative(ours(x)[0], theirs(x)[0], bound=1e-5)


@pytest.mark.parametrize("kv_heads, width, rank", [(2, 24, 24), (4, 24, None), (4, 48, 40)])
def test_latents_of_any_width(kv_heads, width, rank):
    """With their norms, of inputs of unit size: the attention, also where latents have more channels than x."""
    theirs, ours = latents_of(dict(num_kv_heads=kv_heads), dict(latent_width=width, query_rank=rank), 24)
    x = torch.randn(2, 11, 24)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    assert_relative(ours(x)[0], theirs(x)[0], bound=1e-4)


def test_latents_of_weights_that_are_none(tmp_path, capsys):
    """Nothing but zeros is converted; what is no number is said in a line."""
    wanted = dict(mixers=dict(a=dict(kind="latent_attention", latent_width=9)), pattern=["a"])
    (tmp_path / "latent.yaml").write_text(json.dumps(wanted))
    theirs = small("llama", "plain")
    theirs.model.layers[0].self_attn.k_proj.weight.data.zero_()
    theirs.model.layers[1].self_attn.v_proj.weight.data.zero_()
    theirs.save_pretrained(tmp_path / "zeros")
    assert main([str(tmp_path / "zeros"), str(tmp_path / "ours"), f"--to={tmp_path / 'latent.yaml'}"]) == 0
    theirs.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    theirs.save_pretrained(tmp_path / "nan")
    assert main([str(tmp_path / "nan"), str(tmp_path / "no"), f"--to={tmp_path / 'latent.yaml'}"]) == 2
    assert "expected finite weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="shared_width: expected a number of channels, got -1"):
        to_layout(seqzoo.load(tmp_path / "zeros"), one("latent_attention", latent_width=9, shared_width=-1))


@pytest.mark.parametrize("name", layouts())
def test_a_folder_is_what_it_is_in_memory(folder, source, name, tmp_path):
    """Tensor after tensor, as all at once; and the report has every tensor."""
    how = dict(keep=[2], seed=3)
    report = convert(folder, tmp_path / "ours", to=name, verify=True, **how)
    assert {f.what for f in report.fates} >= {"copied"} and "mixers are others" in report.verification.said
    made, expected = seqzoo.load(tmp_path / "ours"), to_layout(source, layout(name), **how).eval()
    for key, x in expected.state_dict().items():
        assert torch.equal(made.state_dict()[key], x), key
    ids = torch.randint(VOCAB, (2, 21))
    assert torch.equal(made(ids).logits, expected(ids).logits)
    targets = [key for fate in report.fates for key in fate.targets]
    assert sorted(targets) == sorted(Folder(tmp_path / "ours").heads)
    sources = {key for fate in report.fates for key in fate.sources}
    assert sources == set(Folder(folder).heads)
    record = json.loads((tmp_path / "ours" / RECORD).read_text())
    assert record["converted"] == changed_layers(source.config, made.config) and 2 in record["kept"]


def test_a_qwen2_becomes_a_published_spikingbrain(tmp_path):
    """What SpikingBrain-7B is made as goes on into its own format, with the source's tensors under its names."""
    small("qwen2", "plain, tied", num_hidden_layers=2, tie_word_embeddings=False).save_pretrained(tmp_path / "qwen2")
    convert(tmp_path / "qwen2", tmp_path / "ours", to="spikingbrain_7b")
    convert(tmp_path / "ours", tmp_path / "gla_swa", to="gla_swa")
    theirs, made = Folder(tmp_path / "qwen2"), Folder(tmp_path / "gla_swa")
    for layer in (0, 1):
        for a, b in (("self_attn.q_proj.bias", "attn.q_proj.bias"), ("mlp.up_proj.weight", "mlp.up_proj.weight")):
            here, there = f"model.layers.{layer}.{a}", f"model.layers.{layer}.{b}"
            assert torch.equal(theirs.read(here), made.read(there))
    assert json.loads((tmp_path / "gla_swa" / "config.json").read_text())["sliding_window"] == 4096
    assert (tmp_path / "ours" / RECORD).is_file() and not (tmp_path / "gla_swa" / RECORD).exists()
    grown = dict(moe=dict(kind="moe", num_experts=2, num_experts_per_token=1, renormalise=True))
    convert(tmp_path / "ours", tmp_path / "again", to=dict(channels=grown, pattern=["keep/moe"]))
    record = json.loads((tmp_path / "again" / RECORD).read_text())
    assert record["grown"] == [0, 1] and record["converted"] == []


def test_new_tensors_are_of_the_seed_alone(source):
    """Whatever is asked for first, and whatever was drawn before."""
    config = transfer(source.config, layout("spikingbrain_7b")).config
    name = "stack.blocks.0.mixer.decay_down.weight"
    one, other = Fresh(config, 5), Fresh(config, 5)
    torch.rand(7)
    other("stack.blocks.2.mixer.decay_up.weight")
    assert torch.equal(one(name), other(name)) and not torch.equal(one(name), Fresh(config, 6)(name))
    limit = 2**-2.5 * (6 / sum(one(name).shape)) ** 0.5  # Xavier's, as the released class draws it
    assert 0.8 * limit < one(name).abs().max() <= limit


@pytest.mark.parametrize("scale, near", [("down", 1e-5), ("each", None)])
def test_experts_do_what_the_mlp_did(scale, near, tmp_path):
    """Exact for `down` with renormalised weights, whatever the router says; scaled matrix by matrix only nearly."""
    small("llama", "plain").save_pretrained(tmp_path / "llama")
    grown = dict(
        channels=dict(moe=dict(kind="moe", num_experts=4, num_experts_per_token=2, renormalise=True, shared_gate=True)),
        pattern=["keep/moe", "keep"],
    )
    report = convert(tmp_path / "llama", tmp_path / "ours", to=grown, scale=scale)
    assert {"upcycled", "zero", "fresh"} <= {fate.what for fate in report.fates}
    dense, made = seqzoo.load(tmp_path / "llama"), seqzoo.load(tmp_path / "ours")
    ids = torch.randint(VOCAB, (2, 21))
    a, b = made(ids).logits, dense(ids).logits
    assert_relative(a, b, bound=near) if near else assert_close(a, b, atol=0.3 * b.abs().max().item(), rtol=0)
    assert near or not torch.allclose(a, b, atol=1e-3)
    assert json.loads((tmp_path / "ours" / RECORD).read_text())["grown"] == [0, 2]


def test_errors_are_measured_with_the_sinks_that_a_layer_sees(source):
    """The first layer gets the same in both models: its error is that of its outputs as they run."""
    made = to_layout(source, layout("spikingbrain_76b")).eval()
    ids = torch.randint(VOCAB, (2, 21))
    (_, got), (_, expected) = (mixer_calls(model, ids)[0] for model in (made, source))
    wanted = ((got - expected).norm() / expected.norm()).item()
    assert layer_errors(source, made, ids)[0] == pytest.approx(wanted, rel=1e-5)
    made.sink_tokens = None
    assert layer_errors(source, made, ids)[0] != pytest.approx(wanted, rel=2e-5)


def test_the_layer_that_matters_stays(tmp_path, capsys):
    """Importance finds the one layer that does something, by the API and by the command."""
    from transformers import AutoTokenizer

    theirs = small("llama", "plain", vocab_size=264, num_hidden_layers=4)
    for i, layer in enumerate(theirs.model.layers):
        layer.self_attn.o_proj.weight.data *= 1.0 if i == 2 else 1e-3
    theirs.save_pretrained(tmp_path / "llama")
    load_tokenizer(None).save(tmp_path / "llama")
    source = seqzoo.load(tmp_path / "llama")
    made = to_layout(source, layout("spikingbrain_7b")).eval()
    losses = importance(source, made, torch.randint(264, (2, 64)))
    assert most_important({**losses}, 1) == [2] and losses[2] > 10 * losses[0]
    errors = layer_errors(source, made, torch.randint(264, (2, 64)))
    assert errors[0] > 0.1 and errors[1] < 1e-5  # a window of 4096 sees all 64
    (tmp_path / "text").write_text("def " * 200)
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")("def ")["input_ids"][-4:] == list(b"def ")
    words = [str(tmp_path / x) for x in ("llama", "ours")]
    assert main([*words, "--to=gated_deltanet", "--keep-important=1", f"--calibrate={tmp_path / 'text'}"]) == 0
    assert "layer 2: " in capsys.readouterr().out
    assert 2 in json.loads((tmp_path / "ours" / RECORD).read_text())["kept"]


@pytest.mark.parametrize(
    "what, how, words",
    [
        ("nowhere", {}, "layout: expected one of .*gated_deltanet.* or a YAML file, got 'nowhere'"),
        (dict(pattern=[]), {}, "pattern: expected a list of names"),
        (dict(pattern=["a"]), {}, r"pattern: expected 'keep' or one of \[\] \(mixers\), got 'a'"),
        (dict(pattern=["keep"], width=3), {}, "expected pattern and others of"),
        (dict(pattern=["a"], mixers=dict(a=dict(kind="bdh"))), {}, "expected kinds that can be made of attention"),
        (
            dict(pattern=["a"], mixers=dict(a=dict(kind="linear_attention", num_heads=3))),
            {},
            r"linear_attention: expected options beside what the attention layer decides, got \['num_heads'\]",
        ),
        (dict(pattern=["a"], mixers=dict(a=dict(kind="parallel"))), {}, "parallel: branches: expected"),
        (
            dict(pattern=["a"], mixers=dict(a=dict(kind="latent_attention"))),
            {},
            "latent_width: expected 1 to 24, as wide as k and v, got None",
        ),
        (
            dict(
                pattern=["keep/a"],
                channels=dict(a=dict(kind="moe", num_experts=2, num_experts_per_token=1, expert_width=3)),
            ),
            {},
            "experts of the MLP's width",
        ),
        ("gated_deltanet", dict(keep=[7]), r"keep: expected layers of 0 to 2, got \[7\]"),
        ("gated_deltanet", dict(keep=0), "keep: expected every n-th layer"),
        ("gated_deltanet", dict(scale="up"), "scale: expected one of"),
        ("seqzoo", dict(seed=1), "keep, scale, seed: expected with a layout alone"),
    ],
    ids=str,
)
def test_refused(what, how, words, tmp_path):
    small("llama", "plain").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "llama", tmp_path / "ours", to=what, **how)
    assert not (tmp_path / "ours").exists()


def test_rounded_on_the_way(folder, source, tmp_path):
    """Int8 weights, streamed: the very tensors of the converted model quantised in memory; it opens and generates."""
    how = dict(keep=[1], seed=3)
    report = convert(folder, tmp_path / "ours", to="spikingbrain_7b", quantise=dict(group=8), verify=True, **how)
    made = seqzoo.load(tmp_path / "ours")
    expected = quantise(to_layout(source, layout("spikingbrain_7b"), **how), group=8).state_dict()
    assert made.state_dict().keys() == expected.keys()
    for key, x in made.state_dict().items():
        assert torch.equal(x, expected[key]) and x.dtype == expected[key].dtype, key
    assert any(x.dtype == torch.int8 for x in expected.values()) and "rounded" in str(report)
    ids = torch.randint(2, VOCAB, (1, 9))
    assert made.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 13)
    assert sorted(key for fate in report.fates for key in fate.targets) == sorted(Folder(tmp_path / "ours").heads)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("to", [None, "spikingbrain_76b"])
def test_rounded_on_a_text(to, at_once, tmp_path, monkeypatch):
    """The very tensors of `quantise` with the ids of the text, also of experts, also where rows are rounded apart."""
    if not at_once:
        monkeypatch.setattr(int8, "_AT_ONCE", 0)
        monkeypatch.setattr("seqzoo.models.convert.folders.CHUNK", 300)
    small("qwen3_moe", "plain", vocab_size=264).save_pretrained(tmp_path / "theirs")
    load_tokenizer(None).save(tmp_path / "theirs")
    (tmp_path / "text").write_text("".join(f"def f{i}(x):\n    return {i} * x\n" for i in range(30)))
    words = [str(tmp_path / "theirs"), str(tmp_path / "ours"), *([f"--to={to}"] if to else [])]
    words.append(f"--calibrate={tmp_path / 'text'}")
    assert main(words) == 2  # for what?
    assert main([*words, "--quantise", "--group=16", f"--report={tmp_path / 'report.json'}"]) == 0
    text = calibration_ids(tmp_path / "theirs", tmp_path / "text", length=96, most=128)  # the longest that it takes
    assert len(text) > 4
    floats = seqzoo.load(tmp_path / "theirs")
    floats = to_layout(floats, layout(to)) if to else floats
    made, nearest = seqzoo.load(tmp_path / "ours").state_dict(), quantise(deepcopy(floats), group=16).state_dict()
    expected = quantise(floats, group=16, calibration=text).state_dict()
    assert made.keys() == expected.keys() and all(torch.equal(made[key], x) for key, x in expected.items())
    experts = "stack.blocks.0.channel.experts.down_proj.weight"
    assert not torch.equal(made[experts], nearest[experts])
    assert "rounded on text (" in (tmp_path / "report.json").read_text()
    with pytest.raises(ValueError, match="calibrate: expected a text file, got "):
        convert(tmp_path / "theirs", tmp_path / "no", quantise={}, calibrate=tmp_path / "none", dry_run=True)
    assert main([*words[:2], f"--calibrate={tmp_path / 'text'}", "--keep-important=1"]) == 2  # of what layout?
    with pytest.raises(ValueError, match="calibrate: expected with quantise alone"):
        convert(tmp_path / "theirs", tmp_path / "no", calibrate=tmp_path / "text")


def test_rounded_and_nothing_else(tmp_path):
    """An exact conversion may be rounded too, and has no way back then."""
    small("llama", "plain").save_pretrained(tmp_path / "llama")
    words = [str(tmp_path / x) for x in ("llama", "ours")]
    assert main([*words, "--quantise", "--group=16", "--skip=down_proj"]) == 0
    expected = quantise(seqzoo.load(tmp_path / "llama"), group=16, skip=["down_proj"]).state_dict()
    made = seqzoo.load(tmp_path / "ours").state_dict()
    assert made.keys() == expected.keys() and all(torch.equal(made[key], x) for key, x in expected.items())
    with pytest.raises(ValueError, match="Llama cannot express: quantisation"):
        convert(tmp_path / "ours", tmp_path / "back", to="llama")
    with pytest.raises(ValueError, match="quantise: expected a conversion into ours"):
        convert(tmp_path / "llama", tmp_path / "no", quantise={}, verify=True)


def test_from_headers_alone(tmp_path):
    small("llama", "plain").save_pretrained(tmp_path / "llama")
    table = str(convert(tmp_path / "llama", tmp_path / "ours", to="gated_deltanet", dry_run=True))
    assert "fused" in table and "fresh" in table and not (tmp_path / "ours").exists()


def test_every_kind_of_source_is_tried():
    plain = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"}
    assert plain <= set(SMALL) and {kind for kind, _ in SOURCES} >= plain - {"mistral"}  # which is llama with a window
