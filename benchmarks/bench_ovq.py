"""OVQ attention beside full causal attention, in turn, in one process: time, and bytes kept to decode on.

    python -m seqzoo.benchmarks.bench_ovq --cases prefill train decode --lengths 1024 4096 16384 --threads 1

prefill: T tokens from nothing. train: the same, forward and backward. decode: the mean of a chunk's tokens, one after
another, after T; the last of them is the one at which OVQ merges the chunk. Both with the backend that runs by itself
here. OVQ keeps `slots` means a head however many tokens came, so from some length on it must win;
from which one is what this asks. CPU seconds of the process are taken, not those on the wall: other work on the
machine adds little to them, but they hide what more threads win.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from seqzoo.benchmarks.timing import machine
from seqzoo.kernels.causal_attention import causal_attention
from seqzoo.kernels.ovq_attention import OVQRule, OVQState, ovq_attention

LONGEST_TRAINED = 4096  # tokens


def functions(case: str, T: int, heads: int, width: int, rule: OVQRule) -> tuple[dict[str, Callable], dict[str, int]]:
    """What is compared, full attention first, and the bytes that each keeps after T tokens."""
    q, k, v = (torch.randn(1, T, heads, width) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scale = torch.full((heads,), width**0.5)
    state = OVQState.empty(1, heads, width, width, rule, device=q.device, dtype=q.dtype)
    kept = {"full": 2 * 4 * T * heads * width, "ovq": sum(x.numel() * x.element_size() for x in state)}
    full = lambda *x: causal_attention(*(y.transpose(1, 2) for y in x))
    ovq = lambda *x: ovq_attention(*x, scale, rule)[0]
    if case == "train":
        leaves = [x.requires_grad_() for x in (q, k, v)]
        cotangent = torch.randn(1, T, heads, width)
        backward = lambda f, d_o: torch.autograd.grad(f(*leaves), leaves, d_o)
        return {
            "full": lambda: backward(full, cotangent.transpose(1, 2)),
            "ovq": lambda: backward(ovq, cotangent),
        }, kept
    if case == "prefill":
        return {"full": lambda: full(q, k, v), "ovq": lambda: ovq(q, k, v)}, kept
    with torch.no_grad():
        _, state = ovq_attention(q, k, v, scale, rule, state=state)
    token = [x[:, -1:] for x in (q, k, v)]
    past = [x.transpose(1, 2).contiguous() for x in (k, v)]
    one = token[0].transpose(1, 2)

    def step_through_a_chunk() -> None:
        after = state
        for _ in range(rule.chunk):
            _, after = ovq_attention(*token, scale, rule, state=after)

    return {
        "full": lambda: [causal_attention(one, *past) for _ in range(rule.chunk)],
        "ovq": step_through_a_chunk,
    }, kept


def seconds(runs: dict[str, Callable], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of a step of each function, which does so many; one round after the other."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            start = time.process_time()
            run()
            found[name] += [(time.process_time() - start) / steps] if n else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["prefill", "train", "decode"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384], help="tokens")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of a head, keys and values")
    parser.add_argument("--chunk", type=int, default=64, help="tokens")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rule = OVQRule(chunk=args.chunk, slots=args.slots)
    print(machine(), f"fp32, {args.heads} heads of {args.width}, chunk {args.chunk}, slots {args.slots}", sep="\n")
    for case in args.cases:
        for T in (T for T in args.lengths if case != "train" or T <= LONGEST_TRAINED):
            runs, kept = functions(case, T, args.heads, args.width, rule)
            with torch.set_grad_enabled(case == "train"):
                found = seconds(runs, args.rounds, args.chunk if case == "decode" else 1)
            baseline = statistics.median(found["full"])
            for name, each in found.items():
                median, spread = statistics.median(each), f"[{min(each) * 1e3:.2f}-{max(each) * 1e3:.2f}]"
                times = f"{median * 1e3:9.2f} CPU ms {spread:20s} {baseline / median:6.2f}x"
                print(f"{case:8s} T={T:<6d} {name:5s} {times}  keeps {kept[name]:>12,} bytes", flush=True)


if __name__ == "__main__":
    main()
