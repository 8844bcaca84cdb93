"""Our Qwen3-Next beside Transformers' own (its torch path): the same weights, in turn, in one process, on a CPU.

    python -m seqzoo.benchmarks.vs_transformers --sizes small medium --dtypes fp32 bf16 --lengths 256 1024 4096 16384

Three things a user does: prefill (a prompt into a cache, logits of its last token), decode (tokens one by one from the
cache after a prompt of that length), train (forward, loss, backward). Equal results are checked before anything is
timed. Peak memory is measured in a process of its own for each side. --out writes the table and the raw figures.
"""

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import perf_counter

sys.modules["fla"] = None  # where it can be imported, Transformers would call its GPU kernels on a CPU too

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

import seqzoo  # noqa: F401  (registers our classes)
from seqzoo.benchmarks.timing import QuietGate, Timing, machine, time_in_turn
from seqzoo.models.convert import convert

SIZES = {
    "small": dict(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=32,
        linear_value_head_dim=32, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "medium": dict(
        vocab_size=4096, hidden_size=512, intermediate_size=512, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64,
        linear_value_head_dim=64, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    ),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2}  # largest difference over the largest value
BAR = {("decode", None): 2.0, ("train", 1024): 1.5, ("train", 4096): 2.0, ("train", 16384): 4.0,
       ("prefill", 4096): 1.5, ("prefill", 16384): 2.0}  # fmt: skip
DECODED = 16  # tokens a timed run decodes


def folders(root: Path, size: str) -> dict[str, Path]:
    """The same random weights as both kinds of folder."""
    torch.manual_seed(0)
    theirs = Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES[size], max_position_embeddings=65536))
    paths = {"transformers": root / f"{size}-theirs", "seqzoo": root / f"{size}-ours"}
    theirs.save_pretrained(paths["transformers"])
    convert(paths["transformers"], paths["seqzoo"])
    return paths


def load(path: Path, dtype: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).eval()


def prompt(T: int) -> Tensor:
    return torch.randint(0, 4096, (1, T), generator=torch.Generator().manual_seed(T))


def prefill(model: nn.Module, ids: Tensor) -> object:
    with torch.no_grad():
        return model(ids, use_cache=True, logits_to_keep=1)


def train(model: nn.Module, ids: Tensor) -> Tensor:
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.eval()
    return loss.detach()


class Decoder:
    """Greedy tokens one by one after a prompt; each call goes on where the last one stopped."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, out = model, prefill(model, ids)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def __call__(self) -> list[int]:
        said = []
        with torch.no_grad():
            for _ in range(DECODED):
                said.append(self.next.item())
                out = self.model(self.next, past_key_values=self.cache, use_cache=True)
                self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return said


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def check(models: dict[str, nn.Module], ids: Tensor, dtype: str) -> dict[str, float]:
    """Raises if the two do not give the same; returns how far apart they are."""
    ours, theirs = models["seqzoo"], models["transformers"]
    apart = {"logits": difference(prefill(ours, ids).logits, prefill(theirs, ids).logits)}
    losses = [train(model, ids) for model in (ours, theirs)]
    apart["loss"] = difference(*losses)
    apart["gradient"] = difference(ours.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad)
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
    worst = max(apart.values())
    if not worst < TOLERANCE[dtype]:
        raise SystemExit(f"results differ by {apart}, more than {TOLERANCE[dtype]}: nothing is timed")
    return apart


def cell(models: dict[str, nn.Module], mode: str, T: int, gate: QuietGate, seconds: float) -> dict[str, Timing]:
    """One cell of the table, in as many rounds as fit into about `seconds`, 1 to 9."""
    ids = prompt(T)
    order = ("transformers", "seqzoo")
    if mode == "decode":
        runs: dict[str, Callable] = {name: Decoder(models[name], ids) for name in order}
    else:
        act = {"prefill": prefill, "train": train}[mode]
        runs = {name: lambda name=name: act(models[name], ids) for name in order}
    start = perf_counter()
    for run in runs.values():  # the warm-up, and how long a round takes
        run()
    rounds = int(min(9, max(1, seconds // (perf_counter() - start))))
    timing = time_in_turn(runs, rounds=rounds, warm_up=0, gate=gate)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return timing


def shares(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Where a prefill's time goes: the share of each kind of module, without that of the kinds listed inside it."""
    inside, spent, start = [], defaultdict(float), {}
    kinds = ("GatedDeltaNet", "Attention", "MoE", "RMSNorm", "GatedRMSNorm", "CausalConv", "Linear", "Embedding")

    def enter(module, _):
        start[id(module)] = perf_counter()
        inside.append(0.0)

    def leave(module, *_):
        took = perf_counter() - start[id(module)]
        spent[type(module).__name__] += took - inside.pop()
        if inside:
            inside[-1] += took

    hooks = []
    for module in model.modules():
        if type(module).__name__ in kinds:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    prefill(model, ids)
    spent.clear()
    begin = perf_counter()
    prefill(model, ids)
    whole = perf_counter() - begin
    for hook in hooks:
        hook.remove()
    named = {name: value / whole for name, value in sorted(spent.items(), key=lambda x: -x[1])}
    return {**named, "the rest": 1 - sum(named.values())}


def peak_bytes(run: Callable[[], object]) -> int:
    """How far the process's resident memory rises above where it stood. Linux."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def memory(path: Path, dtype: str, cells: list[tuple[str, int]]) -> None:
    """The child process: one side's peaks, printed as JSON."""
    model, peaks = load(path, dtype), {}
    prefill(model, prompt(64))
    for mode, T in cells:
        act = {"prefill": prefill, "train": train}[mode]
        peaks[f"{mode} {T}"] = peak_bytes(lambda act=act, T=T: act(model, prompt(T)))
        model.zero_grad(set_to_none=True)
    print(json.dumps(peaks))


def measure_memory(path: Path, dtype: str, cells: list[tuple[str, int]]) -> dict[str, int]:
    command = [
        sys.executable,
        "-m",
        "seqzoo.benchmarks.vs_transformers",
        "--child",
        str(path),
        dtype,
        json.dumps(cells),
    ]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def row_text(row: dict) -> str:
    ours, theirs, T = row["seqzoo"], row["transformers"], row["T"]
    tokens = DECODED if row["mode"] == "decode" else T
    bar = BAR.get((row["mode"], T), BAR.get((row["mode"], None), 1.0))
    peak = " | ".join(f"{row['peak'][n] / 2**20:.0f}" if row.get("peak") else "-" for n in ("transformers", "seqzoo"))
    spread = f"{ours['low'] * 1e3:.1f}-{ours['high'] * 1e3:.1f}"
    return (
        f"| {row['size']} | {row['dtype']} | {row['mode']} | {T} | {tokens / theirs['median']:.0f} "
        f"| {tokens / ours['median']:.0f} | {spread} | **{ours['ratio']:.2f}x** | {bar:.1f}x "
        f"| {'yes' if ours['ratio'] >= bar else 'NO'} | {peak} |"
    )


HEAD = """
| size | dtype | what | T | theirs, tokens/s | ours, tokens/s | ours, ms | ratio | bar | met | theirs, MB | ours, MB |
|---|---|---|---|---|---|---|---|---|---|---|---|""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    parser.add_argument("--modes", nargs="+", default=["prefill", "decode", "train"])
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long a cell may take")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="where to write FILE.md and FILE.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if args.child:
        path, dtype, cells = args.child
        memory(Path(path), dtype, json.loads(cells))
        return
    about = f"{machine()}, transformers {transformers.__version__}, {date.today()}"
    lines, rows, notes = [about, "", HEAD], [], []
    print(about, HEAD, sep="\n")
    gate = QuietGate()
    with tempfile.TemporaryDirectory() as root:
        for size in args.sizes:
            paths = folders(Path(root), size)
            for dtype in args.dtypes:
                models = {name: load(path, dtype) for name, path in paths.items()}
                apart = check(models, prompt(333), dtype)
                cells = [(mode, T) for mode in args.modes for T in args.lengths]
                kept = [c for c in cells if c[0] != "decode"]
                peaks = {n: {} if args.no_memory else measure_memory(p, dtype, kept) for n, p in paths.items()}
                for mode, T in cells:
                    timing = cell(models, mode, T, gate, args.seconds)
                    row = dict(size=size, dtype=dtype, mode=mode, T=T, **{n: t._asdict() for n, t in timing.items()})
                    if peaks["seqzoo"] and mode != "decode":
                        row["peak"] = {name: peak[f"{mode} {T}"] for name, peak in peaks.items()}
                    rows.append(row)
                    lines.append(row_text(row))
                    print(lines[-1], flush=True)
                where = shares(models["seqzoo"], prompt(4096))
                difference_text = ", ".join(f"{k} {v:.1e}" for k, v in apart.items())
                share_text = ", ".join(f"{name} {value:.0%}" for name, value in where.items())
                notes.append(
                    f"- {size} {dtype}: results apart by {difference_text}. Our prefill at T=4096: {share_text}."
                )
                print(notes[-1], flush=True)
    quiet = [row[name]["quiet"] for row in rows for name in ("seqzoo", "transformers")]
    mean = math.exp(sum(math.log(row["seqzoo"]["ratio"]) for row in rows) / len(rows))
    notes.append(f"- {sum(quiet) / len(quiet):.0%} of the runs began on a quiet machine; geometric mean {mean:.2f}x.")
    print(notes[-1])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text("\n".join([*lines, "", *notes, "", f"`{' '.join(sys.argv)}`", ""]))
        args.out.with_suffix(".json").write_text(json.dumps(dict(about=about, rows=rows), indent=1))


if __name__ == "__main__":
    main()
