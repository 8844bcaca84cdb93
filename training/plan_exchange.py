"""What one process exchanges in a step, and how long its links need for it at least.

Payloads are those of the calls that the code makes: an all-gather's is all that is gathered, a reduce-scatter's and an
all-reduce's all that is reduced, an all-to-all's what a process gives, its own part included, a shift's what goes to
the next. What must pass a device's links then follows from where a group's members are: processes are numbered node by
node, so the sequence's are neighbours, weights' are next to each other, copies are far apart. Inside a node all bytes
but a member's own pass its link; what a node needs of others is divided among the networks of its members.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The `cluster=` choices, all of them given in its YAML. A device's network is its share of its node's.

    Attributes:
        device: its name.
        nodes, devices_per_node: how many.
        memory: bytes of a device.
        reserve: of them, what no tensor gets: the driver's, the communication library's, holes in the allocator.
        flops: bf16 and fp32 -> FLOP/s of dense products.
        memory_bandwidth, link, network: bytes/s of a device: of its memory; to others in its node, one way; to other
            nodes, one way.
    """

    device: str
    nodes: int
    devices_per_node: int
    memory: float
    reserve: float
    flops: dict[str, float]
    memory_bandwidth: float
    link: float
    network: float

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("memory", "memory_bandwidth", "link", "network")}
        numbers |= {f"flops.{name}": self.flops.get(name) for name in ("bf16", "fp32")}
        for name, x in numbers.items():
            if isinstance(x, bool) or not isinstance(x, int | float) or not x > 0:
                raise ValueError(f"cluster.{name}: expected a number above 0, got {x!r}")
        for name in ("nodes", "devices_per_node"):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int) or x < 1:
                raise ValueError(f"cluster.{name}: expected a whole number, at least 1, got {x!r}")
        if not 0 <= self.reserve < self.memory:
            raise ValueError(f"cluster.reserve: expected 0 to memory={self.memory}, got {self.reserve}")

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


class Group(NamedTuple):
    """Processes that exchange something: so many, one in every `stride`."""

    size: int
    stride: int


class Exchange(NamedTuple):
    """Of one step, as one process has part in it."""

    what: str
    how: str  # all_gather, reduce_scatter, all_reduce, all_to_all, shift
    group: Group
    bytes: int  # payload of all calls together


def on_links(exchange: Exchange, cluster: Cluster) -> tuple[float, float]:
    """Bytes that pass a device's link inside its node, and those that pass its network, one way."""
    (n, stride), size = exchange.group, exchange.bytes
    if n == 1:
        return 0.0, 0.0
    here = min(n, max(1, cluster.devices_per_node // stride))  # members in a node
    nodes = ceil(n / here)
    inside, outside = (here > 1), (nodes > 1)
    if exchange.how == "shift":
        return (0.0, float(size)) if outside else (float(size), 0.0)  # of the process at a node's end
    if exchange.how == "all_to_all":
        return size * (here - 1) / n, size * (n - here) / n
    ways = 2 if exchange.how == "all_reduce" else 1
    return inside * ways * size * (n - 1) / n, outside * ways * size * (nodes - 1) / nodes / here
