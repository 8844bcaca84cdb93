"""What a model costs: of each part, and that the parts are the whole."""

import pytest
import torch
from hydra import compose, initialize_config_module
from runs import HYBRID, TRANSFORMER

from seqzoo.models import SeqZooForCausalLM
from seqzoo.models.cost import cost
from seqzoo.train import model_config


def model(options, *more):
    with initialize_config_module("seqzoo.configs", version_base=None):
        return SeqZooForCausalLM(model_config(compose("train", overrides=[*options, *more])))


TIED = ["+model.tie_word_embeddings=true", "+model.tied=true", "model.num_hidden_layers=4"]


@pytest.mark.parametrize("more", [[], TIED[:1], TIED[1:], TIED], ids=["plain", "words", "blocks", "both"])
@pytest.mark.parametrize("options", [TRANSFORMER, HYBRID], ids=["transformer", "hybrid"])
def test_parts_are_the_whole(options, more):
    ours = model(options, *more)
    counted = cost(ours, context=100)
    for name in ("parameters", "active_parameters", "flops_per_token", "state_bytes"):
        assert getattr(counted, name) == sum(getattr(part, name) for part in counted.parts), name
    assert counted.parameters == sum(p.numel() for p in ours.parameters())
    assert counted == cost(ours.config, context=100)


def test_each_part_by_its_name():
    ours = model(HYBRID, "model.num_hidden_layers=8")
    parts = {part.name: part for part in cost(ours, context=100).parts}
    assert {name: part.count for name, part in parts.items()} == {
        "embedding": 1, "mixers.delta": 6, "channels.moe": 8, "mixers.full": 2, "norms": 17, "head": 1,
    }  # fmt: skip
    delta, full, moe = (ours.stack.blocks[i] for i in (0, 3, 0))
    assert parts["mixers.delta"].parameters == 6 * sum(p.numel() for p in delta.mixer.parameters())
    assert parts["mixers.full"].state_bytes == 2 * full.mixer.state_bytes(100, torch.bfloat16)
    idle = 8 * 2 * 3 * 24 * 8  # in each layer two of the four experts, of three matrices
    assert parts["channels.moe"].active_parameters == parts["channels.moe"].parameters - idle
    assert parts["channels.moe"].flops_per_token == 8 * moe.channel.flops(100)
    assert parts["head"] == ("head", 1, 264 * 24, 264 * 24, 2 * 264 * 24, 0)
    assert parts["norms"].parameters == 17 * 24 and parts["embedding"].flops_per_token == 0


def test_what_is_tied_is_counted_once_and_worked_with_every_time():
    plain, tied = (
        {part.name: part for part in cost(model(HYBRID, *more), context=100).parts}
        for more in (["model.num_hidden_layers=4"], ["model.num_hidden_layers=8", "+model.tied=true", TIED[0]])
    )
    for name in ("mixers.delta", "mixers.full", "channels.moe"):
        assert tied[name].parameters == plain[name].parameters and tied[name].count == 2 * plain[name].count
        assert tied[name].active_parameters == plain[name].active_parameters
        assert tied[name].flops_per_token == 2 * plain[name].flops_per_token
        assert tied[name].state_bytes == 2 * plain[name].state_bytes
    assert tied["head"].parameters == 0 and tied["head"].flops_per_token == plain["head"].flops_per_token > 0
    assert tied["embedding"].parameters == plain["embedding"].parameters
