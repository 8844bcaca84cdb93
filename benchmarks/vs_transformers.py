"""Our Qwen3-Next beside Transformers' own (its torch path): the same weights, in turn, in one process, on a CPU.

    python -m seqzoo.benchmarks.vs_transformers --sizes small medium --dtypes fp32 bf16 --lengths 256 1024 4096 16384

Three things a user does: prefill (a prompt into a cache, logits of its last token), decode (tokens one by one from the
cache after a prompt of that length), train (forward, loss, backward). Each cell first runs both sides once: that warms
up, is where their results are compared (logits; loss and gradients; in fp32 the very tokens) and their peak memory is
read. What differs is not timed. A run that takes longer than a cell may is itself the one that counts.
"""

import argparse
import ctypes
import gc
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import perf_counter

import torch

if not torch.cuda.is_available():  # where they can be imported, Transformers would call GPU kernels on a CPU too
    sys.modules |= dict.fromkeys(("fla", "causal_conv1d"))

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
    "100m": dict(  # 136 M parameters, a token touches 70 M; for a GPU (gpu_models)
        vocab_size=32768, hidden_size=512, intermediate_size=512, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=128, linear_value_head_dim=128, num_experts=32, num_experts_per_tok=4,
        moe_intermediate_size=128, shared_expert_intermediate_size=128,
    ),
    "1b": dict(  # 1358 M parameters, a token touches 565 M
        vocab_size=32768, hidden_size=1536, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, linear_num_key_heads=8, linear_num_value_heads=16,
        linear_key_head_dim=128, linear_value_head_dim=128, num_experts=16, num_experts_per_tok=2,
        moe_intermediate_size=512, shared_expert_intermediate_size=512,
    ),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the length of the difference over the length of the result. Long prompts hold tokens whose last chosen and first
# passed-over expert are nearer than fp32 resolves (6e-8 of their probability in one found here, where ours went with
# fp64); such a token, and all after it, then differ. In bf16 that happens everywhere, so there both sides are held
# against fp32 once (`judge`), and a cell compares only losses.
STRICT, LOOSE, LONG = 1e-3, 0.3, 1024
BAR = {("decode", None): 2.0, ("train", 1024): 1.5, ("train", 4096): 2.0, ("train", 16384): 4.0,
       ("prefill", 4096): 1.5, ("prefill", 16384): 2.0}  # fmt: skip
DECODED = 16  # tokens a timed run decodes
NOISE = 4 << 20  # bytes by which the same run's resident peak moves
ORDER = ("transformers", "seqzoo")
MODES = ("prefill", "decode", "train")


def folders(root: Path, size: str) -> dict[str, Path]:
    """The same random weights as both kinds of folder."""
    torch.manual_seed(0)
    theirs = Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES[size], max_position_embeddings=65536))
    paths = {"transformers": root / f"{size}-theirs", "seqzoo": root / f"{size}-ours"}
    theirs.save_pretrained(paths["transformers"])
    convert(paths["transformers"], paths["seqzoo"])
    return paths


def load(path: Path, dtype: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).eval()
    prefill(model, prompt(2048))  # weights are read from the file when they are first used: that is no run's memory
    return model


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
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def judge(models: dict[str, nn.Module], path: Path) -> str:
    """How far both are from Transformers in fp32, median over tokens. Raises SystemExit where ours is the farther."""
    ids, apart = prompt(512), {}
    with torch.no_grad():
        truth = load(path, "fp32")(ids).logits
        for name, model in models.items():
            off = (model(ids).logits.float() - truth).norm(dim=-1) / truth.norm(dim=-1)
            apart[name] = off.median().item()
    if not apart["seqzoo"] < 1.25 * apart["transformers"]:
        raise SystemExit(f"bf16: results differ from fp32 by {apart}")
    return ", ".join(f"{name} {value:.1e}" for name, value in apart.items())


class Cell:
    """One line of the table: what is run at which length, on both sides."""

    def __init__(self, models: dict[str, nn.Module], dtype: str, mode: str, T: int) -> None:
        self.models, self.dtype, self.mode, self.T, ids = models, dtype, mode, T, prompt(T)
        if mode == "decode":
            self.runs: dict[str, Callable] = {name: Decoder(models[name], ids) for name in ORDER}
        else:
            act = {"prefill": prefill, "train": train}[mode]
            self.runs = {name: lambda name=name: act(models[name], ids) for name in ORDER}

    def measure(self, gate: QuietGate, seconds: float) -> dict:
        """In as many rounds as fit into about `seconds`, 1 to 9. Raises SystemExit where results differ."""
        results, peaks, first = {}, {}, {}
        for name, run in self.runs.items():
            gate.wait()
            results[name], first[name], peaks[name] = observed(run)
        apart = self.compare(results)
        del results
        took = sum(first.values())
        if took > seconds:
            ratio = first["transformers"] / first["seqzoo"]
            timing = {n: Timing(t, t, t, ratio if n == "seqzoo" else 1.0, math.nan) for n, t in first.items()}
        else:
            timing = time_in_turn(self.runs, rounds=int(min(9, max(1, seconds // took))), warm_up=0, gate=gate)
        for model in self.models.values():
            model.zero_grad(set_to_none=True)
        rounds = 1 if took > seconds else int(min(9, max(1, seconds // took)))
        return dict(rounds=rounds, apart=apart, peak=peaks, **{name: t._asdict() for name, t in timing.items()})

    def compare(self, results: dict) -> float | None:
        ours, theirs = (results[name] for name in ("seqzoo", "transformers"))
        if self.dtype == "bf16":
            if self.mode == "train" and not difference(ours, theirs) < 0.02:
                raise SystemExit(f"train at T={self.T}: losses {ours} and {theirs}")
            return None
        if self.mode == "decode":  # where results are not strictly equal one token may change, and all that follow
            strict = self.dtype == "fp32" and self.T <= LONG
            apart = sum(a != b for a, b in zip(ours, theirs, strict=True)) / DECODED if strict else 0.0
        elif self.mode == "prefill":
            apart = difference(ours.logits, theirs.logits)
        else:
            one, other = self.models["seqzoo"], self.models["transformers"]
            embeddings = one.embed_tokens.weight.grad, other.model.embed_tokens.weight.grad
            apart = max(difference(ours, theirs), difference(*embeddings))
        limit = STRICT if self.dtype == "fp32" and self.T <= LONG else LOOSE
        if not apart < limit:
            raise SystemExit(f"{self.mode} at T={self.T}: results differ by {apart}, more than {limit}")
        return apart


def breakdown(model: nn.Module) -> dict[str, dict[str, float]]:
    """Where the time of each thing goes; of a training step, the forward half by part."""
    decoder = Decoder(model, prompt(256))
    model.train()
    trained = shares(model, lambda: model(prompt(1024), labels=prompt(1024), use_cache=False))
    model.eval()
    return {
        "prefill at T=4096": shares(model, lambda: prefill(model, prompt(4096))),
        "decode": shares(model, decoder),
        "training forward at T=1024": trained,
    }


def shares(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """The share of each kind of module, without that of the kinds listed inside it."""
    inside, spent, start = [], defaultdict(float), {}
    kinds = ("GatedDeltaNet", "Attention", "MoE", "GatedMLP", "RMSNorm", "GatedRMSNorm", "CausalConv", "Embedding")

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
        if type(module).__name__ in kinds or isinstance(module, nn.Linear):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    run()
    spent.clear()
    begin = perf_counter()
    run()
    whole = perf_counter() - begin
    for hook in hooks:
        hook.remove()
    named = {name: value / whole for name, value in sorted(spent.items(), key=lambda x: -x[1])}
    return {**named, "the rest": 1 - sum(named.values())}


def observed(run: Callable[[], object]) -> tuple[object, float, int]:
    """What it gives, how long it takes, and how far the process's resident memory rises meanwhile [bytes]. Linux."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status("VmRSS"), perf_counter()
    result = run()
    return result, perf_counter() - start, _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def row_text(row: dict) -> str:
    ours, theirs, T = row["seqzoo"], row["transformers"], row["T"]
    tokens = DECODED if row["mode"] == "decode" else T
    bar = BAR.get((row["mode"], T), BAR.get((row["mode"], None), 1.0))
    light = row["peak"]["seqzoo"] <= row["peak"]["transformers"] + NOISE
    met = "yes" if ours["ratio"] >= bar and light else "NO"
    spread = f"{ours['low'] * 1e3:.1f}-{ours['high'] * 1e3:.1f} ({row['rounds']})"
    return (
        f"| {row['size']} | {row['dtype']} | {row['mode']} | {T} | {tokens / theirs['median']:.0f} "
        f"| {tokens / ours['median']:.0f} | {spread} | **{ours['ratio']:.2f}x** | {bar:.1f}x | {met} "
        f"| {row['peak']['transformers'] / 2**20:.0f} | {row['peak']['seqzoo'] / 2**20:.0f} |"
    )


COLUMNS = ["size", "dtype", "what", "T", "theirs t/s", "ours t/s", "ours ms (rounds)", "ratio", "bar", "met"]
COLUMNS += ["theirs MB", "ours MB"]
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "medium"], choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long a cell may take")
    parser.add_argument("--skip", nargs="*", default=[], help="cells to leave out, as medium/train/16384")
    parser.add_argument("--out", type=Path, help="where to write FILE.md and FILE.json")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    about = f"{machine()}, transformers {transformers.__version__}, {date.today()}"
    rows, notes = [], []
    print(about, HEAD, sep="\n")
    gate = QuietGate()
    with tempfile.TemporaryDirectory() as root:
        for size in args.sizes:
            paths = folders(Path(root), size)
            for dtype in args.dtypes:
                models = {name: load(path, dtype) for name, path in paths.items()}
                if dtype == "bf16":
                    notes.append(f"- {size} bf16, logits' distance from fp32: {judge(models, paths['transformers'])}.")
                    print(notes[-1], flush=True)
                for mode in args.modes:
                    for T in args.lengths:
                        if f"{size}/{mode}/{T}" in args.skip:
                            continue
                        figures = Cell(models, dtype, mode, T).measure(gate, args.seconds)
                        rows.append(dict(size=size, dtype=dtype, mode=mode, T=T, **figures))
                        print(row_text(rows[-1]), flush=True)
                        if args.out:
                            write(args.out, about, rows, notes)
                for what, where in breakdown(models["seqzoo"]).items():
                    text = ", ".join(f"{name} {share:.0%}" for name, share in where.items() if share >= 0.005)
                    notes.append(f"- {size} {dtype}, our {what}: {text}.")
                    print(notes[-1], flush=True)
    if args.out:
        write(args.out, about, rows, notes)
    print(*summary(rows), sep="\n")


def summary(rows: list[dict]) -> list[str]:
    quiet = [row[name]["quiet"] for row in rows for name in ORDER if row["rounds"] > 1] or [math.nan]
    mean = math.exp(sum(math.log(row["seqzoo"]["ratio"]) for row in rows) / len(rows))
    apart = max((row["apart"] for row in rows if row["apart"] is not None), default=math.nan)
    return [
        f"- {sum(quiet) / len(quiet):.0%} of the runs in cells of several rounds began on a quiet machine.",
        f"- Geometric mean of the ratios {mean:.2f}x; results apart by at most {apart:.1e}.",
    ]


def write(out: Path, about: str, rows: list[dict], notes: list[str]) -> None:
    """The table and the figures so far: a run that is cut short leaves what it has."""
    command = " ".join(["python -m seqzoo.benchmarks.vs_transformers", *sys.argv[1:]])
    text = [about, "", HEAD, *map(row_text, rows), "", *notes, *summary(rows), "", f"`{command}`", ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(text))
    out.with_suffix(".json").write_text(json.dumps(dict(about=about, command=command, rows=rows), indent=1))


if __name__ == "__main__":
    main()
