"""Several models as one, without training: where a block is a set of neurons, it takes the neurons of all.

What has no neurons (embeddings, head) is averaged. Meant for models tuned from a common one on different data.
Source: Kosowski et al. 2025, arXiv 2509.26507, section on merging.
"""

import copy
from collections.abc import Sequence

import torch

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig


def merge_neurons(models: Sequence[SeqZooForCausalLM]) -> SeqZooForCausalLM:
    """A model with the neurons of all of these; its dtype, device and generation config are the first one's.

    A model merged with itself is itself, up to the eps of its layer norms. Merge all at once: of what is averaged, a
    merged model's share would count as one model's.

    Raises:
        ValueError: fewer than two, configs that differ in more than neurons, blocks that cannot be joined, or int8.
    """
    if len(models) < 2:
        raise ValueError(f"merge_neurons: expected two models or more, got {len(models)}")
    config = _config([model.config for model in models])
    merged = SeqZooForCausalLM(config).to(device=models[0].device, dtype=models[0].dtype)
    states, values = [model.state_dict() for model in models], {}
    for name, x in states[0].items():
        if not x.is_floating_point():  # int8 weights: no mean of theirs fits a mean of their scales
            raise ValueError(f"merge_neurons: {name}: expected a floating dtype, got {x.dtype}; merge, then quantise")
        if not name.startswith("stack.blocks."):
            values[name] = (sum(state[name].to(x.device).double() for state in states) / len(states)).to(x.dtype)
    for i in range(len(models[0].stack.blocks)):
        blocks = [model.stack.blocks[i].to(models[0].device) for model in models]
        values |= {f"stack.blocks.{i}.{name}": x for name, x in blocks[0].joined(blocks).items()}
    merged.load_state_dict(values)
    merged.generation_config = copy.deepcopy(models[0].generation_config)  # training wrote there where a text ends
    return merged.train(models[0].training)


def _config(configs: Sequence[SeqZooConfig]) -> SeqZooConfig:
    first, noise = configs[0].to_dict(), ("blocks", "architectures", "transformers_version", "_name_or_path", "dtype")
    for config in configs[1:]:
        other = config.to_dict()
        differ = sorted(k for k in first.keys() | other if k not in noise and first.get(k) != other.get(k))
        if differ or set(config.blocks) != set(configs[0].blocks):
            raise ValueError(f"merge_neurons: expected configs alike but for neurons, got other {differ or ['blocks']}")
    with torch.device("meta"):
        parts = SeqZooForCausalLM(configs[0]).stack.blocks
    blocks = {}
    for part, entry in zip(parts, configs[0].pattern * len(parts), strict=False):
        if not hasattr(part, "joined"):
            raise ValueError(f"merge_neurons: expected blocks of neurons, got {entry!r}")
        blocks[entry] = part.joined_spec([config.blocks[entry] for config in configs])
    kept = {name: value for name, value in first.items() if name not in ("blocks", "model_type")}
    return SeqZooConfig(**kept, blocks=configs[0].blocks | blocks)
