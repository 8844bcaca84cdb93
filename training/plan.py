"""What a run asks of each device and of the links between them, before it has any: memory, exchanges, a floor of time.

    planner = Planner(config, cluster, length=4096, precision="bf16", optimizers=...)
    planner.plan(layout, rows=64, accumulate=1, checkpointing=True)

Exact, and tested against runs of several processes: bytes of weights, gradients, optimizer states and of what a block
keeps; calls and bytes of the exchanges (but for a few numbers: norms, flags, losses). An estimate: what is there beside
these for a moment. Of blocks cut over processes it is taken that the weights of one and of the next, a block's
gradients, and those on their way to their owners are there at once; of Muon, that matrices of one shape are.

A floor of the step's time is what no program could undercut on such devices: all products at the highest speed, all
bytes at the bandwidths, everything at once. No run will reach it. `ordered` is the same in the order of this code:
FSDP exchanges weights and gradients beside the products, and all other exchanges are waited for.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import cache, cached_property
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
from seqzoo.training.plan_exchange import Cluster, Exchange, Group, on_links

BESIDE = {"weights", "gradients"}  # what is exchanged while products are made
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


class Plan(NamedTuple):
    """Of one process and step. Bytes and seconds."""

    sizes: tuple[int, int, int]  # replicate, shard, sequence
    expert_parallel: bool
    rows: int  # of a micro-batch, over all processes
    accumulate: int
    checkpointing: bool
    memory: dict[str, int]
    exchanges: list[Exchange]
    seconds: dict[str, float]  # products, memory, link, network; floor, ordered
    most_rows: int  # of a micro-batch, that fit; 0 where none does
    has: float  # memory of a device

    @property
    def needs(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needs <= self.has


class Planner:
    """
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

    def standing(self, layout: Layout) -> int:
        """Bytes of weights, gradients and optimizer states alone, the reserve aside. Raises ValueError as `plan`."""
        return sum(_At(self, layout).standing(held=False).values())

    def plan(self, layout: Layout, *, rows: int, accumulate: int, checkpointing: bool) -> Plan:
        """Of a step of `accumulate` micro-batches of `rows` rows, over all processes.

        Raises:
            ValueError: a layout that does not fit the cluster, experts, rows or tokens that cannot be dealt.
        """
        at = _At(self, layout)
        if rows % at.readers:
            raise ValueError(
                f"trainer.batch_size: expected a multiple of replicate x shard={at.readers}, got {rows}"
            )  # fmt: skip
        need = lambda here: at.memory(here, accumulate, checkpointing)
        has, memory = self.cluster.memory, need(rows // at.readers)
        exchanges = at.exchanges(rows // at.readers, accumulate, checkpointing)
        return Plan(
            at.sizes, layout.expert_parallel, rows, accumulate, checkpointing, memory, exchanges,
            at.seconds(rows * accumulate, accumulate, checkpointing, exchanges),
            at.readers * _most(lambda here: sum(need(here).values()) <= has), has,
        )  # fmt: skip


class _At:
    """A planner's model in one layout: the arithmetic."""

    def __init__(self, planner: Planner, layout: Layout) -> None:
        self.planner, cluster = planner, planner.cluster
        self.n = cluster.devices
        self.sizes = self.replicate, shard, self.sequence = layout.sizes(self.n)
        self.parts, self.readers = shard * self.sequence, self.replicate * shard  # of weights, of rows
        self.cut = layout.shard is None or self.n > 1
        self.apart = self.cut and layout.expert_parallel
        self.weights = [*planner.root, *(w for block in planner.blocks for w in block)]
        if planner.length % self.sequence:
            raise ValueError(
                f"trainer.sequence_length: expected a multiple of sequence={self.sequence}, got {planner.length}"
            )
        for w in self.weights:
            if self.apart and w.by_expert and w.shape[0] % self.parts:
                raise ValueError(
                    f"parallel.expert_parallel: expected a multiple of shard x sequence={self.parts} experts, "
                    f"got {w.shape[0]}"
                )
        wholes = [self._whole(block) for block in planner.blocks]
        self.root_whole, self.padded = self._whole(planner.root), max(wholes)
        self.largest = max(sum(w.bytes() for w in block if not self._is_apart(w)) for block in planner.blocks)
        # every call of a block gathers its weights and reduces its gradients: tied ones', and the sinks' own stream
        depth = planner.model.stack.depth
        levels = [*range(depth), *(range(depth - 1) if planner.config.num_sink_tokens else ())]
        self.calls = [planner.blocks[i % len(wholes)] for i in levels]
        self.calls_whole = sum(map(self._whole, self.calls))

    @cached_property
    def kinds(self) -> list[tuple[Measured, int]]:
        """The kinds of blocks, and how many levels of each."""
        pattern, depth = self.planner.config.pattern, self.planner.model.stack.depth
        levels = Counter(pattern[i % len(pattern)] for i in range(depth))
        return [(self.planner.measured(entry, self._where), times) for entry, times in levels.items()]

    @cached_property
    def head(self) -> Measured:
        return self.planner.measured("head", self._where._replace(sinks=0, owners=1))

    @property
    def _where(self) -> Where:
        planner = self.planner
        return Where(
            planner.length // self.sequence, self.sequence, self.parts if self.apart else 1,
            planner.precision == "bf16", planner.config.num_sink_tokens,
        )  # fmt: skip

    def local(self, w: Weight) -> int:
        """Bytes of the part that the first process has."""
        return w.bytes(self.parts if self.cut else 1)

    def _whole(self, weights: list[Weight], learning: bool = False) -> int:
        """Bytes of what is gathered, padded so that all parts are equal."""
        wanted = (w for w in weights if not (self.apart and w.by_expert) and (w.learns or not learning))
        return sum(self.parts * self.local(w) for w in wanted)

    def standing(self, held: bool) -> dict[str, int]:
        """Bytes of what is always there; `held`: gradients are whole."""
        learns = [w for w in self.weights if w.learns]
        grads = lambda w: w.bytes() if held and not (self.apart and w.by_expert) else self.local(w)
        states = sum(self.local(w) // w.size * 4 * w.states + w.more for w in learns)
        weights = sum(map(self.local, self.weights)) + self.planner.buffers
        return dict(weights=weights, gradients=sum(map(grads, learns)), optimizer=states)

    def memory(self, rows: int, accumulate: int, checkpointing: bool) -> dict[str, int]:
        """Bytes by what they are for, at the moment when they are the most."""
        held = self.cut and accumulate > 1  # gradients are not cut before the step's last micro-batch
        kinds, head = [kind for kind, _ in self.kinds], self.head.given.of(rows) + self.head.peak.of(rows)
        if checkpointing:
            kept = sum(times * kind.given.of(rows) for kind, times in self.kinds)
            cached = sum(times * kind.cached for kind, times in self.kinds)
            ahead = cached + max(head, *(kind.held.of(rows) for kind in kinds))
            beside = max(ahead, *(kind.peak.of(rows) for kind in kinds))
        else:
            kept = sum(times * kind.saved.of(rows) for kind, times in self.kinds)
            more = (kind.given.of(rows) + kind.peak.of(rows) - kind.saved.of(rows) for kind in kinds)
            beside = max(head, *more)
        # of a block weights, and its gradients if they are not held anyway; padded, what of the next one comes in, and
        # gradients on their way
        whole = self.root_whole + (2 - held) * self.largest + 2 * self.padded if self.cut else 0
        step = (3 - held) * self.root_whole if self.cut else 0, self._stepping()  # backward's end; the optimizers'
        more = max(0, max(step) - kept - whole - beside)
        reserve = int(self.planner.cluster.reserve)
        return self.standing(held) | dict(
            activations=kept, gathered=whole, working=beside, step=more, reserve=reserve
        )  # fmt: skip

    def _stepping(self) -> int:
        """Muon's updates, and the matrices of one shape put together, stacked, padded, made orthogonal, exchanged."""
        shapes: Counter = Counter()
        for w in self.weights:
            if w.muon:
                shapes[w.shape[-2:], len(w.shape)] += w.bytes() if len(w.shape) == 2 else self.local(w)
        copies = lambda dims: 4.0 if self.cut and dims == 2 else 2.5  # of 4 bytes; the iteration's are of 2
        updates = sum(self.local(w) for w in self.weights if w.muon)
        return updates + int(max((size * copies(dims) for (_, dims), size in shapes.items()), default=0))

    def exchanges(self, rows: int, accumulate: int, checkpointing: bool) -> list[Exchange]:
        """All of a step. A payload is that of all calls together."""
        found: list[Exchange] = []
        owners, line = Group(self.parts, 1), Group(self.sequence, 1)
        copies, world = Group(self.replicate, self.parts), Group(self.n, 1)
        if self.cut:
            gathered = accumulate * (self.root_whole + 2 * self.calls_whole)
            whole = sum(self._whole(unit, learning=True) for unit in (self.planner.root, *self.calls))
            cut = whole // self.parts + sum(self.local(w) for w in self.weights if w.learns and self._is_apart(w))
            found += [
                Exchange("weights", "all_gather", owners, gathered),
                Exchange("gradients", "reduce_scatter", owners, whole),
                Exchange("gradients", "all_reduce", copies, cut),
            ]
        groups = dict(sequence=line, experts=owners)
        for kind, times in self.kinds:
            for ways, exchanged in ((2 if checkpointing else 1, kind.forward), (1, kind.backward)):
                for (name, how), size in exchanged.items():
                    payload = times * ways * accumulate * size.of(rows)
                    payload *= groups[name].size if how == "all_gather" else 1
                    found.append(Exchange(name, how, groups[name], payload))
        counts = 4 * sum(times * kind.counts for kind, times in self.kinds)
        found.append(Exchange("counts", "all_reduce", world, 2 * accumulate * counts))
        found += [Exchange("muon", "all_gather", owners, size) for size in self._muon()] if self.cut else []
        sums: Counter = Counter()
        for what, how, group, size in found:
            sums[what, how, group] += size
        return [Exchange(*key, size) for key, size in sums.items() if size and key[2].size > 1]

    def _muon(self) -> list[int]:
        """Matrices are gathered, and each process's results, in the iteration's 2 bytes a number."""
        shapes: Counter = Counter(w.shape for w in self.weights if w.muon and len(w.shape) == 2)
        gathered = sum(self.parts * self.local(w) for w in self.weights if w.muon and len(w.shape) == 2)
        return [gathered, *(ceil(n / self.parts) * self.parts * prod(shape) * 2 for shape, n in shapes.items())]

    def seconds(
        self, rows: int, accumulate: int, checkpointing: bool, exchanges: list[Exchange]
    ) -> dict[str, float]:  # fmt: skip
        """Floors of a step of `rows` rows in all."""
        planner, cluster = self.planner, self.planner.cluster
        head = sum(part.flops_per_token for part in planner.cost.parts if part.name == "head")
        once = planner.cost.flops_per_token
        each = 4 * once - head if checkpointing else 3 * once
        products = rows * planner.length * each / self.n + planner.optimizer_flops / self.parts
        whole = self.root_whole + self.calls_whole + sum(self.local(w) for w in self.weights if self._is_apart(w))
        own = [self.local(w) for w in self.weights if w.learns]
        states = sum(self.local(w) * w.states for w in self.weights if w.learns)
        moved = accumulate * (3 if checkpointing else 2) * whole + 3 * sum(own) + 2 * states  # w read, written, g read
        passes = [on_links(exchange, cluster) for exchange in exchanges]
        times = dict(
            products=products / cluster.flops[planner.precision], memory=moved / cluster.memory_bandwidth,
            link=sum(x for x, _ in passes) / cluster.link, network=sum(x for _, x in passes) / cluster.network,
        )  # fmt: skip
        each = [max(link / cluster.link, network / cluster.network) for link, network in passes]
        beside = sum(x for x, exchange in zip(each, exchanges, strict=True) if exchange.what in BESIDE)
        ordered = max(times["products"], times["memory"], beside) + sum(each) - beside
        return times | dict(floor=max(times.values()), ordered=ordered)

    def _is_apart(self, w: Weight) -> bool:
        return self.apart and w.by_expert


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


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if more of it never fit better; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**30:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
