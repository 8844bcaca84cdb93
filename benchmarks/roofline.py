"""What a chip's memory and matrix units let an op's kernels reach, without the chip.

    python -m seqzoo.benchmarks.roofline                                    every op on an H200
    python -m seqzoo.benchmarks.roofline --ops gated_delta_rule --chips H100 A100 --json roofline.json

A pass takes at least the longer of its bytes over the memory's rate and its products over the matrix units' rate; one
comes after another. `least` is the op itself: inputs and outputs moved once. A share is least's floor over a
decomposition's: what it could reach of the chip's best if its kernels were perfect. Latency, launches and a chip that
is not full come on top, which is why a published time stands beside where there is one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seqzoo.benchmarks.decompositions import DECOMPOSITIONS
from seqzoo.benchmarks.shapes import Pass, Shape


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
# The shapes, and fla's and FlashQLA's times [ms] on an H200, that FlashQLA publishes (its benchmark_results_H200.txt).
SHAPES = {
    "1x32768, 16/32 heads": Shape(1, 32768, 16, 32),
    "1x8192, 16/32 heads": Shape(1, 8192, 16, 32),
    "4x8192, 16/32 heads": Shape(4, 8192, 16, 32),
    "1x32768, 4/8 heads": Shape(1, 32768, 4, 8),
    "1x32768, 2/8 heads": Shape(1, 32768, 2, 8),
}
PUBLISHED = {
    ("gated_delta_rule", "forward"): {
        "1x32768, 16/32 heads": (1.890, 0.877), "1x8192, 16/32 heads": (0.472, 0.280),
        "4x8192, 16/32 heads": (1.898, 0.611), "1x32768, 2/8 heads": (0.902, 0.320),
    },
    ("gated_delta_rule", "backward"): {
        "1x32768, 16/32 heads": (5.697, 2.515), "1x8192, 16/32 heads": (1.444, 0.789),
        "1x32768, 4/8 heads": (2.743, 0.887),
    },
}  # fmt: skip


def floor(passes: Sequence[Pass], chip: Chip) -> float:
    """[s] What the passes take at least, one after another."""
    return sum(max(p.moved / chip.memory, p.flops / chip.products) for p in passes)


def rows(op: str, direction: str, shape: Shape, chip: Chip) -> list[dict]:
    """A row for each decomposition."""
    found, per_token = [], shape.rows * shape.HV
    for who, decomposition in DECOMPOSITIONS[op, direction].items():
        passes = decomposition(shape)
        seconds = floor(passes, chip)
        least = found[0]["floor_ms"] / 1e3 if found else seconds
        moved, flops = sum(p.moved for p in passes), sum(p.flops for p in passes)
        found.append(
            dict(
                who=who, kernels=len(passes), bytes_per_token_and_head=moved / per_token,
                flops_per_token_and_head=flops / per_token, floor_ms=seconds * 1e3, share=least / seconds,
            )
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted({op for op, _ in DECOMPOSITIONS})
    parser.add_argument("--ops", nargs="+", default=every, choices=every)
    parser.add_argument("--chips", nargs="+", default=["H200"], choices=CHIPS)
    parser.add_argument("--passes", action="store_true", help="also every kernel's bytes and products")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for op, direction in DECOMPOSITIONS:
        if op not in args.ops:
            continue
        for label, shape in SHAPES.items():
            for chip in args.chips:
                print(f"\n{op} {direction}, {label}, bf16, K = V = {shape.K}, {chip}")
                published = PUBLISHED.get((op, direction), {}).get(label) if chip == "H200" else None
                for row in rows(op, direction, shape, CHIPS[chip]):
                    text = (
                        f"  {row['who']:9} {row['kernels']:2} kernels {row['bytes_per_token_and_head']:7.0f} B and"
                        f" {row['flops_per_token_and_head'] / 1e3:6.0f} kFLOP per token and head,"
                        f" floor {row['floor_ms']:6.3f} ms, at most {row['share']:4.0%} of the least"
                    )
                    if published and row["who"] in ("fla", "FlashQLA"):
                        text += f"; published {published[row['who'] == 'FlashQLA']:.3f} ms"
                    print(text)
                    if args.passes:
                        for p in DECOMPOSITIONS[op, direction][row["who"]](shape):
                            print(f"      {p.name:20} {p.moved / 1e6:9.1f} MB {p.flops / 1e9:9.1f} GFLOP")
                    found.append(dict(op=op, direction=direction, shape=label, chip=chip, **row))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
