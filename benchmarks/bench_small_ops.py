"""The small fused ops' C++ backends beside torch's compositions, in turn, in one process, on a CPU.

    python -m seqzoo.benchmarks.bench_small_ops --ops rms_norm short_conv --dtypes fp32 bf16

one: a token without gradients, as in decoding, the mean of many calls of the public op. forward and train: a batch
without gradients, and forward and backward. Equal results are checked before anything is timed. On a machine that is
not idle give `--threads 1`: ops this short wait for a second thread longer than they run.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seqzoo.benchmarks.timing import QuietGate, machine, time_in_turn
from seqzoo.kernels.delta_inputs.op import BACKENDS as DELTA_INPUTS
from seqzoo.kernels.delta_inputs.op import delta_inputs
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.rms_norm.op import BACKENDS as RMS_NORM
from seqzoo.kernels.rms_norm.op import GATED_BACKENDS as GATED_RMS_NORM
from seqzoo.kernels.rms_norm.op import gated_rms_norm, rms_norm
from seqzoo.kernels.short_conv.op import BACKENDS as SHORT_CONV
from seqzoo.kernels.short_conv.op import short_conv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # norm of the difference over the norm
CALLS = 300  # per timed run of one token


class Case(NamedTuple):
    backends: dict[str, Callable]
    public: Callable
    inputs: list[Tensor]
    rest: tuple = ()


def norm(rows: int, width: int) -> Case:
    public = lambda x, weight, eps, offset: rms_norm(x, weight, eps, offset=offset)
    return Case(RMS_NORM, public, [torch.randn(1, rows, width), torch.randn(width)], (1e-6, 1.0))


def gated(rows: int, width: int) -> Case:
    inputs = [torch.randn(1, rows, width), torch.randn(1, rows, width), torch.randn(width)]
    return Case(GATED_RMS_NORM, gated_rms_norm, inputs, (1e-6,))


def conv(T: int, C: int) -> Case:
    return Case(SHORT_CONV, short_conv, [torch.randn(1, T, C), torch.randn(C, 4), torch.randn(1, 3, C)], (None,))


def heads(T: int, H: int, HV: int, width: int) -> Case:
    qkv, ba = torch.randn(1, T, (2 * H + HV) * width), torch.randn(1, T, 2 * HV)

    def public(qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, H: int, K: int, beta_scale: float) -> tuple:
        return delta_inputs(qkv, ba, a_log, dt_bias, num_key_heads=H, key_width=K, beta_scale=beta_scale)

    return Case(DELTA_INPUTS, public, [qkv, ba, torch.rand(HV), torch.randn(HV)], (H, width, 1.0))


ONE = {
    "rms_norm": [lambda: norm(1, 256)],
    "gated_rms_norm": [lambda: gated(8, 32)],
    "short_conv": [lambda: conv(1, 512), lambda: conv(1, 1024)],
    "delta_inputs": [lambda: heads(1, 4, 8, 32)],
}
MANY = {
    "rms_norm": [lambda: norm(4096, 256), lambda: norm(16384, 512)],
    "gated_rms_norm": [lambda: gated(8 * 4096, 32), lambda: gated(8 * 4096, 64)],
    "short_conv": [lambda: conv(4096, 512), lambda: conv(4096, 1024)],
    "delta_inputs": [lambda: heads(4096, 4, 8, 32), lambda: heads(4096, 4, 8, 64)],
}


def results(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def one(case: Case, backend: str) -> Callable:
    def run() -> None:
        with torch.no_grad(), use_backend(backend):
            for _ in range(CALLS):
                case.public(*case.inputs, *case.rest)

    return run


def forward(case: Case, backend: str) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return results(case.backends[backend](*case.inputs, *case.rest))


def train(case: Case, backend: str, cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    y = results(case.backends[backend](*case.inputs, *case.rest))
    return (*y, *torch.autograd.grad(y, case.inputs, cotangents))


def check(case: Case, cotangents: list[Tensor], dtype: str) -> None:
    for a, b in zip(*(train(case, backend, cotangents) for backend in ("torch", "cpp")), strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"results differ by {error}, more than {TOLERANCE[dtype]}: nothing is timed")


def show(title: str, functions: dict[str, Callable], rounds: int, gate: QuietGate, calls: int = 1) -> None:
    for name, row in time_in_turn(functions, rounds, gate=gate).items():
        print(
            f"{title:44s} {name:6s} {row.median / calls * 1e6:10.1f} us  {row.ratio:6.2f}x  quiet {row.quiet:.0%}",
            flush=True,
        )


def measure(op: str, case: Case, dtype: str, rounds: int, gate: QuietGate) -> None:
    case = case._replace(inputs=[x.to(DTYPES[dtype]).requires_grad_() for x in case.inputs])
    title, both = f"{op} {dtype} {list(case.inputs[0].shape)}", ("torch", "cpp")
    cotangents = [torch.randn(y.shape).to(y.dtype) for y in forward(case, "cpp")]
    check(case, cotangents, dtype)
    if case.inputs[0].numel() <= 1024:
        return show(f"{title} one", {b: one(case, b) for b in both}, rounds, gate, CALLS)
    show(f"{title} forward", {b: lambda b=b: forward(case, b) for b in both}, rounds, gate)
    show(f"{title} train", {b: lambda b=b: train(case, b, cotangents) for b in both}, rounds, gate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=ONE, default=list(ONE))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gate = QuietGate()
    print(machine())
    for dtype in args.dtypes:
        for op in args.ops:
            for make in (*ONE[op], *MANY[op]):
                measure(op, make(), dtype, args.rounds, gate)


if __name__ == "__main__":
    main()
