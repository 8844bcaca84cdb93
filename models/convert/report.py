"""What a conversion does to every tensor, as a table and as JSON."""

import re
from collections import Counter
from typing import Any, NamedTuple

from seqzoo.models.checkpoints import Head


class Fate(NamedTuple):
    """Tensors of one folder that become tensors of the other."""

    what: str
    sources: dict[str, Head]
    targets: dict[str, Head]


class Verification(NamedTuple):
    """What is known of how the two models compare."""

    said: str  # a line
    measured: dict[str, Any]  # numbers by name, as JSON has them; empty where nothing was measured


UNVERIFIED = Verification("not verified: not asked for", {})


class Report(NamedTuple):
    """Of a conversion done, or only planned."""

    source: str  # architecture
    target: str
    fates: list[Fate]
    carried: list[str]  # files beside the weights
    left: list[str]  # what the new folder does not get
    verification: Verification = UNVERIFIED

    def counts(self) -> dict[str, dict[str, int]]:
        """Fate -> how many rows and tensors have it, and their bytes, on both sides."""
        counts: dict[str, Counter[str]] = {}
        for fate in self.fates:
            heads, made = fate.sources.values(), fate.targets.values()
            counts.setdefault(fate.what, Counter()).update(
                rows=1, sources=len(heads), source_bytes=sum(head.bytes for head in heads),
                targets=len(made), target_bytes=sum(head.bytes for head in made),
            )  # fmt: skip
        return {what: dict(count) for what, count in counts.items()}

    def json(self) -> dict[str, Any]:
        """All of it, for json.dumps."""
        sides = {
            name: [head for f in self.fates for head in f[n].values()] for name, n in (("source", 1), ("target", 2))
        }
        return {
            name: dict(architecture=getattr(self, name), tensors=len(heads), bytes=sum(head.bytes for head in heads))
            for name, heads in sides.items()
        } | dict(
            counts=self.counts(),
            fates=[dict(fate=f.what, sources=_facts(f.sources), targets=_facts(f.targets)) for f in self.fates],
            carried=self.carried,
            left=self.left,
            verification=dict(said=self.verification.said, **self.verification.measured),
        )

    def __str__(self) -> str:
        lines = [(f.what, _names(f.sources), _names(f.targets), _kind(f.targets)) for f in self.fates]
        widths = [max((len(line[n]) for line in lines), default=0) for n in range(3)]
        table = ["  ".join([*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[3]]) for line in lines]
        counts = ", ".join(
            f"{n['rows']} {what} ({n['sources']} -> {n['targets']} tensors, {n['target_bytes'] / 1e6:,.1f} MB)"
            for what, n in self.counts().items()
        )
        return "\n".join([
            *table,
            f"{self.source}: {_sum(self.fates, 1)} -> {self.target}: {_sum(self.fates, 2)}",
            f"rows: {counts}",
            f"files carried along: {', '.join(self.carried) or 'none'}",
            *([f"left behind: {', '.join(self.left)}"] if self.left else []),
            f"verification: {self.verification.said}",
        ])  # fmt: skip


def _facts(heads: dict[str, Head]) -> list[dict[str, Any]]:
    return [dict(name=name, shape=list(x.shape), dtype=x.dtype, bytes=x.bytes) for name, x in heads.items()]


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
