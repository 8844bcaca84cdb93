"""Linear attention with one memory per key head, beside the layer that repeats keys, values and decays per query head.

    python -m seqzoo.benchmarks.bench_linear_attention --threads 1 --save benchmarks/results/cpu_linear_attention.md

SpikingBrain-7B's linear layer in small: relu features, a decay per key channel, seven query heads to a key head;
forward and backward. `repeated` is what the released code does (arXiv 2509.05276), in the same C++; `repeated, torch`
is a port of it that has torch only (projections and norm are ours all the same). Outputs and gradients are compared
first. On a machine that is never quiet give `--cpu-seconds --threads 1`.

What can be had: repeating makes keys, values, decays and memories seven times as many, but every query head reads its
memory, and passes a gradient to it, in either form. Of the multiplications of both ways in this C++, at width 32, about
6,300 are a query's and 5,700 a key's, so 7 (6.3 + 5.7) / (7 x 6.3 + 5.7) = 1.7 times fewer when grouped (1.85 at 128).
Beyond that the gain is that products of seven rows run better than those of one, which depends on the processor. And of
a layer's time most is projections, norm and gates, the same in both: see the results, layer less op.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.benchmarks.timing import QuietGate, machine, time_in_turn
from seqzoo.kernels.linear_attention.op import BACKENDS
from seqzoo.layers.mixers import linear_attention as home

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # norm of the difference over the norm
HIDDEN = 896
SIZES = {"28/4 x 32": (28, 4, 32), "14/2 x 64": (14, 2, 64)}  # query heads / key heads x width of both
WIDE = {"28/4 x 128": (28, 4, 128)}  # the released model's own; the op alone
Op = Callable[..., tuple[Tensor, Tensor]]


def grouped(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state=None, starts=None, backend="cpp") -> tuple:
    return BACKENDS[backend](q, k, v, g, state, starts)


def repeated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, state=None, starts=None, backend="cpp") -> tuple:
    k, v, g = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v, g))
    return BACKENDS[backend](q, k, v, g, state, starts)


FORMS: dict[str, Op] = {
    "grouped": grouped,
    "repeated": repeated,
    "repeated, torch": partial(repeated, backend="torch"),
}


def layer(heads: int, groups: int, width: int, tokens: int, dtype: torch.dtype) -> Callable[[Op], tuple[Tensor, ...]]:
    part = home.LinearAttention(
        HIDDEN,
        num_heads=heads,
        num_kv_heads=groups,
        key_width=width,
        value_width=width,
        feature="relu",
        decay="channel",
        bias=True,
    ).to(dtype)
    x = torch.randn(1, tokens, HIDDEN).to(dtype).requires_grad_()
    weights, inputs = torch.randn(1, tokens, HIDDEN).to(dtype), [x, *part.parameters()]

    def run(op: Op) -> tuple[Tensor, ...]:
        home.linear_attention = op
        y, _ = part(x)
        return y, *torch.autograd.grad(y, inputs, weights)

    return run


def alone(heads: int, groups: int, width: int, tokens: int, dtype: torch.dtype) -> Callable[[Op], tuple[Tensor, ...]]:
    q, k, v = (torch.randn(1, tokens, n, width) for n in (heads, groups, groups))
    inputs = [(F.relu(q) * width**-0.5).to(dtype), F.relu(k).to(dtype), v.to(dtype)]
    inputs.append(F.logsigmoid(torch.randn(1, tokens, groups, width)) / 16)
    inputs, weights = [x.requires_grad_() for x in inputs], torch.randn(1, tokens, heads, width).to(dtype)

    def run(op: Op) -> tuple[Tensor, ...]:
        o, _ = op(*inputs)
        return o, *torch.autograd.grad(o, inputs, weights)

    return run


def check(run: Callable[[Op], tuple[Tensor, ...]], tolerance: float) -> None:
    truth = run(FORMS["grouped"])
    for name, form in FORMS.items():
        for a, b in zip(run(form), truth, strict=True):
            error = ((a.double() - b.double()).norm() / b.double().norm()).item()
            if not error < tolerance:
                raise SystemExit(f"{name} differs by {error:.1e} of its size, more than {tolerance}: nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--only", default="", help="cases with this in their title")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-seconds", action="store_true", help="this process's own, instead of a clock on the wall")
    parser.add_argument("--save", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, gate = (time.process_time, QuietGate(slack=inf)) if args.cpu_seconds else (time.perf_counter, QuietGate())
    unit = "CPU time" if args.cpu_seconds else "time"
    lines = [f"Linear attention, forward and backward, {unit} of {args.rounds} rounds: {machine()}", "```"]
    cases = [(f"layer {name}", layer, sizes) for name, sizes in SIZES.items()]
    cases += [(f"op {name}", alone, sizes) for name, sizes in {**SIZES, **WIDE}.items()]
    for dtype in args.dtypes:
        for tokens in args.tokens:
            for title, make, sizes in (case for case in cases if args.only in case[0]):
                torch.manual_seed(0)
                run = make(*sizes, tokens, DTYPES[dtype])
                check(run, TOLERANCE[dtype])
                runs = {name: partial(run, form) for name, form in FORMS.items()}
                rows = time_in_turn(runs, args.rounds, warm_up=0, gate=gate, clock=clock)
                for name, row in rows.items():
                    slower = row.median / rows["grouped"].median
                    spread = f"[{row.low * 1e3:.1f}-{row.high * 1e3:.1f}]"
                    quiet = "" if args.cpu_seconds else f"  quiet {row.quiet:.0%}"
                    lines.append(
                        f"{title:16s} T={tokens:<5d} {dtype}  {name:16s} {row.median * 1e3:9.1f} ms  {spread:18s} "
                        f"{slower:6.2f} times grouped's{quiet}"
                    )
                    print(lines[-1], flush=True)
    if args.save:
        args.save.write_text("\n".join([*lines, "```", ""]))


if __name__ == "__main__":
    main()
