"""How a run is laid out over its processes: the `parallel=` choices."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The `parallel=` choices, all of them given in its YAML.

    Attributes:
        shard: processes that share one copy of the weights; None is all that are left.
        replicate: copies of the weights.
        sequence: processes over which every sequence is cut.
        tensor: processes over which heads are dealt, of the parts that have heads, or hidden units.
        expert_parallel: experts stay where they are, shard x sequence processes having some of them each, and tokens go
            to them; else the experts' weights are gathered as all others are.
        timeout_seconds: that a process waits for another.
    """

    shard: int | None
    replicate: int
    sequence: int
    tensor: int
    expert_parallel: bool
    timeout_seconds: int

    def __post_init__(self) -> None:
        for name in ("shard", "replicate", "sequence", "tensor", "timeout_seconds"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"parallel.{name}: expected a whole number, at least 1, got {value!r}")
        if not isinstance(self.expert_parallel, bool):
            raise ValueError(f"parallel.expert_parallel: expected true or false, got {self.expert_parallel!r}")
        if None in (self.replicate, self.sequence, self.tensor, self.timeout_seconds):
            raise ValueError("parallel: expected numbers for all but shard, got null")

    def sizes(self, processes: int) -> tuple[int, int, int, int]:
        """Of the mesh: replicate, shard, sequence, tensor.

        Raises:
            ValueError: they do not make up the processes.
        """
        rest, over = divmod(processes, self.replicate * self.sequence * self.tensor)
        shard = rest if self.shard is None else self.shard
        if over or shard != rest:
            raise ValueError(
                f"parallel: expected replicate x shard x sequence x tensor to be the {processes} processes, "
                f"got {self.replicate} x {self.shard} x {self.sequence} x {self.tensor}"
            )
        return self.replicate, shard, self.sequence, self.tensor
