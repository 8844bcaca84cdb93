"""Times functions in turn on a GPU, with nothing of one left in the cache for the next."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "triton", "fla-core", "flash-linear-attention", "flash-qla", "transformers")
CACHE = 256 << 20  # bytes written before each run: more than any chip's last-level cache


def about(device: torch.device) -> dict[str, str]:
    """Device, versions and date, for the head of a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return dict(device=name, date=str(date.today()), python=platform.python_version(), **versions)


def time_in_turn(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int = 20, seconds: float = 4.0
) -> dict[str, dict[str, float]]:
    """Median and spread [ms] of each, one of each per round.

    Each run begins on a cache that holds none of its inputs, behind a write that is long enough for the host to have
    queued the run's launches: what is timed is the GPU, not Python. A CPU is timed by its clock.

    Args:
        functions: by name; warm already.
        rounds: at most; fewer where all rounds would take longer than `seconds`.
    """
    gpu = device.type == "cuda"
    flush = torch.empty(CACHE if gpu else 1, dtype=torch.int8, device=device)

    def one(function: Callable[[], Any]) -> float:
        flush.zero_()
        if not gpu:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    first = sum(one(function) for function in functions.values()) / 1e3
    rounds = max(3, min(rounds, int(seconds / max(first, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(one(function))
    return {
        name: dict(median=statistics.median(ms), low=min(ms), high=max(ms), rounds=rounds) for name, ms in taken.items()
    }


def peak(function: Callable[[], Any], device: torch.device) -> int:
    """[bytes] How far a run raises what is allocated on the GPU; 0 on a CPU."""
    if device.type != "cuda":
        function()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
