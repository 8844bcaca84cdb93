"""What a model costs: of each part, and that the parts are the whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from runs import HYBRID, TRANSFORMER

from seqzoo.layers.state import map_state
from seqzoo.models import SeqZooForCausalLM
from seqzoo.models.cost import cost, state_table
from seqzoo.models.cost_table import main, state_text
from seqzoo.train import cost_main, model_config, named_model


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


NANOS = sorted(p.stem for p in Path(__file__).parents[1].glob("configs/model/*_nano.yaml"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*NANOS, "transformer"])
def test_the_state_table_is_what_states_hold(name, dtype):
    """Of two lengths, the second reached token by token: what grows has grown by as much as it says."""
    ours = model([f"model={name}"]).to(dtype).eval()
    rows, held = state_table(ours, contexts=(19, 23), dtype=dtype), []
    ids = torch.randint(0, 264, (3, 23))
    with torch.no_grad():
        past = ours(ids[:, :19], use_cache=True).past_key_values
        held.append(bytes_of(past.states))
        for t in range(19, 23):
            past = ours(ids[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
        held.append(bytes_of(past.states))
    assert [row.layer for row in rows] == list(range(ours.config.num_hidden_layers))
    assert [row.bytes for row in rows] == list(zip(*held, strict=True))
    assert sum(row.bytes[1] for row in rows) == cost(ours, context=23, dtype=dtype).state_bytes


def bytes_of(states):
    """Of one sequence, in each layer."""
    layers = []
    for state in states:
        held = []
        map_state(lambda t, held=held: held.append(t[0].numel() * t.element_size()), state)
        layers.append(sum(held))
    return layers


def test_the_command_prints_both_tables(tmp_path, capsys):
    ours = model(HYBRID).config
    ours.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert main([str(path), "--contexts", "7", "1000", "--dtype", "float32"]) == 0
        parts, states = capsys.readouterr().out.rstrip("\n").split("\n\n")
        assert states == state_text(ours, [7, 1000], torch.float32)
        counted, rows = cost(ours, context=7, dtype=torch.float32), states.splitlines()
        assert parts.splitlines()[-1].split() == ["all", *(f"{n:,}" for n in counted[:4])]
        assert [row.split()[:2] for row in rows[1:-1]] == [[str(i), x] for i, x in enumerate(
            ["mixers.delta", "mixers.delta", "mixers.delta", "mixers.full"]
        )]  # fmt: skip
        assert rows[-1].split()[1] == f"{counted.state_bytes:,}"
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="other")))
    assert main([str(tmp_path)]) == 2 and "got 'other'" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2 and "expected a config.json" in capsys.readouterr().err


def test_costs_by_a_models_name(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["seqzoo-cost", "spikingbrain_nano", "--contexts", "100"])
    assert cost_main() == 0
    assert capsys.readouterr().out.split("\n\n")[1].strip() == state_text(named_model("spikingbrain_nano"), [100])
    monkeypatch.setattr("sys.argv", ["seqzoo-cost", "no_such_model"])
    assert cost_main() == 2
    assert re.search("one of .*'bdh_nano'.* got 'no_such_model'", capsys.readouterr().err)
