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

from collections.abc import Callable
from typing import NamedTuple

from seqzoo.training.layout import Layout
from seqzoo.training.plan_exchange import Exchange
from seqzoo.training.plan_layout import InLayout
from seqzoo.training.plan_model import PlannedModel


class Plan(NamedTuple):
    """Of one process and step. Bytes and seconds."""

    sizes: tuple[int, int, int, int]  # replicate, shard, sequence, tensor
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


class Planner(PlannedModel):
    """A model in any layout. Arguments and errors: `PlannedModel`."""

    def standing(self, layout: Layout) -> int:
        """Bytes of weights, gradients and optimizer states alone, the reserve aside. Raises ValueError as `plan`."""
        return sum(InLayout(self, layout).standing(held=False).values())

    def plan(self, layout: Layout, *, rows: int, accumulate: int, checkpointing: bool) -> Plan:
        """Of a step of `accumulate` micro-batches of `rows` rows, over all processes.

        Raises:
            ValueError: a layout that does not fit the cluster, experts, rows or tokens that cannot be dealt.
        """
        at = InLayout(self, layout)
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
