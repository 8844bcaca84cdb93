"""What a model's blocks count over its tokens, and what follows: a loss, a step's corrections, numbers for a log."""

from collections import defaultdict

from torch import Tensor, nn

Stats = list[dict[str, Tensor]]  # per block, bottom first: sums over tokens, by name; {} where a block counts nothing


class Counting:
    """The part of `SeqZooForCausalLM` that deals with counts."""

    def added_loss(self, stats: Stats, earlier: Stats | None = None) -> Tensor | float:
        """What the blocks add to the loss, from the counts pooled over all blocks of one kind, as transformers does.

        `earlier`: what the same batch's micro-batches before this one counted. It weighs in, and gets no gradient.
        """
        pools, owners = defaultdict(list), {}
        for i, (entry, block) in enumerate(self._levels(len(stats))):
            if stats[i]:
                name = entry if entry in self.config.blocks else ("channel", entry.rpartition("/")[2])
                owners[name] = block
                pools[name].append(i)
        return sum(
            owners[name].loss(_pool(stats, blocks), None if earlier is None else _pool(earlier, blocks))
            for name, blocks in pools.items()
        )

    def after_step(self, stats: Stats) -> None:
        """Once per optimizer step, with the step's counts: parts that balance themselves do it here."""
        for (_, block), counted in zip(self._levels(len(stats)), stats, strict=True):
            if counted:
                block.after_step(counted)

    def metrics(self, stats: Stats) -> dict[str, float]:
        """What the counts say, for a log: by name, the mean over the blocks that have something to say; and as
        <name>_<level> each alone, of blocks that are `by_level`."""
        found: dict[str, list[float]] = {}
        for level, ((_, block), counted) in enumerate(zip(self._levels(len(stats)), stats, strict=True)):
            for name, value in block.metrics(counted).items() if counted else ():
                found.setdefault(name, []).append(value)
                if getattr(block, "by_level", False):
                    found[f"{name}_{level}"] = [value]
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _levels(self, count: int) -> list[tuple[str, nn.Module]]:
        """Of what counted: the entry in a pattern, and the block; where there are more than the stack's, mtp's too."""
        pattern = self.config.pattern
        levels = [(pattern[i % len(pattern)], block) for i, block in enumerate(self.stack.levels())]
        if count > len(levels):
            levels += zip(self.config.mtp["pattern"], self.mtp.stack.levels(), strict=True)
        return levels


def _pool(stats: Stats, blocks: list[int]) -> dict[str, Tensor]:
    return {key: sum(stats[i][key] for i in blocks) for key in stats[blocks[0]]}
