"""Times functions in turn on a machine that others use too.

Each round runs every function once, after waiting until a known matrix product runs at its quiet speed, so that a slow
moment of the machine hits all of them alike. Quote medians and ratios, and say which share of the runs was quiet.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds over the rounds; `ratio` is the first function's median over this one's, `quiet` a share of the runs."""

    median: float
    low: float
    high: float
    ratio: float
    quiet: float

    def __str__(self) -> str:
        spread = f"{self.low * 1e3:.2f}-{self.high * 1e3:.2f}"
        return f"{self.median * 1e3:9.2f} ms  [{spread}]  {self.ratio:6.2f}x  quiet {self.quiet:.0%}"


class QuietGate:
    """Waits until an n x n fp32 product takes at most `slack` times the best it took when the gate was made."""

    def __init__(self, n: int = 1024, slack: float = 1.3) -> None:
        self.probe = torch.randn(n, n)
        self.limit = slack * min(self._seconds() for _ in range(20))

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.probe @ self.probe
        return time.perf_counter() - start

    def wait(self, at_most: float = 2.0) -> bool:
        """True once three probes in a row were quiet; False after `at_most` seconds."""
        start, quiet = time.perf_counter(), 0
        while time.perf_counter() - start < at_most:
            quiet = quiet + 1 if self._seconds() < self.limit else 0
            if quiet == 3:
                return True
            if not quiet:
                time.sleep(0.05)
        return False


def time_in_turn(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warm_up: int = 1,
    gate: QuietGate | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every function once per round.

    Args:
        functions: by name; the first is the baseline of the ratios.
        rounds: timed runs of each.
        warm_up: runs of each before the first timed one.
        gate: what to wait for before each run; made here where not given.
        clock: [s] `time.process_time` counts this process's own work, all a machine that is never quiet can tell.

    Returns:
        The timing of each, by name.

    Raises:
        ValueError: no function, or no round.
    """
    if not functions or rounds < 1:
        raise ValueError(f"time_in_turn: expected functions and rounds >= 1, got {len(functions)} and {rounds}")
    gate = gate or QuietGate()
    for function in functions.values():
        for _ in range(warm_up):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    quiet = dict.fromkeys(functions, 0)
    for _ in range(rounds):
        for name, function in functions.items():
            quiet[name] += gate.wait()
            start = clock()
            function()
            seconds[name].append(clock() - start)
    baseline = statistics.median(next(iter(seconds.values())))
    return {
        name: Timing(statistics.median(s), min(s), max(s), baseline / statistics.median(s), quiet[name] / rounds)
        for name, s in seconds.items()
    }


def machine() -> str:
    """One line for the head of a table: processor, threads, versions."""
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    a = torch.randn(512, 512)
    print(machine())
    for name, row in time_in_turn({"two products": lambda: (a @ a, a @ a), "one product": lambda: a @ a}).items():
        print(f"{name:14s} {row}")
