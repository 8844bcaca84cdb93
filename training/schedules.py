"""The learning rate over a run, as a factor of each group's own: the `scheduler=` choices.

A schedule is a function of the step, so there is no state to save.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # step, from 0 -> factor


def cosine(steps: int, *, warmup: float, floor: float) -> Schedule:
    """Up in a line, then down along half a cosine.

    Args:
        steps: of the run.
        warmup: part of the run to the top, 0 to 1.
        floor: the factor at the end.

    Raises:
        ValueError: a part or factor outside 0 to 1.
    """
    _check(warmup=warmup, floor=floor)

    def factor(step: int) -> float:
        rising, done = _progress(step, steps, warmup)
        return rising if rising < 1 else floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return factor


def wsd(steps: int, *, warmup: float, decay: float, floor: float) -> Schedule:
    """Warm up, stay, decay in a line (arXiv 2404.06395).

    Args:
        steps: of the run.
        warmup, decay: parts of the run, 0 to 1, together at most 1.
        floor: the factor at the end.

    Raises:
        ValueError: a part or factor outside 0 to 1, or parts that overlap.
    """
    _check(warmup=warmup, decay=decay, floor=floor)
    if warmup + decay > 1:
        raise ValueError(f"scheduler.decay: expected at most 1 - warmup = {1 - warmup}, got {decay}")

    def factor(step: int) -> float:
        rising, _ = _progress(step, steps, warmup)
        left = (steps - step) / max(1.0, decay * steps)
        return rising if rising < 1 else floor + (1 - floor) * min(1.0, left)

    return factor


def _progress(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """How far up the warm-up, and how far through the rest; the first step is not at zero."""
    up = warmup * steps
    return ((step + 1) / up if up >= 1 else 1.0), max(0.0, step - up) / max(1.0, steps - up)


def _check(**parts: float) -> None:
    for name, part in parts.items():
        if not 0 <= part <= 1:
            raise ValueError(f"scheduler.{name}: expected 0 to 1, got {part}")
