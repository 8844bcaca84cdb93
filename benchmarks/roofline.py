"""What a chip's memory and matrix units let an op's kernels reach, without the chip.

    python -m seqzoo.benchmarks.roofline                                    every op on an H200
    python -m seqzoo.benchmarks.roofline --ops gated_delta_rule --chips H100 A100 --json roofline.json

A pass takes at least the longer of its bytes over the memory's rate and its products over the matrix units' rate; one
comes after another. `least` is the op itself: inputs and outputs moved once. A share is least's floor over a
decomposition's: what it could reach of the chip's best if its kernels were perfect. Latency, launches and a chip that
is not full come on top, which is why a published time stands beside where there is one. Ours has the blocks of sm_90's
tables on every chip, and what `kernel_models/` says of an op: one part of a sequence, whole chunks, no documents.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqzoo.benchmarks.decompositions import MODELS
from seqzoo.benchmarks.shapes import Model, Pass


class Chip(NamedTuple):
    """Of its data sheet: memory [bytes/s], dense bf16 products [FLOP/s]."""

    memory: float
    products: float


CHIPS = {
    "H200": Chip(4.8e12, 989e12),
    "H100": Chip(3.35e12, 989e12),
    "A100": Chip(2.04e12, 312e12),
    "MI300X": Chip(5.3e12, 1307e12),
}


def floor(passes: Sequence[Pass], chip: Chip) -> float:
    """[s] What the passes take at least, one after another."""
    return sum(max(p.moved / chip.memory, p.flops / chip.products) for p in passes)


def rows(model: Model, shape: Any, chip: Chip) -> list[dict]:
    """A row for each side."""
    found, units = [], model.units(shape)
    for who, side in model.sides.items():
        passes = side(shape)
        seconds = floor(passes, chip)
        least = found[0]["floor_ms"] / 1e3 if found else seconds
        moved, flops = sum(p.moved for p in passes), sum(p.flops for p in passes)
        found.append(
            dict(
                who=who, kernels=len(passes), unit=model.unit, bytes_per_unit=moved / units,
                flops_per_unit=flops / units, floor_ms=seconds * 1e3, share=least / seconds,
            )
        )  # fmt: skip
    return found


def _print(model: Model, label: str, shape: Any, chip: str, passes: bool) -> list[dict]:
    """What `rows` says, which is returned."""
    print(f"\n{model.op} {model.direction}, {label}, bf16, {chip}, per {model.unit}")
    published = model.published.get(label, {}) if chip == "H200" else {}
    found = rows(model, shape, CHIPS[chip])
    for row in found:
        text = (
            f"  {row['who']:9} {row['kernels']:2} kernels {row['bytes_per_unit']:9.0f} B and"
            f" {row['flops_per_unit'] / 1e3:8.0f} kFLOP, floor {row['floor_ms']:7.4f} ms,"
            f" at most {row['share']:4.0%} of the least"
        )
        print(text + (f"; published {published[row['who']]:.3f} ms" if row["who"] in published else ""))
        for p in model.sides[row["who"]](shape) if passes else ():
            print(f"      {p.name:28} {p.moved / 1e6:9.1f} MB {p.flops / 1e9:9.1f} GFLOP")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted({op for op, _ in MODELS})
    parser.add_argument("--ops", nargs="+", default=every, choices=every)
    parser.add_argument("--chips", nargs="+", default=["H200"], choices=CHIPS)
    parser.add_argument("--passes", action="store_true", help="also every kernel's bytes and products")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for (op, direction), model in MODELS.items():
        for label, shape in model.shapes.items() if op in args.ops else ():
            for chip in args.chips:
                for row in _print(model, label, shape, chip, args.passes):
                    found.append(dict(op=op, direction=direction, shape=label, chip=chip, **row))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
