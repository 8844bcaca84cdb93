"""Cross-entropy of a linear head, forward and backward: all logits at once against a few tokens at a time, in turn.

    python -m seqzoo.benchmarks.bench_cross_entropy --vocab 151936 --width 1024 --tokens 2048 --threads 2

Each way is checked against the first before it is timed. CPU seconds of all threads are taken, not those on the wall:
other work on the machine adds little to them. `most` is the largest memory that a process had while it ran once, above
what it had before; each way has a process of its own for that.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.benchmarks.timing import machine, time_in_turn
from seqzoo.kernels.linear_cross_entropy.chunked import linear_cross_entropy_chunked


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def draw(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    dtype, (N, V, D) = getattr(torch, options.dtype), (options.tokens, options.vocab, options.width)
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.empty(V, D, dtype=dtype).normal_(std=D**-0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,))


def both(loss: Callable, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The mean, and its gradients."""
    mean = loss(*inputs) / len(inputs[0])
    return mean.detach(), *torch.autograd.grad(mean, inputs[:2])


def ways(chunks: list[int | None]) -> dict[str, Callable]:
    chunked = {f"chunks of {n or 'its own choice'}": partial(linear_cross_entropy_chunked, rows=n) for n in chunks}
    return {"all logits": whole, **chunked}


def memory(name: str, options: argparse.Namespace, answer: multiprocessing.Queue) -> None:
    """Runs in a process of its own: bytes above those of the inputs."""
    torch.set_num_threads(options.threads)
    inputs = draw(options)
    most = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = most()
    both(ways(options.chunks)[name], inputs)
    answer.put(most() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--chunks", type=lambda x: int(x) or None, nargs="+", default=[None], help="tokens; 0: its own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    print(f"vocabulary {options.vocab}, width {options.width}, {options.tokens} tokens, {options.dtype}")
    used = {}
    spawn = multiprocessing.get_context("spawn")
    for name in ways(options.chunks):
        answer = spawn.Queue()
        process = spawn.Process(target=memory, args=(name, options, answer))
        process.start()
        used[name] = answer.get()
        process.join()
    inputs = draw(options)
    runs = {name: partial(both, loss, inputs) for name, loss in ways(options.chunks).items()}
    check(runs, 1e-5 if options.dtype == "float32" else 2e-2)
    for name, timing in time_in_turn(runs, rounds=options.rounds, warm_up=0, clock=time.process_time).items():
        print(f"  {name:26s} {timing}  most {used[name] / 2**30:5.2f} GiB")


def check(runs: dict[str, Callable], tolerance: float) -> None:
    """Every way's loss and gradients, against the first's."""
    (_, first), *others = runs.items()
    wanted = first()
    for name, run in others:
        for what, a, b in zip(("loss", "hidden", "weight"), run(), wanted, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            if error > tolerance:
                raise SystemExit(f"{name}: {what} differs by {error:.1e} of its size, more than {tolerance:.0e}")


if __name__ == "__main__":
    main()
