"""A released BDH and ours are one model: logits by the published formulas, and the way back byte for byte."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bdh import published, small
from test_convert import assert_same_folder
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import seqzoo  # noqa: F401 - makes the auto classes know ours
from seqzoo.models import SeqZooForCausalLM
from seqzoo.models.convert import bdh, convert

CONFIG = dict(n_layer=3, n_embd=12, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=19, dropout=0.1)
H, D, N, V = 2, 12, 24, 19


def released(prefix=""):
    """A state dict as released, drawn wide enough that everything counts."""
    draw = lambda *shape: 0.3 * torch.randn(shape)
    tensors = dict(decoder=draw(H * N, D), encoder=draw(H, D, N), encoder_v=draw(H, D, N), lm_head=draw(D, V))
    pair = torch.arange(N) // 2 * 2
    freqs = (65536.0 ** (-pair / N) / (2 * torch.pi)).view(1, 1, 1, N)
    return {prefix + name: x for name, x in (tensors | {"embed.weight": draw(V, D), "attn.freqs": freqs}).items()}


def logits(tensors, ids):
    names = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
    return published(ids, *(tensors[name] for name in names), levels=3)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_there_and_back(prefix, dtype, tmp_path):
    theirs = {name: x if "freqs" in name else x.to(dtype) for name, x in released(prefix).items()}
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"model_type": "bdh", **CONFIG}))
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_folder(tmp_path / "theirs", tmp_path / "back")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(ours) is SeqZooForCausalLM and ours.config.blocks["bdh"]["dropout"] == 0.1
    assert {p.dtype for p in ours.parameters()} == {dtype}
    ids = torch.randint(V, (2, 40))
    wanted = logits({name.removeprefix(prefix): x.float() for name, x in theirs.items()}, ids)
    assert_close(ours.float()(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_trained_here_and_given_away(tmp_path):
    """No origin: the frequencies are added, under the names and shapes of their state dict."""
    ours = small(levels=2, neurons=24, dropout=0.2)
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="bdh")
    theirs, config = load_file(tmp_path / "theirs" / "model.safetensors"), json.loads(
        (tmp_path / "theirs" / "config.json").read_text()
    )  # fmt: skip
    assert config["n_layer"] == 2 and config["mlp_internal_dim_multiplier"] == 2 and config["dropout"] == 0.2
    assert set(theirs) == set(released()) and theirs["attn.freqs"].shape == (1, 1, 1, 12)
    ids = torch.randint(V, (1, 30))
    again = bdh.from_bdh_state_dict(theirs, num_layers=2, dropout=0.2).eval()
    assert torch.equal(again(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_state_dict_in_memory(prefix):
    theirs, ids = released(prefix), torch.randint(V, (2, 50))
    ours = bdh.from_bdh_state_dict(theirs, num_layers=3, dropout=0.1)
    assert all(p.requires_grad for p in ours.parameters())
    wanted = logits({name.removeprefix(prefix): x for name, x in theirs.items()}, ids)
    assert_close(ours.eval()(ids).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ladders_of_merged_models_are_seen(prefix, dtype, tmp_path):
    """Two models merged with the released recipe, or frequencies of another kind: no folder is read as one ladder."""
    parts = released(prefix), released(prefix)
    both = lambda name, dim: torch.cat([part[prefix + name] for part in parts], dim=dim)
    merged = {**parts[0], prefix + "encoder": both("encoder", 2), prefix + "encoder_v": both("encoder_v", 2)}
    decoder = torch.cat([part[prefix + "decoder"].unflatten(0, (H, N)) for part in parts], dim=1).flatten(0, 1)
    merged |= {prefix + "decoder": decoder, prefix + "attn.freqs": both("attn.freqs", 3)}
    merged = {name: x.to(dtype) for name, x in merged.items()}
    ours = bdh.from_bdh_state_dict(merged, num_layers=3)
    assert ours.config.blocks["bdh"]["ladders"] == 2
    theirs, config = tmp_path / "theirs", dict(CONFIG, model_type="bdh", mlp_internal_dim_multiplier=8)
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(config))
    others = merged | {prefix + "attn.freqs": 2 * merged[prefix + "attn.freqs"]}
    for tensors, message in ((merged, "expected 1 ladder, got 2"), (others, "expected ladders of theta")):
        save_file(tensors, theirs / "model.safetensors")
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=f"attn.freqs: {message}"):
                convert(theirs, tmp_path / "ours", dry_run=dry_run)


def test_says_what_is_wrong(tmp_path):
    theirs = released()
    with pytest.raises(ValueError, match="state dict: expected .* got"):
        bdh.from_bdh_state_dict({name: x for name, x in theirs.items() if name != "decoder"}, num_layers=1)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected \[19, 12\], got \[18, 12\]"):
        bdh.from_bdh_state_dict(theirs | {"lm_head": theirs["lm_head"][:, 1:]}, num_layers=1)
    with pytest.raises(ValueError, match="attn.freqs: expected ladders"):
        bdh.from_bdh_state_dict(theirs | {"attn.freqs": 2 * theirs["attn.freqs"]}, num_layers=1)
    with pytest.raises(ValueError, match=r"config.json: expected keys of .* got \['n_laier'\]"):
        bdh.to_ours(CONFIG | {"n_laier": 3})
    with pytest.raises(ValueError, match="n_embd: expected at least 1, got 0"):
        bdh.to_ours(CONFIG | {"n_embd": 0})
    for change in (dict(ladders=2), dict(decay=[0.1, 0.1]), dict(residual="neuron"), dict(neurons=20)):
        with pytest.raises(ValueError, match=f"BDH as released cannot express: .*{[*change][0]}"):
            bdh.to_theirs(small(**({"neurons": 48} | change)).config)
