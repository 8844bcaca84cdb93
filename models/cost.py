"""What a model costs, added up from what each of its parts says of itself."""

from typing import NamedTuple

import torch
from torch import nn

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig


class Cost(NamedTuple):
    parameters: int
    active_parameters: int  # those that a token meets: of the experts, only the chosen
    flops_per_token: int  # forward, at the mean over `context` tokens; a training step is three times that
    state_bytes: int  # what one sequence of `context` tokens keeps for decoding


def cost(model: SeqZooForCausalLM | SeqZooConfig, *, context: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Of a model, or of a config, unbuilt. `context`: tokens of a sequence; `dtype`: of what decoding keeps."""
    if isinstance(model, SeqZooConfig):
        with torch.device("meta"):
            model = SeqZooForCausalLM(model)
    levels = model.stack.levels()
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),  # tied ones once
        active_parameters=_active(model),
        flops_per_token=sum(_flops(block, context) for block in levels) + 2 * model.lm_head.weight.numel(),
        state_bytes=sum(_part(block, "mixer").state_bytes(context, dtype) for block in levels),
    )


def _active(module: nn.Module) -> int:
    counted = {id(p): p.numel() for p in module.parameters()}
    for part in module.modules():
        if hasattr(part, "active_parameters"):
            own = list(part.parameters())
            idle = sum(p.numel() for p in own) - part.active_parameters()
            counted[id(own[0])] -= idle
    return sum(counted.values())


def _flops(block: nn.Module, context: int) -> int:
    parts = {id(part): part for part in (_part(block, "mixer"), _part(block, "channel"))}
    return sum(part.flops(context) for part in parts.values())


def _part(block: nn.Module, name: str) -> nn.Module:
    """A block's mixer or channel; a block that is not made of the two speaks for itself."""
    return getattr(block, name, block)
