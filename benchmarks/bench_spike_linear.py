"""int8 weights times spike counts in C++, beside torch's float32 product and the zoo's own, in turn, in one process.

    python -m seqzoo.benchmarks.bench_spike_linear --rows 1 256 --widths 1024 2048 4096

Times include the counting of x. On a machine that is not idle give `--threads 1`, and `--cpu` for processor seconds.
Equal results are checked before anything is timed. `bytes` are those of the weights with their scales.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from seqzoo.benchmarks.timing import machine
from seqzoo.kernels.linear import linear
from seqzoo.kernels.spike import spike_counts, spike_linear
from seqzoo.layers.rounding import quantised


def milliseconds(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The median of each, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def case(rows: int, width: int, args: argparse.Namespace) -> str:
    x, weight = torch.randn(rows, width), torch.randn(width, width) * width**-0.5
    whole, scales = quantised(weight, args.group)
    rounded = scales.repeat_interleave(args.group, dim=1)[:, :width] * whole
    counts, threshold = spike_counts(x)
    ours, truth = spike_linear(x, whole, scales, group=args.group), F.linear(threshold * counts, rounded)
    assert (ours - truth).abs().max() < 1e-5 * truth.abs().max()
    functions = {
        "spike_linear": lambda: spike_linear(x, whole, scales, group=args.group),
        "F.linear": lambda: F.linear(x, weight),
        "linear": lambda: linear(x, weight),
    }
    ms = milliseconds(functions, args.rounds, time.process_time if args.cpu else time.perf_counter)
    ratios = [ms[name] / ms["spike_linear"] for name in ("F.linear", "linear")]
    size = (whole.numel() + 4 * scales.numel()) / (4 * weight.numel())
    columns = [f"{ms[name]:.3f}" for name in functions] + [f"{r:.2f}" for r in ratios] + [f"{size:.3f}"]
    return f"| {rows} | {width} | {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="processor seconds of the process, not time on the wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{machine()}; {'processor' if args.cpu else 'wall'} ms, median of {args.rounds}")
    print("| rows | width | spike_linear | F.linear | linear | F.linear / ours | linear / ours | bytes, of fp32 |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in args.rows:
        for width in args.widths:
            print(case(rows, width, args), flush=True)


if __name__ == "__main__":
    main()
