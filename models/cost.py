"""What a model costs, added up from what each of its parts says of itself."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig

CONTEXTS = (512, 4096, 32768, 131072)  # [tokens], of `state_table`


class Part(NamedTuple):
    """All uses of one part of a model."""

    name: str  # embedding, norms, head, mtp, or as in config.json: mixers.delta, channels.moe
    count: int  # how often a token passes through it; of mtp 0, for only its objective asks for it
    parameters: int  # each once: tied ones in the part that comes first
    active_parameters: int  # those that a token meets: of the experts, only the chosen
    flops_per_token: int  # forward, at the mean over `context` tokens; norms are left out
    state_bytes: int  # what one sequence of `context` tokens keeps for decoding


class Cost(NamedTuple):
    """Of a model: the sums over its parts. A training step is three times `flops_per_token`."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    state_bytes: int
    parts: list[Part]


class LayerState(NamedTuple):
    """What one layer keeps for decoding one sequence."""

    layer: int  # 0 is the lowest
    part: str  # as in config.json: mixers.delta, blocks.bdh
    bytes: tuple[int, ...]  # at each of the contexts asked for


def cost(model: SeqZooForCausalLM | SeqZooConfig, *, context: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Of a model, or of a config, unbuilt. `context`: tokens of a sequence; `dtype`: of what decoding keeps."""
    model = _built(model)
    parts: dict[str, Part] = {}
    seen: set[int] = set()
    for name, module, flops, state in _uses(model, context, dtype):
        new = {id(p): p for p in module.parameters() if id(p) not in seen}
        seen |= new.keys()
        parameters = sum(p.numel() for p in new.values())
        own = (1, parameters, parameters - (_idle(module) if new else 0), flops, state)
        before = parts.get(name, Part(name, 0, 0, 0, 0, 0))
        parts[name] = Part(name, *(old + more for old, more in zip(before[1:], own, strict=True)))
    if model.mtp is not None:
        parts["mtp"] = Part("mtp", 0, sum(p.numel() for p in model.mtp.parameters()), 0, 0, 0)
    columns = list(zip(*parts.values(), strict=True))
    return Cost(*(sum(column) for column in columns[2:]), parts=list(parts.values()))


def state_table(
    model: SeqZooForCausalLM | SeqZooConfig, *, contexts: Sequence[int] = CONTEXTS, dtype: torch.dtype = torch.bfloat16
) -> list[LayerState]:
    """What decoding keeps, layer by layer. Arguments as of `cost`, whose `state_bytes` are the sums of the columns."""
    model = _built(model)
    columns = [
        [(name, state) for name, _, _, state in _uses(model, context, dtype) if name.startswith(("mixers.", "blocks."))]
        for context in contexts
    ]
    names = [name for name, _ in columns[0]]
    return [LayerState(i, name, tuple(column[i][1] for column in columns)) for i, name in enumerate(names)]


def _built(model: SeqZooForCausalLM | SeqZooConfig) -> SeqZooForCausalLM:
    """A config's model, without memory for it."""
    if isinstance(model, SeqZooForCausalLM):
        return model
    with torch.device("meta"):
        return SeqZooForCausalLM(model)


def _uses(model: SeqZooForCausalLM, context: int, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, int, int]]:
    """All that a token passes through: the part's name, the module, FLOPs per token, bytes of state."""
    yield "embedding", model.embed_tokens, 0, 0
    if model.sink_tokens is not None:
        yield "sinks", nn.ParameterList([model.sink_tokens]), 0, 0
    sinks = model.config.num_sink_tokens
    pattern, others = model.config.pattern, []
    for i, block in enumerate(model.stack.levels()):
        entry = pattern[i % len(pattern)]
        if entry in model.config.blocks:  # one that is not made of the two speaks for itself
            yield f"blocks.{entry}", block, *_with_sinks(block, sinks, context, dtype)
            continue
        mixer, channel = entry.split("/")
        yield f"mixers.{mixer}", block.mixer, *_with_sinks(block.mixer, sinks, context, dtype)
        yield f"channels.{channel}", block.channel, block.channel.flops(context), 0
        others += [block.mixer_norm, block.channel_norm]
    ends = (norm for norm in (model.stack.embed_norm, model.stack.norm) if not isinstance(norm, nn.Identity))
    for norm in (*others, *ends):
        yield "norms", norm, 0, 0
    yield "head", model.lm_head, 2 * model.lm_head.weight.numel(), 0


def _with_sinks(part: nn.Module, sinks: int, context: int, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs and bytes of state; the sinks' own way through the model, once per call, is left out."""
    flops, state = part.flops(context), part.state_bytes(context, dtype)
    for looker in part.modules():
        if hasattr(looker, "sink_bytes"):
            flops, state = flops + sinks * looker.sink_flops(), state + sinks * looker.sink_bytes(dtype)
    return flops, state


def _idle(module: nn.Module) -> int:
    """Parameters that a token does not meet."""
    choosy = [part for part in module.modules() if hasattr(part, "active_parameters")]
    return sum(sum(p.numel() for p in part.parameters()) - part.active_parameters() for part in choosy)
