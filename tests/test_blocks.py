"""Blocks as a config names them. Their laws are those of mixers: test_mixers.py runs on them too."""

import pytest
import torch
from cases import BLOCKS
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_models import CONFIGS

from seqzoo.layers.registry import build, complete, kinds
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.cost import cost

PARTS = dict(
    mixer=BLOCKS["residual"]["mixer"], channel=dict(kind="moe", num_experts=4, num_experts_per_token=2, expert_width=8)
)
SIZES = dict(hidden_size=16, vocab_size=20, num_hidden_layers=2)


@pytest.mark.parametrize("kind", kinds("blocks"))
def test_the_yaml_has_every_option(kind):
    """configs/block/<kind>.yaml says all that `complete` would say: nothing is left to a default."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        said = compose("train", ["model=bdh_nano", f"+block@model.blocks.mine={kind}"]).model.blocks.mine
    said = OmegaConf.to_container(said, resolve=True)
    assert said == complete("blocks", said)
    build("blocks", said, 64)


def test_a_pattern_is_short_for_residual_blocks():
    """mixer/channel and a block of kind residual are the same model: parameters, logits, loss, metrics, cost."""
    pair = SeqZooConfig(pattern=["a/b"], mixers=dict(a=PARTS["mixer"]), channels=dict(b=PARTS["channel"]), **SIZES)
    named = SeqZooConfig(pattern=["c"], blocks=dict(c=dict(kind="residual", **PARTS)), **SIZES)
    assert named.blocks["c"]["channel"]["renormalise"] is True and named.blocks["c"]["mixer"]["conv_width"] == 4
    one, other = (SeqZooForCausalLM(c).eval() for c in (pair, named))
    other.load_state_dict(one.state_dict())
    ids = torch.randint(20, (2, 11))
    outs = [model(ids, labels=ids) for model in (one, other)]
    assert torch.equal(outs[0].logits, outs[1].logits) and torch.equal(outs[0].loss, outs[1].loss)
    assert one.metrics(outs[0].stats) == other.metrics(outs[1].stats)
    assert cost(pair, context=50).state_bytes == cost(named, context=50).state_bytes
    assert cost(pair, context=50).flops_per_token == cost(named, context=50).flops_per_token


def test_blocks_of_several_kinds_count_beside_each_other():
    """A metric is the mean over those that have it; what one kind adds to the loss, the other does not disturb."""
    blocks = dict(neurons=dict(kind="bdh", num_heads=2, neurons=24), experts=dict(kind="residual", **PARTS))
    model = SeqZooForCausalLM(SeqZooConfig(pattern=["neurons", "experts"], blocks=blocks, **SIZES))
    ids = torch.randint(20, (2, 11))
    out = model(ids, labels=ids)
    assert {"x_density", "xy_density", "load_entropy"} <= set(model.metrics(out.stats))
    assert out.aux_loss > 0
    model.after_step(out.stats)


@pytest.mark.parametrize("other", [dict(kind="bdh", num_heads=2, neurons=24), None], ids=["bdh", "more experts"])
def test_a_block_and_a_channel_of_one_name_count_apart(other):
    """Each as if the other's name were another: the counts of a block and of a channel are no one pool."""
    other = other or dict(kind="residual", **{**PARTS, "channel": {**PARTS["channel"], "num_experts": 7}})
    config = dict(mixers=dict(a=PARTS["mixer"]), channels=dict(same=PARTS["channel"]), **SIZES)
    added, ids = [], torch.randint(20, (2, 11))
    for name in ("x", "same", "x/same"):
        torch.manual_seed(0)
        model = SeqZooForCausalLM(SeqZooConfig(pattern=[name, "a/same"], blocks={name: other}, **config))
        added.append(model(ids, labels=ids).aux_loss.item())
    assert added[0] == added[1] == added[2] > 0


def test_bad_parts_are_named():
    with pytest.raises(ValueError, match="no 'none' in layers/mixers"):
        complete("blocks", dict(kind="residual", mixer=dict(kind="none"), channel=PARTS["channel"]))
    with pytest.raises(ValueError, match="residual: norm: expected one of .* got 'x'"):
        build("blocks", dict(kind="residual", norm="x", **PARTS), 16)
    with pytest.raises(ValueError, match="residual: norm_eps: expected a number, got '0'"):
        build("blocks", dict(kind="residual", norm_eps="0", **PARTS), 16)
