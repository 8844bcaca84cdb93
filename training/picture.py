"""loss.png: bits per byte against tokens."""

import logging
from pathlib import Path

from seqzoo.training.logbook import records

PICTURE = "loss.png"
SMOOTH = 0.05  # part of the records that the training curve's mean runs over


def draw_losses(folder: Path, xz_bits_per_byte: float | None) -> Path:
    """Draw a run's metrics.jsonl. xz_bits_per_byte: what `xz -9` needs for the validation bytes, where it is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)  # it tells of every font it finds
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.add_subplot()
    lines = records(folder)
    tokens, bits = _curve(lines, {"train"})
    axes.plot(tokens, bits, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(tokens, _running_mean(bits), color="tab:blue", linewidth=1.5, label="training")
    tokens, held_out = _curve(lines, {"validation", "final"})
    if held_out:
        label = f"validation (last: {held_out[-1]:.3f})"
        axes.plot(tokens, held_out, color="tab:orange", marker="o", markersize=4, label=label)
    if xz_bits_per_byte is not None:
        label = f"xz -9 on the validation bytes ({xz_bits_per_byte:.3f})"
        axes.axhline(xz_bits_per_byte, color="tab:gray", linestyle="--", linewidth=1, label=label)
    shown = [x for x in (*bits, *held_out, xz_bits_per_byte) if x is not None]
    if shown and max(shown) > 2 * min(shown):  # the first steps would flatten all that follows
        axes.set_yscale("log")
        ticks = [t for t in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10) if min(shown) / 1.2 < t]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks], minor=False)
        axes.set_yticks([], minor=True)
        axes.set_ylim(min(shown) / 1.1, max(shown) * 1.05)
    axes.set(xlabel="tokens", ylabel="bits per byte")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / PICTURE)
    return folder / PICTURE


def _curve(lines: list[dict], splits: set[str]) -> tuple[list[int], list[float]]:
    chosen = [line for line in lines if line["split"] in splits and "bits_per_byte" in line]  # not of every objective
    return [line["tokens"] for line in chosen], [line["bits_per_byte"] for line in chosen]


def _running_mean(values: list[float]) -> list[float]:
    width = max(1, round(SMOOTH * len(values)))
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
