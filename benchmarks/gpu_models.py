"""Our hybrids beside Transformers' Qwen3-Next with flash-linear-attention: training steps and decoding, on a GPU.

    python -m seqzoo.benchmarks.gpu_models --out benchmarks/results/gpu_models

The same bf16 weights on both sides (ours are converted from theirs), in turn, in one process; losses and the first
logits are compared before anything is timed. A training step is forward, loss, backward and fused AdamW. Decoding is
greedy, one token for each row after a prompt. `--device cpu --sizes small --lengths 64` shows that all of it runs.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import seqzoo  # noqa: F401  (registers our classes)
from seqzoo.benchmarks.gpu_timing import about, peak, time_in_turn
from seqzoo.benchmarks.vs_transformers import SIZES, difference, folders

SIDES = ("transformers", "seqzoo")
APART = 0.05  # of losses in bf16, whose last experts differ here and there
DECODED = 32  # tokens of a timed run


def load(path: Path, device: torch.device) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()


def prompt(size: str, rows: int, T: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    return torch.randint(0, SIZES[size]["vocab_size"], (rows, T), generator=generator).to(device)


def trainer(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """A whole step each time it is called; the rate is 0, so that both sides stay at the same weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step() -> Tensor:
        model.train()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        return loss.detach()

    return step


class Decoder:
    """Greedy tokens after a prompt; each call goes on where the last one stopped. Nothing waits for the GPU."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model = model
        with torch.no_grad():
            out = model(ids, use_cache=True, logits_to_keep=1)
        self.first, self.cache = out.logits, out.past_key_values
        self.next = out.logits[:, -1:].argmax(-1)

    def __call__(self) -> None:
        with torch.no_grad():
            for _ in range(DECODED):
                out = self.model(self.next, past_key_values=self.cache, use_cache=True)
                self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)


def measured(models: dict[str, nn.Module], size: str, what: str, rows: int, T: int, device: torch.device) -> dict:
    """A row. Raises SystemExit where the sides differ."""
    ids = prompt(size, rows, T, device)
    if what == "train":
        runs: dict[str, Callable[[], Any]] = {name: trainer(model, ids) for name, model in models.items()}
        results = {name: run() for name, run in runs.items()}
        memory = {name: peak(run, device) for name, run in runs.items()}
    else:
        runs = {name: Decoder(model, ids) for name, model in models.items()}
        results, memory = {name: run.first for name, run in runs.items()}, {}
    off = difference(results["seqzoo"], results["transformers"])
    if not off < (APART if what == "train" else 10 * APART):
        raise SystemExit(f"{size} {what} at {rows}x{T}: results differ by {off}")
    tokens = rows * (T if what == "train" else DECODED)
    times = time_in_turn(runs, device, rounds=7, seconds=8.0)
    rates = {name: tokens / (t["median"] / 1e3) for name, t in times.items()}
    return dict(size=size, what=what, rows=rows, T=T, apart=off, ms=times, tokens_per_second=rates, peak=memory)


def text(row: dict) -> str:
    ours, theirs = (row["tokens_per_second"][name] for name in reversed(SIDES))
    memory = " / ".join(f"{row['peak'][name] / 2**20:.0f}" for name in SIDES) if row["peak"] else ""
    cells = [f"{row['size']} {row['what']}", f"{row['rows']}x{row['T']}", f"{theirs:.0f}", f"{ours:.0f}"]
    return f"| {' | '.join([*cells, f'{ours / theirs:.2f}x', memory])} |"


HEAD = (
    "| model | shape | theirs, tokens/s | ours, tokens/s | ratio | memory of a step, MiB (theirs / ours) |\n"
    + "|---" * 6
)
HEAD += "|"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["100m", "1b"], choices=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096], help="tokens a row")
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 64], help="of training and of decoding")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, help="where to write OUT.json and OUT.md")
    args = parser.parse_args(arguments)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_models: expected a GPU, and torch sees none; --device cpu shows that it runs")
    transformers.utils.logging.set_verbosity_error()
    head, rows = about(args.device), []
    print(", ".join(f"{name} {value}" for name, value in head.items()), HEAD, sep="\n")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as root:
            models = {name: load(path, args.device) for name, path in folders(Path(root), size).items()}
        for T in args.lengths:
            for what, count in zip(("train", "decode"), args.rows, strict=True):
                rows.append(measured(models, size, what, count, T if what == "train" else 256, args.device))
                print(text(rows[-1]), flush=True)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    versions = ", ".join(f"{name} {value}" for name, value in head.items())
                    args.out.with_suffix(".md").write_text("\n".join([versions, "", HEAD, *map(text, rows), ""]))
                    args.out.with_suffix(".json").write_text(json.dumps(dict(about=head, rows=rows), indent=1) + "\n")
        del models
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
