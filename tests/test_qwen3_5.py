"""Qwen3.5's folders beyond the plain ones: with vision and all that lies beside it, and the text part taken out."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from checkpoints import VOCAB, small
from safetensors.torch import load_file, save_file
from test_convert import assert_relative, rewrite, there_and_back
from transformers import AutoModelForCausalLM

import seqzoo
from seqzoo.models.convert import architecture, convert

CLASS = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
EYES = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=24, num_position_embeddings=16)


@pytest.fixture(scope="module", params=[(kind, tied) for kind in CLASS for tied in (False, True)], ids=str)
def seeing(request, tmp_path_factory):
    """A model with vision, its folder with what else a released one has, and what it says of some text."""
    (kind, tied), folder = request.param, tmp_path_factory.mktemp("seeing")
    text = small(f"{kind}_text", "as published", tie_word_embeddings=tied).config.to_dict()
    config = getattr(transformers, f"{CLASS[kind]}Config")(
        text_config=text, vision_config=EYES, tie_word_embeddings=tied
    )
    model = getattr(transformers, f"{CLASS[kind]}ForConditionalGeneration")(config).eval()
    model.set_experts_implementation("eager")
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    model.save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.randn(24, 48)}))
    (folder / "preprocessor_config.json").write_text('{"patch_size": 16}')
    ids = torch.randint(VOCAB, (2, 17))
    return SimpleNamespace(kind=kind, model=model, folder=folder, ids=ids, logits=model(input_ids=ids).logits.detach())


def test_a_whole_folder(seeing, tmp_path):
    """There and back with eyes, token prediction and files beside them; theirs and ours agree, as `verify` finds."""
    ours = there_and_back(seeing.folder, tmp_path, verify=True)
    kept = load_file(ours / "seqzoo_extra.safetensors")
    assert "mtp.fc.weight" in kept and any(name.startswith("model.visual.") for name in kept)
    assert (ours / "preprocessor_config.json").is_file()
    assert_relative(AutoModelForCausalLM.from_pretrained(ours)(seeing.ids).logits, seeing.logits)


def test_opened_directly(seeing):
    assert_relative(seqzoo.load(seeing.folder)(seeing.ids).logits, seeing.logits)


def test_as_the_model_holds_it(seeing, tmp_path):
    """Experts in stacks, as some are released."""
    (tmp_path / "theirs").mkdir()
    seeing.model.config.save_pretrained(tmp_path / "theirs")
    tensors = {name: x.clone() for name, x in seeing.model.state_dict().items()}
    stacked = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert (stacked in tensors) == (seeing.kind == "qwen3_5_moe")
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    ours = AutoModelForCausalLM.from_pretrained(there_and_back(tmp_path / "theirs", tmp_path))
    assert_relative(ours(seeing.ids).logits, seeing.logits)


def test_the_text_part_that_transformers_takes_out(seeing, tmp_path):
    """Saved again it is a text model; transformers 5.24 leaves it the names it had in the folder with vision."""
    AutoModelForCausalLM.from_pretrained(seeing.folder).save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == f"{seeing.kind}_text"
    ours = AutoModelForCausalLM.from_pretrained(there_and_back(tmp_path / "theirs", tmp_path))
    assert_relative(ours(seeing.ids).logits, seeing.logits)


def test_trained_on_it_sees_again(seeing, tmp_path):
    """Weights that have changed go back beside the eyes they came with, into a folder that theirs opens."""
    convert(seeing.folder, tmp_path / "ours")
    rewrite(tmp_path / "ours", lambda tensors: tensors["stack.norm.weight"].add_(0.5))
    convert(tmp_path / "ours", tmp_path / "back")
    theirs = getattr(transformers, f"{CLASS[seeing.kind]}ForConditionalGeneration").from_pretrained(
        tmp_path / "back", experts_implementation="eager"
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    logits = theirs.eval()(input_ids=seeing.ids).logits
    assert_relative(ours(seeing.ids).logits, logits)
    assert (logits - seeing.logits).abs().max() > 0.1 * seeing.logits.abs().max()
    old, new = (dict(model.model.visual.named_parameters()) for model in (seeing.model, theirs))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("kind", CLASS)
def test_a_config_without_text_is_refused(kind):
    with pytest.raises(ValueError, match="text_config: expected a mapping, got None"):
        architecture(kind).to_ours({"model_type": kind})


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_steps_up_to_2_are_refused(kind):
    ours = architecture(kind).to_ours(small(kind, "as published").config.to_dict())
    ours.mixers["delta"]["beta_scale"] = 2.0
    with pytest.raises(ValueError, match="layer 0 mixer beta_scale: 2.0, not 1.0"):
        architecture(kind).to_theirs(ours)
