"""The end of a run: what was reached, at what cost, in one table."""

import sys
from typing import Any

import torch

Rows = list[tuple[str, str]]


def closing_rows(facts: dict[str, Any]) -> Rows:
    """What the table says of a run's closing record and of its model's cost, in words and units."""
    rows = [
        ("parameters", f"{facts['parameters']:,}"),
        ("active per token", f"{facts['active_parameters']:,}"),
        ("FLOPs per token, forward", f"{facts['flops_per_token']:,}"),
        (f"state of {facts['context']:,} tokens", f"{facts['state_bytes']:,} bytes"),
        ("tokens", f"{facts['tokens']:,}"),
        ("training time", f"{facts['seconds']:,.1f} s"),
        ("speed", f"{facts['tokens'] / max(facts['seconds'], 1e-9):,.0f} tokens/s"),
        ("peak memory", f"{facts['peak_bytes'] / 2**20:,.0f} MiB"),
        ("validation", f"{facts['bits_per_byte']:.4f} bits per byte of {facts['validation_bytes']:,} bytes"),
        ("xz -9, the same bytes", f"{facts['xz_bits_per_byte']:.4f} bits per byte"),
        ("checkpoint", str(facts["checkpoint"])),
        ("picture", str(facts["picture"])),
    ]
    return rows


def print_table(rows: Rows) -> None:
    """Two columns, on a terminal in a frame, and whole wherever it goes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    wide = 7 + sum(max(map(len, column)) for column in zip(*rows, strict=True))  # 7: the frame
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
