"""Our Triton kernels beside fla's, FlashQLA's and torch's attention: in turn, in one process, on a GPU.

    python -m seqzoo.benchmarks.gpu_ops --out benchmarks/results/gpu_ops
    TRITON_INTERPRET=1 python -m seqzoo.benchmarks.gpu_ops --device cpu      small shapes, to see that all of it runs

Each case first compares all results with ours (outputs, last states, gradients) and is not timed where they differ;
then forward and backward are timed in turn, and the memory of both together is read. A side that is not installed or
cannot run a case is said, with its reason.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.benchmarks.decompositions import MODELS
from seqzoo.benchmarks.gpu_cases import CASES, OTHER, Case, cases
from seqzoo.benchmarks.gpu_timing import about, peak, time_in_turn
from seqzoo.benchmarks.roofline import CHIPS, floor
from seqzoo.benchmarks.shapes import Shape

APART = 3e-2  # norm of the difference over the norm that two sides may have in bf16


class Run:
    """One side of a case: what it computes forward, and backward from what it kept."""

    def __init__(self, case: Case, function: Callable[..., Any], device: torch.device) -> None:
        self.function = function
        self.leaves = [x.detach().clone().requires_grad_(case.learns) for x in case.inputs.values()]
        self.names = list(case.inputs)
        outputs = self.outputs()
        generator = torch.Generator(device).manual_seed(1)
        self.towards = torch.randn(outputs[0].shape, generator=generator, device=device).to(outputs[0].dtype)
        self.results, self.said = {"o": outputs[0].detach()}, ""
        self.learns = case.learns
        if case.learns:
            self.kept = outputs[0]
            try:
                self.backward()
            except Exception as error:  # a peer that refuses backward on this chip still has a forward
                self.learns, self.said = False, f"no backward: {error}"[:220]
        if self.learns:
            used = torch.autograd.grad(self.kept, self.leaves, self.towards, retain_graph=True, allow_unused=True)
            pairs = zip(self.names, used, strict=True)
            self.results |= {f"d{name}": x for name, x in pairs if x is not None}

    def outputs(self) -> tuple[Tensor, ...]:
        found = self.function(*self.leaves)
        return found if isinstance(found, tuple) else (found,)

    def forward(self) -> None:
        with torch.no_grad():
            self.function(*self.leaves)

    def backward(self) -> None:
        torch.autograd.grad(self.kept, self.leaves, self.towards, retain_graph=True, allow_unused=True)

    def both(self) -> None:
        torch.autograd.grad(self.outputs()[0], self.leaves, self.towards, allow_unused=True)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference over the norm among what both have, and of what."""
    return max(
        ((a[name].double() - b[name].double()).norm().item() / (b[name].double().norm().item() + 1e-30), name)
        for name in a.keys() & b.keys()
    )


def measured(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """A row: times and memory of each side, and what could not be had."""
    runs: dict[str, Run] = {}
    said: dict[str, str] = {}
    for side, function in case.sides:
        if isinstance(function, str):
            said[side] = function
            continue
        try:
            run = Run(case, function, device)
        except Exception as error:  # whatever a peer says of a shape or a chip; ours must run
            if side == "seqzoo":
                raise
            said[side] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
            continue
        if run.said:
            if side == "seqzoo":
                raise RuntimeError(run.said)
            said[side] = run.said
        if side not in ("seqzoo", OTHER):
            off, where = apart(runs["seqzoo"].results, run.results)
            if not off < APART:
                said[side] = f"differs by {off:.1e} in {where}: not timed"
                continue
        runs[side] = run
    row: dict[str, Any] = dict(op=case.op, label=case.label, shape=case.shape._asdict(), said=said)
    row["forward"] = time_in_turn({side: run.forward for side, run in runs.items()}, device, seconds=seconds)
    if case.learns:
        both = {side: run for side, run in runs.items() if run.learns}
        row["backward"] = time_in_turn({side: run.backward for side, run in both.items()}, device, seconds=seconds)
        row["peak"] = {side: peak(run.both, device) for side, run in both.items()}
    return row


def share(row: dict[str, Any], direction: str, chip: str) -> float | None:
    """The least floor over our time."""
    op = row["op"] + (" by channel" if row["label"].endswith("per channel") else "")
    model = MODELS.get((op, direction))
    if model is None or chip not in CHIPS:
        return None
    return floor(model.sides["least"](Shape(**row["shape"])), CHIPS[chip]) * 1e3 / row[direction]["seqzoo"]["median"]


def chip_of(device: str) -> str:
    """The roofline's name of a device."""
    return next((name for name in CHIPS if name in device), "")


def text(row: dict[str, Any], chip: str) -> list[str]:
    """A row as lines of a table."""
    lines = []
    for direction in ("forward", "backward"):
        if direction not in row:
            continue
        ours = row[direction]["seqzoo"]
        part = share(row, direction, chip)
        cells = [
            f"{row['op']} {direction}",
            row["label"],
            f"{ours['median']:.3f} ({ours['low']:.3f}-{ours['high']:.3f})",
        ]
        cells.append("" if part is None else f"{part:.0%}")
        others = {side: t["median"] for side, t in row[direction].items() if side != "seqzoo"}
        cells.append("; ".join(f"{side} {ms:.3f} ({ms / ours['median']:.2f}x)" for side, ms in others.items()))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| | {row['label']} | {side}: {why} | | |" for side, why in row["said"].items()]
    if any(row.get("peak", {}).values()):
        memory = ", ".join(f"{side} {n / 2**20:.0f}" for side, n in row["peak"].items())
        lines.append(f"| | {row['label']} | memory of a step [MiB]: {memory} | | |")
    return lines


HEAD = "| op | shape | ours, ms | of the least floor | others, ms (times ours) |\n|---|---|---|---|---|"


def picture(rows: list[dict[str, Any]], head: dict[str, str], path: Path) -> None:
    """Bars of every case and side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{r['op']} {d}\n{r['label']}", r[d]) for r in rows for d in ("forward", "backward") if d in r]
    sides = list(dict.fromkeys(side for _, times in bars for side in times))
    figure, axes = plt.subplots(figsize=(10, 1 + 0.6 * len(bars)), layout="constrained")
    for n, side in enumerate(sides):
        at = [m + (n - len(sides) / 2) * 0.8 / len(sides) for m, (_, times) in enumerate(bars) if side in times]
        ms = [times[side]["median"] for _, times in bars if side in times]
        axes.barh(at, ms, height=0.8 / len(sides), align="edge", label=side)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="ms, median", title=f"{head['device']}, torch {head['torch']}, {head['date']}")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [make.__name__ for make in CASES]
    parser.add_argument("--ops", nargs="+", default=every, choices=every)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a case and direction may be timed")
    parser.add_argument("--out", type=Path, help="where to write OUT.json, OUT.md and OUT.png")
    args = parser.parse_args(arguments)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_ops: expected a GPU, and torch sees none; --device cpu runs small shapes")
    head, rows = about(args.device), []
    print(", ".join(f"{name} {value}" for name, value in head.items()), HEAD, sep="\n")
    for case in cases(args.ops, args.device):
        rows.append(measured(case, args.device, args.seconds))
        print(*text(rows[-1], chip_of(head["device"])), sep="\n", flush=True)
        if args.out:
            write(args.out, head, rows)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    if args.out:
        picture(rows, head, args.out.with_suffix(".png"))


def write(out: Path, head: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """What there is so far: a run that is cut short leaves it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for row in rows for line in text(row, chip_of(head["device"]))]
    versions = ", ".join(f"{name} {value}" for name, value in head.items())
    out.with_suffix(".md").write_text("\n".join([versions, "", HEAD, *lines, ""]))
    out.with_suffix(".json").write_text(json.dumps(dict(about=head, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
