"""Measures the tables of tuned configurations anew, on the GPU it runs on.

    python -m seqzoo.kernels.gpu.tune                          every op; writes the rows of this GPU's architecture
    python -m seqzoo.kernels.gpu.tune --ops short_conv --out tables

For each row, every configuration of the kernel's `space` runs the op's examples that reach the row, and the fastest one
whose results are the old configuration's is taken. What does not compile or does not fit is left out and said. Run
`python -m seqzoo.kernels.gpu.report` afterwards: what is fast here must not spill.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.gpu import tables
from seqzoo.kernels.gpu.examples import drawn, examples, ops

CONDITIONS = ("upto", "products")  # of a row; what else it has is the configuration


def seconds(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median of the rounds, each long enough to be measured."""
    call()
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def configurations(space: dict[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """All of a kernel's space."""
    for values in itertools.product(*space.values()):
        yield dict(zip(space, values, strict=True))


def flat(result: Any) -> list[Tensor]:
    """The tensors of what a call returned."""
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result or () for x in flat(part)] if isinstance(result, tuple | list) else []


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 2e-2) -> bool:
    """Whether two configurations gave the same, up to the rounding of 16 bits. Compared by size of the difference."""
    return all(
        (x.double() - y.double()).norm() <= tolerance * (y.double().norm() + 1e-30) for x, y in zip(a, b, strict=True)
    )


def reached(op: str, device: torch.device) -> dict[tuple[str, int], list[tuple[str, Callable]]]:
    """(kernel, row) of the device's architecture -> the examples that use it."""
    found: dict[tuple[str, int], list[tuple[str, Callable]]] = {}
    for label, call in examples(op, drawn(device)):
        with tables.asking() as asked:
            call()
        for _, kernel, _, row in dict.fromkeys(asked):
            found.setdefault((kernel, row), []).append((label, call))
    return found


def best(
    op: str,
    kernel: str,
    row: dict[str, Any],
    space: dict,
    calls: list[tuple[str, Callable]],
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """The row with the fastest configuration of the space; its own, where none is faster."""
    conditions = {name: row[name] for name in CONDITIONS if name in row}
    own = {name: value for name, value in row.items() if name not in CONDITIONS}
    expected = [[x.clone() for x in flat(call())] for _, call in calls]
    taken = {}
    for config in [own, *(own | c for c in configurations(space) if own | c != own)]:
        name = " ".join(f"{key}={value}" for key, value in config.items())
        try:
            with tables.using(op, kernel, config):
                if not all(same(flat(call()), wanted) for (_, call), wanted in zip(calls, expected, strict=True)):
                    print(f"    {name}: other results")
                    continue
                taken[name] = sum(seconds(call, device, rounds) for _, call in calls), config
        except Exception as error:  # whatever a compiler or driver says of a configuration that is not possible
            print(
                f"    {name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:80] if str(error) else ''}"
            )
    name = min(taken, key=lambda n: taken[n][0])
    own_name = next(iter(taken))
    print(f"  {kernel} {conditions}: {name}, {taken[own_name][0] / taken[name][0]:.2f} times as fast as {own_name}")
    return conditions | taken[name][1]


def written(table: dict[str, Any]) -> str:
    """A table as JSON, a row a line."""
    lines = []
    for kernel, arches in table.items():
        parts = []
        for name, value in arches.items():
            if name == "space":
                parts.append(f'    "space": {json.dumps(value)}')
            else:
                rows = ",\n".join(f"      {json.dumps(row)}" for row in value)
                parts.append(f'    "{name}": [\n{rows}\n    ]')
        lines.append(f'  "{kernel}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_suffix(".partial")
    beside.write_text(text)
    os.replace(beside, path)


def tune(op: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """The op's table with this device's rows measured anew."""
    table = json.loads(json.dumps(tables.table(op)))
    arch = tables.arch(device)
    for (kernel, n), calls in reached(op, device).items():
        if space := table[kernel].get("space"):
            table[kernel][arch][n] = best(op, kernel, table[kernel][arch][n], space, calls, device, rounds)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=ops(), choices=ops())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--out", type=Path, help="a folder for OP.json, in place of the package's own tables")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("tune: expected a GPU, and torch sees none")
    for op in options.ops:
        if not (tables.KERNELS / op / "tuned.json").exists():
            continue
        print(f"{op} on {tables.arch(options.device)}")
        text = written(tune(op, options.device, options.rounds))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        replace(options.out / f"{op}.json" if options.out else tables.KERNELS / op / "tuned.json", text)


if __name__ == "__main__":
    main()
