"""causal_attention's C++ backend beside torch's `scaled_dot_product_attention`, in turn, in one process, on a CPU.

    python -m seqzoo.benchmarks.bench_attention --cases prefill train --dtypes fp32 bf16 --lengths 1024 4096

prefill: T queries over T keys. train: the same, forward and backward. window: 128 tokens, against torch with all keys
and our torch backend. decode: one query over T kept keys. Equal results are checked before anything is timed.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.benchmarks.timing import QuietGate, machine, time_in_turn
from seqzoo.kernels.causal_attention.op import BACKENDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # norm of the difference over the norm
HEADS = {
    "4/2x64": (4, 2, 64),
    "8/2x64": (8, 2, 64),
    "8/2x128": (8, 2, 128),
    "8/2x256": (8, 2, 256),
}  # query / key heads x width
WINDOW = 128  # tokens


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def backward(function: Callable, inputs: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    o = function(*inputs)
    return (o, *torch.autograd.grad(o, inputs, cotangent))


def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], dtype: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"results differ by {error}, more than {TOLERANCE[dtype]}: nothing is timed")


def functions(case: str, heads: str, T: int, dtype: str) -> tuple[dict[str, Callable], float]:
    """What is compared, the first is the baseline; and the multiply-adds of one run of ours, times 2."""
    H, G, K = HEADS[heads]
    new, as_layer = 1 if case == "decode" else T, lambda n, L: torch.randn(1, L, n, K).to(DTYPES[dtype]).transpose(1, 2)
    q, k, v = as_layer(H, new), as_layer(G, T), as_layer(G, T)
    flops = 4.0 * H * K * (T if case == "decode" else T * (T + 1) / 2)
    cpp, blocked = BACKENDS["cpp"], BACKENDS["torch"]
    if case == "window":
        check((cpp(q, k, v, WINDOW),), (blocked(q, k, v, WINDOW),), dtype)
        runs = {
            "sdpa": lambda: sdpa(q, k, v),
            "torch": lambda: blocked(q, k, v, WINDOW),
            "cpp": lambda: cpp(q, k, v, WINDOW),
        }
        return runs, 4.0 * H * K * T * min(T, WINDOW)
    if case == "train":
        inputs, cotangent = (
            [x.requires_grad_() for x in (q, k, v)],
            torch.randn(1, T, H, K).to(DTYPES[dtype]).transpose(1, 2),
        )
        check(backward(cpp, inputs, cotangent), backward(sdpa, inputs, cotangent), dtype)
        return {
            name: lambda f=f: backward(f, inputs, cotangent) for name, f in (("sdpa", sdpa), ("cpp", cpp))
        }, flops * 3.5
    check((cpp(q, k, v),), (sdpa(q, k, v),), dtype)
    k, v = (x.contiguous() for x in (k, v)) if case == "decode" else (k, v)  # as a cache keeps them
    return {"sdpa": lambda: sdpa(q, k, v), "cpp": lambda: cpp(q, k, v)}, flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["prefill", "train", "window", "decode"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096], help="tokens")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    gate = QuietGate()
    for case in args.cases:
        for dtype in args.dtypes:
            for heads in args.heads:
                for T in args.lengths:
                    runs, flops = functions(case, heads, T, dtype)
                    for name, row in time_in_turn(runs, rounds=args.rounds, gate=gate).items():
                        rate = f"  {flops / row.median / 1e9:7.0f} GFLOP/s" if name == "cpp" else ""
                        print(f"{case:8s} {dtype} {heads:8s} T={T:<6d} {name:6s} {row}{rate}", flush=True)


if __name__ == "__main__":
    main()
