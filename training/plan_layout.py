"""A planned model in one layout: bytes, exchanges and seconds of one process and step."""

from collections import Counter
from functools import cached_property
from math import ceil, prod

from seqzoo.training.layout import Layout
from seqzoo.training.muon import batches
from seqzoo.training.plan_block import Measured, Where
from seqzoo.training.plan_exchange import Exchange, Group, on_links
from seqzoo.training.plan_model import PlannedModel, Weight
from seqzoo.training.sharded import cut_dim

BESIDE = {"weights", "gradients"}  # what is exchanged while products are made


class InLayout:
    """A model in one layout: the arithmetic. Raises ValueError: a layout that does not fit the cluster or the model."""

    def __init__(self, model: PlannedModel, layout: Layout) -> None:
        self.model, cluster = model, model.cluster
        self.n = cluster.devices
        self.sizes = self.replicate, shard, self.sequence, self.tensor = layout.sizes(self.n)
        self.stretches, self.readers = self.sequence * self.tensor, self.replicate * shard  # of tokens, of rows
        self.parts, self.some = shard * self.stretches, shard * self.sequence  # of the root's weights, of a block's
        self.cut = layout.shard is None or self.n > 1
        self.apart = self.cut and layout.expert_parallel
        self.blocks = model.dealt(self.tensor, self.apart) if self.tensor > 1 else model.blocks
        self.inside = {w.name for block in self.blocks for w in block}
        self.weights = [*model.root, *(w for block in self.blocks for w in block)]
        if model.length % self.stretches:
            raise ValueError(
                f"trainer.sequence_length: expected a multiple of sequence={self.sequence} x tensor={self.tensor}, "
                f"got {model.length}"
            )
        for w in self.weights:
            if self.apart and w.by_expert and w.shape[0] % self.parts:
                raise ValueError(
                    f"parallel.expert_parallel: expected a multiple of shard x sequence x tensor={self.parts} "
                    f"experts, got {w.shape[0]}"
                )
        wholes = [self._whole(block) for block in self.blocks]
        self.root_whole, self.padded = self._whole(model.root), max(wholes)
        self.largest = max(sum(w.bytes() for w in block if not self._is_apart(w)) for block in self.blocks)
        # every call of a block gathers its weights and reduces its gradients: tied ones', and the sinks' own stream
        depth = model.model.stack.depth
        levels = [*range(depth), *(range(depth - 1) if model.config.num_sink_tokens else ())]
        self.calls = [self.blocks[i % len(wholes)] for i in levels]
        self.calls_whole = sum(map(self._whole, self.calls))

    @cached_property
    def kinds(self) -> list[tuple[Measured, int]]:
        """The kinds of blocks, and how many levels of each."""
        pattern, depth = self.model.config.pattern, self.model.model.stack.depth
        sinks = self.model.config.num_sink_tokens > 0
        levels = Counter((pattern[i % len(pattern)], sinks and i + 1 == depth) for i in range(depth))
        measured = lambda entry, is_last: self.model.measured(entry, self._where._replace(is_last=is_last))
        return [(measured(*level), times) for level, times in levels.items()]

    @cached_property
    def head(self) -> Measured:
        return self.model.measured("head", self._where._replace(sinks=0, owners=1, tensor=1))

    @property
    def _where(self) -> Where:
        model = self.model
        return Where(
            model.length // self.stretches, self.sequence, self.tensor, self.parts if self.apart else 1,
            model.precision == "bf16", model.config.num_sink_tokens,
        )  # fmt: skip

    def cuts(self, w: Weight) -> int:
        """Into how many parts it is cut."""
        return 1 if not self.cut else self.some if w.name in self.inside and not self._is_apart(w) else self.parts

    def local(self, w: Weight) -> int:
        """Bytes of the part that the first process has."""
        return w.bytes(self.cuts(w))

    def _whole(self, weights: list[Weight], learning: bool = False) -> int:
        """Bytes of what is gathered, padded so that all parts are equal."""
        wanted = (w for w in weights if not (self.apart and w.by_expert) and (w.learns or not learning))
        return sum(self.cuts(w) * self.local(w) for w in wanted)

    def standing(self, held: bool) -> dict[str, int]:
        """Bytes of what is always there; `held`: gradients are whole."""
        learns = [w for w in self.weights if w.learns]
        grads = lambda w: w.bytes() if held and not (self.apart and w.by_expert) else self.local(w)
        states = sum(self.local(w) // w.size * 4 * w.states + w.more for w in learns)
        weights = sum(map(self.local, self.weights)) + self.model.buffers
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
        reserve = int(self.model.cluster.reserve)
        return self.standing(held) | dict(
            activations=kept, gathered=whole, working=beside, step=more, reserve=reserve
        )  # fmt: skip

    def _stepping(self) -> int:
        """Muon's updates, and the matrices of one shape put together, stacked, padded, made orthogonal, exchanged."""
        updates = sum(self.local(w) for w in self.weights if w.muon)
        copies = lambda gathered: 4.0 if gathered else 2.5  # of 4 bytes; the iteration's are of 2
        most = (copies(gathered) * sum(map(self._together, some)) for gathered, some in self._batches())
        return updates + int(max(most, default=0))

    def _is_gathered(self, w: Weight) -> bool:
        """Whether its matrices are cut, and Muon wants them whole."""
        return self.cut and (len(w.shape) == 2 or cut_dim(w.shape, self.cuts(w)) == 1)

    def _together(self, w: Weight) -> int:
        """Bytes of the whole matrices that Muon has of it."""
        return w.heads * (w.bytes() if self._is_gathered(w) else self.local(w))

    def _batches(self) -> list[tuple[bool, list[Weight]]]:
        """Whether they are gathered, and what Muon makes orthogonal at a time."""
        groups: dict[tuple, list[Weight]] = {}
        for w in (w for w in self.weights if w.muon):
            groups.setdefault((self._is_gathered(w), w.whole[-2:], self.cuts(w)), []).append(w)
        return [
            (key[0], [some[i] for i in batch])
            for key, some in groups.items()
            for batch in batches([self._together(w) for w in some])
        ]

    def exchanges(self, rows: int, accumulate: int, checkpointing: bool) -> list[Exchange]:
        """All of a step. A payload is that of all calls together."""
        found: list[Exchange] = []
        owners, some = Group(self.parts, 1), Group(self.some, self.tensor)
        copies, world, tensor = Group(self.replicate, self.parts), Group(self.n, 1), Group(self.tensor, 1)
        if self.cut:
            root, calls = self.model.root, self.calls
            ours, theirs = (sum(self._whole(unit, learning=True) for unit in units) for units in ([root], calls))
            cut = ours // self.parts + theirs // self.some
            cut += sum(self.local(w) for w in self.weights if w.learns and self._is_apart(w))
            alike = (w for w in self.weights if w.learns and self.cuts(w) == self.some and w.heads == 1)
            found += [
                Exchange("weights", "all_gather", owners, accumulate * self.root_whole),
                Exchange("weights", "all_gather", some, accumulate * 2 * self.calls_whole),
                Exchange("gradients", "reduce_scatter", owners, ours),
                Exchange("gradients", "reduce_scatter", some, theirs),
                Exchange("gradients", "all_reduce", copies, cut),
                Exchange("gradients", "all_reduce", tensor, sum(map(self.local, alike)) * (self.tensor > 1)),
                # where tokens stand: two numbers each, once for all blocks
                Exchange("tensor", "all_gather", tensor, 16 * accumulate * rows * self.model.length // self.sequence),
            ]
        groups = dict(line=Group(self.stretches, 1), sequence=Group(self.sequence, self.tensor))
        groups |= dict(tensor=tensor, experts=owners)
        for kind, times in self.kinds:
            for ways, exchanged in ((1, kind.forward), (int(checkpointing), kind.again), (1, kind.backward)):
                for (name, how), size in exchanged.items():
                    payload = times * ways * accumulate * size.of(rows)
                    payload *= groups[name].size if how == "all_gather" else 1
                    found.append(Exchange(name, how, groups[name], payload))
        counts = 4 * sum(times * kind.counts for kind, times in self.kinds)
        found.append(Exchange("counts", "all_reduce", world, 2 * accumulate * counts))
        found += [Exchange("muon", "all_gather", some, size) for size in self._muon()] if self.cut else []
        given = (w for w in self.weights if w.muon and w.heads > 1)
        found.append(Exchange("muon", "all_gather", tensor, sum(map(self._together, given))))
        sums: Counter = Counter()
        for what, how, group, size in found:
            sums[what, how, group] += size
        return [Exchange(*key, size) for key, size in sums.items() if size and key[2].size > 1]

    def _muon(self) -> list[int]:
        """Matrices are gathered, and each process's results, in the iteration's 2 bytes a number."""
        found = []
        for gathered, some in self._batches():
            if gathered:
                matrices = sum(prod(w.whole[:-2]) for w in some)
                found.append(sum(self.cuts(w) * self.local(w) for w in some))
                found.append(ceil(matrices / self.some) * self.some * prod(some[0].whole[-2:]) * 2)
        return found

    def seconds(
        self, rows: int, accumulate: int, checkpointing: bool, exchanges: list[Exchange]
    ) -> dict[str, float]:  # fmt: skip
        """Floors of a step of `rows` rows in all."""
        model, cluster = self.model, self.model.cluster
        head = sum(part.flops_per_token for part in model.cost.parts if part.name == "head")
        once = model.cost.flops_per_token
        each = 4 * once - head if checkpointing else 3 * once
        products = rows * model.length * each / self.n + model.optimizer_flops / self.some
        whole = self.root_whole + self.calls_whole + sum(self.local(w) for w in self.weights if self._is_apart(w))
        own = [self.local(w) for w in self.weights if w.learns]
        states = sum(self.local(w) * w.states for w in self.weights if w.learns)
        moved = accumulate * (3 if checkpointing else 2) * whole + 3 * sum(own) + 2 * states  # w read, written, g read
        passes = [on_links(exchange, cluster) for exchange in exchanges]
        times = dict(
            products=products / cluster.flops[model.precision], memory=moved / cluster.memory_bandwidth,
            link=sum(x for x, _ in passes) / cluster.link, network=sum(x for _, x in passes) / cluster.network,
        )  # fmt: skip
        each = [max(link / cluster.link, network / cluster.network) for link, network in passes]
        beside = sum(x for x, exchange in zip(each, exchanges, strict=True) if exchange.what in BESIDE)
        ordered = max(times["products"], times["memory"], beside) + sum(each) - beside
        return times | dict(floor=max(times.values()), ordered=ordered)

    def _is_apart(self, w: Weight) -> bool:
        return self.apart and w.by_expert
