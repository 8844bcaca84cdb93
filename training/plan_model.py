"""A model that is to be planned: its weights, what optimizers keep of each, what its blocks keep and exchange."""

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
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
from seqzoo.training.layout import Layout
from seqzoo.training.muon import Muon
from seqzoo.training.objectives import NextToken
from seqzoo.training.plan_block import Calls, Measured, Where, block_calls, fake_tensors, measure, some_heads
from seqzoo.training.plan_exchange import Cluster
from seqzoo.training.sharded import cut_dim

UNDERSTOOD = {"shard", "replicate", "sequence", "tensor", "expert_parallel", "timeout_seconds"}  # fields of Layout


class Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]  # with the heads of one process, where they are dealt
    whole: tuple[int, ...]
    size: int  # bytes of a number
    by_expert: bool
    learns: bool
    states: int  # numbers of optimizer state to each of its own
    more: int  # bytes of state besides
    muon: bool  # a matrix that Muon puts together

    @property
    def heads(self) -> int:
        """Processes that its heads are dealt to."""
        return prod(self.whole) // prod(self.shape)

    def bytes(self, parts: int = 1) -> int:
        """The first part's, which is the largest."""
        dim = cut_dim(self.shape, parts)
        return ceil(self.shape[dim] / parts) * (prod(self.shape) // max(1, self.shape[dim])) * self.size


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
                name,
                *2 * (tuple(p.shape),),
                p.element_size(),
                id(p) in experts,
                p.requires_grad,
                *states[name],
                name in muon,
            )
            (self.blocks[inside[id(p)]] if id(p) in inside else self.root).append(weight)
        self.buffers = sum(x.nbytes for x in model.buffers())
        self.measured = cache(self._measure)
        self.dealt = cache(self._dealt)

    def _dealt(self, tensor: int, apart: bool) -> list[list[Weight]]:
        """The blocks' weights, with the heads of one of so many processes. Raises ValueError: heads that cannot be."""
        if self.config.spikes is not None and tensor > 1:
            raise ValueError("parallel.tensor: expected 1 for a model with spikes, which look at all channels")
        some = copy.deepcopy(self.model)
        some_heads(some, Where(1, 1, tensor, 2 if apart else 1, False, 0), [], [])
        shapes = {name: tuple(p.shape) for name, p in some.named_parameters()}
        return [[w._replace(shape=shapes[w.name]) for w in block] for block in self.blocks]

    def _measure(self, entry: str, where: Where) -> Measured:
        if entry != "head":
            block = self.model.stack.blocks[self.config.pattern.index(entry)]
            return measure(block, partial(block_calls, is_last=where.is_last), self._width, where)
        tail = nn.ModuleDict(dict(norm=self.model.stack.norm, head=self.model.lm_head))
        return measure(tail, _head_calls, self._width, where)

    @property
    def _width(self) -> int:
        return self.config.hidden_size


def _head_calls(tail: nn.Module, x: Tensor, span: object) -> Calls:
    targets = torch.empty(x.shape[:2], dtype=torch.int64)
    yield [cross_entropy(tail["head"], tail["norm"](x), targets)], 0


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
