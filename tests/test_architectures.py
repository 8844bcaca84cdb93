"""Every architecture that can be converted, against Transformers' own class: one row of `checkpoints.py` each."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import SMALL, VOCAB, small
from test_convert import assert_relative, assert_same_folder, padded
from transformers import AutoModelForCausalLM

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert import architecture, convert
from seqzoo.models.convert.rules import describe, differences


@pytest.fixture(scope="module", params=[(kind, shape) for kind, row in SMALL.items() for shape in row.shapes], ids=str)
def pair(request, tmp_path_factory):
    """Theirs, and ours from its converted folder."""
    kind, shape = request.param
    theirs, folder = small(kind, shape), tmp_path_factory.mktemp("pair")
    theirs.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    ours = AutoModelForCausalLM.from_pretrained(folder / "ours")
    assert type(ours) is SeqZooForCausalLM
    return SimpleNamespace(kind=kind, theirs=theirs, ours=ours.eval(), folder=folder)


@pytest.mark.parametrize("T", [1, 17, 70])
def test_logits(pair, T):
    ids = torch.randint(VOCAB, (2, T))
    assert_relative(pair.ours(ids).logits, pair.theirs(ids).logits)


def test_logits_with_padding(pair):
    ids, mask = padded()
    ours, theirs = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (pair.ours, pair.theirs))
    assert_relative(ours, theirs)


def test_gradients(pair):
    """The same loss, and the same gradient of what is at the bottom and of what is at the top."""
    ids, found = torch.randint(1, VOCAB, (2, 19)), []
    for model in (pair.ours, pair.theirs):
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss, *(x.weight.grad for x in (model.get_input_embeddings(), model.get_output_embeddings()))])
    for ours, theirs in zip(*found, strict=True):
        assert_relative(ours[1:] if ours.ndim else ours, theirs[1:] if theirs.ndim else theirs, bound=3e-4)


@pytest.mark.parametrize("padding", [False, True])
def test_generation_token_for_token(pair, padding):
    ids, mask = padded(T=11) if padding else (torch.randint(2, VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.long))
    how = dict(attention_mask=mask, max_new_tokens=16, do_sample=False)
    ours, theirs = pair.ours.generate(ids, **how), pair.theirs.generate(ids, use_cache=SMALL[pair.kind].cached, **how)
    assert torch.equal(ours, theirs) and ours.shape[1] == ids.shape[1] + 16


def test_the_way_back_is_identical(pair, tmp_path):
    convert(pair.folder / "ours", tmp_path / "back")
    assert_same_folder(pair.folder / "theirs", tmp_path / "back")


def test_what_was_made_here_becomes_theirs(pair, tmp_path):
    """A model of ours that came from nowhere, in the same shape, and names no tokens."""
    facts = pair.ours.config.to_dict().items()
    config = SeqZooConfig.from_dict({name: x for name, x in facts if not name.endswith("_token_id")})
    ours = SeqZooForCausalLM(config).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.25)
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to=pair.kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", experts_implementation="eager")
    assert type(theirs) is SMALL[pair.kind].model
    ids = torch.randint(VOCAB, (2, 17))
    assert_relative(ours(ids).logits, theirs.eval()(ids).logits)


def test_in_halves_and_in_shards(pair, tmp_path):
    theirs = pair.theirs
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    theirs.to(torch.float32)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_folder(tmp_path / "theirs", tmp_path / "back")


def test_config_there_and_back(pair):
    """What is derived from ours alone is their model again."""
    arch = architecture(pair.kind)
    again = SMALL[pair.kind].config.from_dict(arch.to_theirs(pair.ours.config))
    assert differences(describe(arch.to_ours(again.to_dict())), describe(pair.ours.config)) == []


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_one_that_sees(kind, tmp_path):
    """Its text part is ours, its eyes are kept, the way back is identical; a model without eyes is none of these."""
    import transformers

    name = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[kind]
    text = small(f"{kind}_text", "as published").config
    eyes = dict(
        depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=24, num_position_embeddings=16
    )
    config = getattr(transformers, f"{name}Config")(text_config=text.to_dict(), vision_config=eyes)
    theirs = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    theirs.set_experts_implementation("eager")
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.25)
    theirs.save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert any("visual" in key for fate in report.fates if fate.what == "kept" for key in fate.sources)
    ours, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), torch.randint(VOCAB, (2, 17))
    assert_relative(ours(ids).logits, theirs(input_ids=ids).logits)
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_folder(tmp_path / "theirs", tmp_path / "back")
    ours.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="with vision: expected a folder that came of one; write .*_text. instead"):
        convert(tmp_path / "alone", tmp_path / "no", to=kind)
