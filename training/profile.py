"""One step looked at closely: how much of it goes to exchanges, and a trace to open in a browser.

    with profiled() as found:
        step()
    found.shares, found.save(path)

A collective is under way, as torch's profiler has it, while gloo's threads are at it (CPU) or its NCCL kernel runs
(CUDA): waiting for the other processes is part of that. It is beside work where, at the same time, an operator of
PyTorch's or of ours runs in any other thread (CPU) or any other kernel on the device (CUDA).
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COLLECTIVES = ("gloo:", "nccl")  # how their names begin, where they are at work
WORK = ("aten::", "seqzoo::")
Interval = tuple[float, float]  # from, to


class Found:
    """What a profile says.

    Attributes:
        shares: communication, of the step's time in which a collective is under way; waiting, in which nothing else is.
    """

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        self.profile: profile | None = None

    def save(self, path: Path) -> None:
        """As a Chrome trace, compressed where the name ends in .gz. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(path))


@contextmanager
def profiled() -> Iterator[Found]:
    """What is called inside is profiled, on the CPU and the GPU there is. It takes longer than it would."""
    found, on_gpu = Found(), torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        start = time.perf_counter()
        yield found
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [x for x in seen.events() if x.device_type == where]
    if on_gpu:  # what only names a stretch of time is no work
        events = [x for x in events if not x.is_user_annotation]
    times = lambda wanted: [(x.time_range.start, x.time_range.end) for x in events if wanted(x.name)]
    exchanges = times(lambda name: name.startswith(COLLECTIVES))
    work = times(lambda name: not name.startswith(COLLECTIVES) if on_gpu else name.startswith(WORK))
    alone = without(exchanges, work)
    found.profile = seen
    found.shares = dict(communication=length(exchanges) / 1e6 / seconds, waiting=length(alone) / 1e6 / seconds)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times, in order, none twice."""
    found: list[Interval] = []
    for low, high in sorted(intervals):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of all times that are in any."""
    return sum(high - low for low, high in union(intervals))


def without(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """Times that are in some of the first, and in none of the others."""
    found, others, at = [], union(others), 0
    for low, high in union(intervals):
        while at < len(others) and others[at][1] <= low:
            at += 1
        for a, b in others[at:]:
            if a >= high:
                break
            if a > low:
                found.append((low, a))
            low = b
        if low < high:
            found.append((low, high))
    return found
