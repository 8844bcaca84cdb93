"""A model that is to be planned: its weights, what optimizers keep of each, what its blocks keep and exchange."""

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.cost import cost
from seqzoo.models.losses import cross_entropy
from seqzoo.training.muon import Muon
from seqzoo.training.objectives import NextToken
from seqzoo.training.parallel import Layout
from seqzoo.training.plan_block import Measured, Where, block_run, fake_tensors, measure
from seqzoo.training.plan_exchange import Cluster

UNDERSTOOD = {"shard", "replicate", "sequence", "expert_parallel", "timeout_seconds"}  # fields of Layout


class Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]
    size: int  # bytes of a number
    by_expert: bool
    learns: bool
    states: int  # numbers of optimizer state to each of its own
    more: int  # bytes of state besides
    muon: bool  # a matrix that Muon puts together

    def bytes(self, parts: int = 1) -> int:
        """The first part's, which is the largest."""
        return ceil(self.shape[0] / parts) * prod(self.shape[1:]) * self.size


class PlannedModel:
    """What of a plan no layout changes.

    Args:
        config: of the model.
        cluster: its devices are the processes.
        length: tokens of a row.
        precision: fp32, or bf16 for autocast.
        optimizers: makes them for a model.

    Raises:
        ValueError: a layout whose fields this file does not know, or triton missing.
    """

    def __init__(
        self, config: SeqZooConfig, cluster: Cluster, *, length: int, precision: str,
        optimizers: Callable[[nn.Module], list[Optimizer]],
    ) -> None:  # fmt: skip
        unknown = {field.name for field in fields(Layout)} ^ UNDERSTOOD
        if unknown:
            raise ValueError(f"plan: expected a layout of {sorted(UNDERSTOOD)}, got a difference in {sorted(unknown)}")
        self.config, self.cluster, self.length, self.precision = config, cluster, length, precision
        with torch.device("meta"):
            model = SeqZooForCausalLM(config).train()
        for name, p in model.named_parameters():
            p.requires_grad_(NextToken().learns(name))
        self.model, self.cost = model, cost(model, context=length)
        states, self.optimizer_flops, muon = _stepped(model, optimizers)
        inside = {id(p): i for i, block in enumerate(model.stack.blocks) for p in block.parameters()}
        experts = {
            id(getattr(part, name)) for part in model.modules() for name in getattr(part, "BY_EXPERT", ())
        }  # fmt: skip
        self.blocks: list[list[Weight]] = [[] for _ in model.stack.blocks]
        self.root: list[Weight] = []
        for name, p in model.named_parameters():
            weight = Weight(
                name, tuple(p.shape), p.element_size(), id(p) in experts, p.requires_grad, *states[name], name in muon
            )
            (self.blocks[inside[id(p)]] if id(p) in inside else self.root).append(weight)
        self.buffers = sum(x.nbytes for x in model.buffers())
        self.measured = cache(self._measure)

    def _measure(self, entry: str, where: Where) -> Measured:
        if entry != "head":
            return measure(self.model.stack.blocks[self.config.pattern.index(entry)], block_run, self._width, where)
        tail = nn.ModuleDict(dict(norm=self.model.stack.norm, head=self.model.lm_head))
        return measure(tail, _head_run, self._width, where)

    @property
    def _width(self) -> int:
        return self.config.hidden_size


def _head_run(tail: nn.Module, x: Tensor, span: object) -> tuple[list[Tensor], int]:
    targets = torch.empty(x.shape[:2], dtype=torch.int64)
    return [cross_entropy(tail["head"], tail["norm"](x), targets)], 0


def _stepped(
    model: nn.Module, optimizers: Callable[[nn.Module], list[Optimizer]]
) -> tuple[dict[str, tuple[int, int]], int, set[str]]:
    """From one step on tensors that hold nothing: each parameter's states (so many of its shape, bytes besides), FLOPs,
    and whose Muon is."""
    model = copy.deepcopy(model)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        fake_tensors(model)
        states = {name: (0, 0) for name, _ in model.named_parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        made, muon = optimizers(model), set()
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        for optimizer in made:
            optimizer.step()
            for p, state in optimizer.state.items():
                like = [x for x in state.values() if isinstance(x, Tensor) and x.shape == p.shape]
                rest = [x for x in state.values() if isinstance(x, Tensor) and x.shape != p.shape]
                states[names[id(p)]] = len(like), sum(x.nbytes for x in rest)
                if isinstance(optimizer, Muon):
                    muon.add(names[id(p)])
    return states, counter.get_total_flops(), muon
