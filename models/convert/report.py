"""What a conversion does to every tensor, as a table."""

import re
from collections import Counter
from typing import NamedTuple

from seqzoo.models.checkpoints import Head


class Fate(NamedTuple):
    """Tensors of one folder that become tensors of the other."""

    what: str
    sources: dict[str, Head]
    targets: dict[str, Head]


class Report(NamedTuple):
    """Of a conversion done, or only planned."""

    source: str  # architecture
    target: str
    fates: list[Fate]
    carried: list[str]  # files beside the weights
    left: list[str]  # what the new folder does not get

    def __str__(self) -> str:
        lines = [(f.what, _names(f.sources), _names(f.targets), _kind(f.targets)) for f in self.fates]
        widths = [max((len(line[n]) for line in lines), default=0) for n in range(3)]
        table = ["  ".join([*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[3]]) for line in lines]
        counts = Counter(fate.what for fate in self.fates)
        return "\n".join([
            *table,
            f"{self.source}: {_sum(self.fates, 1)} -> {self.target}: {_sum(self.fates, 2)}",
            "rows: " + ", ".join(f"{n} {what}" for what, n in counts.items()),
            f"files carried along: {', '.join(self.carried) or 'none'}",
            *([f"left behind: {', '.join(self.left)}"] if self.left else []),
        ])  # fmt: skip


def _names(heads: dict[str, Head]) -> str:
    """Names that differ in an expert's number are written once."""
    if not heads:
        return "-"
    short: dict[str, list[int]] = {}
    for name in heads:
        number = re.search(r"\.experts\.(\d+)\.", name)
        key = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
        short.setdefault(key, []).append(0 if number is None else int(number[1]))
    return " + ".join(key.replace("{}", f"{{{min(n)}..{max(n)}}}") for key, n in short.items())


def _kind(heads: dict[str, Head]) -> str:
    kinds = Counter(f"{head.dtype} {list(head.shape)}" for head in heads.values())
    return " + ".join(kind if n == 1 else f"{n} x {kind}" for kind, n in kinds.items())


def _sum(fates: list[Fate], side: int) -> str:
    heads = [head for fate in fates for head in fate[side].values()]
    return f"{len(heads)} tensors, {sum(head.bytes for head in heads) / 1e6:,.1f} MB"
