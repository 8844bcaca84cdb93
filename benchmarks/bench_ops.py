"""Times the backends of a delta rule on a CPU and, where it is installed, Transformers' own torch rule, in turn.

    python benchmarks/bench_ops.py --tokens 1024 4096 --width 64 128 --heads 8
    python benchmarks/bench_ops.py --rule kimi_delta_rule

Each is checked against the others before it is timed. Ratios are to the first line of a table.
"""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import QuietGate, machine, time_in_turn
from torch import Tensor

from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.kernels.kimi_delta_rule import kimi_delta_rule


class Rule(NamedTuple):
    op: Callable
    backends: tuple[str, ...]
    peer: tuple[str, str]  # Transformers' module and function
    by_channel: bool  # whether every key channel has a decay


RULES = {
    "gated_delta_rule": Rule(
        gated_delta_rule, ("torch", "cpp"), ("qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule"), False
    ),
    "kimi_delta_rule": Rule(
        kimi_delta_rule, ("torch",), ("kimi_linear.modeling_kimi_linear", "chunk_kimi_delta_attention"), True
    ),
}


def theirs(rule: Rule) -> Callable | None:
    """Transformers' chunked rule, with the signature of ours; None where it is not installed."""
    sys.modules["fla"] = None  # found on a machine without GPU, it would break Transformers' module
    module, name = rule.peer
    try:
        chunked = getattr(import_module(f"transformers.models.{module}"), name)
    except ImportError:
        return None
    scale = lambda q: q * q.shape[-1] ** 0.5  # theirs divides by it
    return lambda q, k, v, g, beta: chunked(scale(q), k, v, g=g, beta=beta)[0]


def ours(rule: Rule, backend: str) -> Callable:
    def run(*inputs: Tensor) -> Tensor:
        with use_backend(backend):
            return rule.op(*inputs)[0]

    return run


def draw(rule: Rule, tokens: int, heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, g, beta of one sequence."""
    q, k = (F.normalize(torch.randn(1, tokens, heads, width), dim=-1) for _ in range(2))
    v, beta = torch.randn_like(q), torch.rand(1, tokens, heads)
    g = F.logsigmoid(torch.randn(q.shape if rule.by_channel else beta.shape))
    return [x.to(dtype).requires_grad_() for x in (q * width**-0.5, k, v)] + [x.requires_grad_() for x in (g, beta)]


def forward(rule: Callable, inputs: list[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return rule(*inputs)

    return run


def both(rule: Callable, inputs: list[Tensor], weights: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(rule(*inputs), inputs, weights)


def check(rules: dict[str, Callable], inputs: list[Tensor], weights: Tensor, tolerance: float) -> None:
    """Every rule's outputs and gradients, against the first's."""
    names = ["o", "q", "k", "v", "g", "beta"]
    results = {name: (forward(rule, inputs)(), *both(rule, inputs, weights)()) for name, rule in rules.items()}
    baseline = next(iter(results.values()))
    for name, result in results.items():
        for what, a, b in zip(names, result, baseline, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            if error > tolerance:
                raise SystemExit(f"{name}: {what} differs by {error:.1e} of its size, more than {tolerance:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", choices=RULES, default="gated_delta_rule")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128], help="of a key and of a value")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    dtype, rule = getattr(torch, options.dtype), RULES[options.rule]
    rules = {"transformers": theirs(rule), **{name: ours(rule, name) for name in rule.backends}}
    rules = {name: rule for name, rule in rules.items() if rule is not None}
    gate = QuietGate()
    print(machine())
    for width in options.width:
        for tokens in options.tokens:
            torch.manual_seed(0)
            inputs = draw(rule, tokens, options.heads, width, dtype)
            weights = torch.randn(inputs[2].shape).to(dtype)
            check(rules, inputs, weights, tolerance=1e-4 if dtype == torch.float32 else 3e-2)
            what = f"{options.rule} B=1 T={tokens} H={options.heads} K=V={width} {options.dtype}"
            print(f"\n{what}, {options.rounds} rounds")
            for title, make in (("forward", forward), ("forward+backward", lambda r, x, w=weights: both(r, x, w))):
                runs = {name: make(rule, inputs) for name, rule in rules.items()}
                for name, timing in time_in_turn(runs, rounds=options.rounds, gate=gate).items():
                    print(f"  {title:17s} {name:13s} {timing}")


if __name__ == "__main__":
    main()
