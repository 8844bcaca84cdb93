"""OLMo-Hybrid's folders: as published, as transformers writes them and as it holds them; what it cannot express."""

import pytest
import torch
from checkpoints import small
from safetensors.torch import load_file
from test_convert import assert_relative, rewrite, there_and_back
from transformers import AutoModelForCausalLM, OlmoHybridForCausalLM

from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert import convert, olmo_hybrid
from seqzoo.models.convert.folders import open_as_ours
from seqzoo.models.convert.rules import describe, differences

SHAPE = "as published"
WIDTHS = [12, 12, 28]  # of its q, k and v, which are no thirds


def published(tensors):
    """What transformers wrote, with the names that the release has, and q, k and v apart."""
    for name in list(tensors):
        if name.endswith("q_conv1d.weight"):
            names = [name.replace("q_conv1d", f"{x}_conv1d") for x in "qkv"]
            tensors |= zip(names, torch.cat([tensors[x] for x in names]).split(WIDTHS), strict=True)
    norm = tensors.pop("model.layers.3.feedforward_layer_norm.weight")
    tensors["model.layers.3.post_attention_layernorm.weight"] = norm
    tensors.update({name: x.contiguous() for name, x in tensors.items()})


def held(tensors):
    """As the model in memory has it."""
    tensors.clear()
    tensors.update(small("olmo_hybrid", SHAPE).state_dict())


@pytest.mark.parametrize("form", [published, held], ids=lambda form: form.__name__)
def test_other_forms_of_a_folder(form, tmp_path):
    """They open as the same model, theirs and ours, and the way back is to the same form."""
    theirs = small("olmo_hybrid", SHAPE)
    theirs.save_pretrained(tmp_path / "theirs")
    before = set(load_file(tmp_path / "theirs" / "model.safetensors"))
    rewrite(tmp_path / "theirs", form)
    assert set(load_file(tmp_path / "theirs" / "model.safetensors")) != before
    ours, ids = (
        AutoModelForCausalLM.from_pretrained(there_and_back(tmp_path / "theirs", tmp_path)),
        torch.arange(12)[None],
    )
    assert_relative(ours(ids).logits, theirs(ids).logits)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_a_model_made_here_is_written_as_published(tmp_path):
    convert_from_nothing(tmp_path)
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {n.split(".")[3] for n in tensors if ".0." in n and "norm" in n and "linear_attn" not in n} == {
        "attention_layer_norm", "feedforward_layer_norm",
    }  # fmt: skip
    assert {n.split(".")[3] for n in tensors if ".3." in n and "norm" in n and "self_attn" not in n} == {
        "post_attention_layernorm", "post_feedforward_layernorm",
    }  # fmt: skip
    assert [len(tensors[f"model.layers.0.linear_attn.{x}_conv1d.weight"]) for x in "qkv"] == WIDTHS
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")) is OlmoHybridForCausalLM


def convert_from_nothing(tmp_path):
    small("olmo_hybrid", SHAPE).save_pretrained(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "ours")
    (tmp_path / "ours" / "seqzoo_origin.json").unlink()
    convert(tmp_path / "ours", tmp_path / "theirs")


def test_a_convolution_cut_otherwise_is_refused(tmp_path):
    small("olmo_hybrid", SHAPE).save_pretrained(tmp_path / "theirs")

    def change(tensors):
        q, k = (f"model.layers.1.linear_attn.{x}_conv1d.weight" for x in "qk")
        tensors[q], tensors[k] = torch.cat([tensors[q], tensors[k]]).split([10, 26])
        tensors |= {name: tensors[name].clone() for name in (q, k)}

    rewrite(tmp_path / "theirs", change)
    with pytest.raises(ValueError, match=r"layers.1.linear_attn.q_conv1d.weight: expected shape \[18, 1, 4\], got"):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_at_once_and_in_pieces_are_the_same(tmp_path):
    small("olmo_hybrid", SHAPE).save_pretrained(tmp_path / "theirs")
    opened = open_as_ours(tmp_path / "theirs", "olmo_hybrid")
    steps = [step for step in opened.steps if step.comes_in_pieces and len(step.sources) > 1]
    assert {len(step.sources) for step in steps} == {2, 3}
    for step in steps:
        (whole,) = step.run(opened.source.read).values()
        assert torch.equal(torch.cat(list(step.pieces(opened.source.read))), whole)


def ours_of(**other):
    return olmo_hybrid.to_ours(small("olmo_hybrid", SHAPE, **other).config.to_dict())


def test_nothing_is_turned_where_the_base_is_null():
    assert ours_of().blocks["full"]["mixer"]["rotary_width"] == 0
    turned = ours_of(rope_parameters=dict(rope_type="default", rope_theta=500.0)).blocks["full"]["mixer"]
    assert (turned["rotary_width"], turned["rope_theta"]) == (6, 500.0)


@pytest.mark.parametrize(
    "part, change, named",
    [
        ("delta", dict(norm_eps=1e-6), "layer 0 mixer norm_eps: 1e-06, not 1e-05"),
        ("delta", dict(bias=True), "layer 0 mixer bias"),
        ("mixer", dict(window=5), "layer 3 block mixer window: 5, not None"),
        ("mixer", dict(qk_norm="rms"), "layer 3 block mixer qk_norm"),
        ("mixer", dict(head_width=8), "layer 3 block mixer head_width: 8, not 6"),
        ("mixer", dict(output_gate=True), "layer 3 block mixer output_gate"),
        ("channel", dict(bias=True), "layer 3 block channel bias"),
        ("full", dict(norm="zero_centred"), "layer 3 block norm: 'zero_centred', not 'rms'"),
        ("full", dict(kind="residual"), "layer 3, 'full', residual of attention of swiglu"),
    ],
)
def test_what_it_cannot_express_is_named(part, change, named):
    ours = ours_of()
    block = ours.blocks["full"]
    dict(delta=ours.mixers["delta"], full=block, mixer=block["mixer"], channel=block["channel"])[part].update(change)
    with pytest.raises(ValueError, match=f"OLMo-Hybrid cannot express: .*{named}"):
        olmo_hybrid.to_theirs(ours)


def test_what_is_left_open_is_as_the_other():
    """A base that turns nothing does not matter either."""
    ours = ours_of()
    open_ = SeqZooConfig.from_dict(ours.to_dict())
    open_.blocks["full"]["mixer"].update(out_bias=None, rope_theta=5e5)
    assert differences(describe(olmo_hybrid.to_ours(olmo_hybrid.to_theirs(open_))), describe(ours)) == []


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'"),
        (dict(num_attention_heads=5), "hidden_size: expected a multiple of 5 heads, got 24"),
        (dict(layer_types=["full_attention"] * 4), "no OLMo-Hybrid config"),
        (dict(layer_types=["linear_attention"] * 3 + ["sliding_attention"]), "layer_types: expected"),
    ],
)
def test_a_config_it_does_not_have_is_refused(change, named):
    config = small("olmo_hybrid", SHAPE).config.to_dict()
    with pytest.raises(ValueError, match=f"config.json: {named}"):
        olmo_hybrid.to_ours(config | change)
