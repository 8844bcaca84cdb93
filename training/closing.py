"""The end of a run: what was reached, at what cost, in tables."""

import sys
from typing import Any

import torch

Rows = list[tuple[str, ...]]


def part_rows(facts: dict[str, Any]) -> Rows:
    """What each of the model's parts costs, below a row of headings, and their sum."""
    names = ("parameters", "active_parameters", "flops_per_token", "state_bytes")
    headings = ("part", "layers", "parameters", "active per token", "FLOPs per token, forward")
    rows = [(*headings, f"state of {facts['context']:,} tokens [bytes]")]
    for part in facts["parts"]:
        rows.append((part["name"], f"{part['count']:,}", *(f"{part[name]:,}" for name in names)))
    return [*rows, ("all", "", *(f"{facts[name]:,}" for name in names))]


def closing_rows(facts: dict[str, Any]) -> Rows:
    """What the table says of a run's closing record, in words and units."""
    return [
        ("tokens", f"{facts['tokens']:,}"),
        ("training time", f"{facts['seconds']:,.1f} s"),
        ("speed", f"{facts['tokens'] / max(facts['seconds'], 1e-9):,.0f} tokens/s"),
        ("peak memory", f"{facts['peak_bytes'] / 2**20:,.0f} MiB"),
        ("validation", f"{facts['bits_per_byte']:.4f} bits per byte of {facts['validation_bytes']:,} bytes"),
        ("xz -9, the same bytes", f"{facts['xz_bits_per_byte']:.4f} bits per byte"),
        ("checkpoint", str(facts["checkpoint"])),
        ("picture", str(facts["picture"])),
    ]


def print_table(rows: Rows, *, numbers: bool = False) -> None:
    """In a frame, on a terminal as wide as that, and whole elsewhere. `numbers`: headings, then names and numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=numbers)
    for i, heading in enumerate(rows[0]):
        table.add_column(heading if numbers else None, justify="right" if numbers and i else "left")
    for row in rows[1:] if numbers else rows:
        table.add_row(*row)
    columns = list(zip(*rows, strict=True))
    wide = 1 + sum(3 + max(map(len, column)) for column in columns)  # a frame around each
    width = None if sys.stdout.isatty() else wide
    Console(width=width, markup=False, highlight=False).print(table)


def print_sample(text: str) -> None:
    """Text that a model made; what could steer the terminal becomes U+FFFD."""
    print("\n" + "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text) + "\n")


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: of the process, or on a GPU what torch took there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
