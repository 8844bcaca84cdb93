"""BDH beside its released form, in turn, on a CPU: training steps and decoding.

    python -m seqzoo.benchmarks.bench_bdh --tokens 256 1024 4096 --out benchmarks/results/cpu_bdh
    python -m seqzoo.benchmarks.bench_bdh --peer bdh.py        # a released file beside both

`plain` is the published formulas in torch: all pairs of tokens at once, phases in fp32 and anew in every level, the
whole prefix again for every token decoded. A step is forward, loss and backward, without dropout. That gradients are
equal is checked first, losses again at each length. Rates are of CPU seconds too, which others on the machine disturb
less. The memory of a step is what one alone adds to the peak of a fresh process.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.benchmarks.timing import machine
from seqzoo.models.convert.bdh import from_bdh_state_dict

SIZES = dict(n_layer=4, n_embd=128, n_head=4, mlp_internal_dim_multiplier=32, vocab_size=256)


class Plain(nn.Module):
    """The published formulas, with the released names."""

    def __init__(
        self, n_layer: int, n_embd: int, n_head: int, mlp_internal_dim_multiplier: int, vocab_size: int
    ) -> None:
        super().__init__()
        N = n_embd * mlp_internal_dim_multiplier // n_head
        draw = lambda *shape: nn.Parameter(0.02 * torch.randn(shape))
        self.levels, self.embed = n_layer, nn.Embedding(vocab_size, n_embd)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.encoder, self.encoder_v = draw(n_head, n_embd, N), draw(n_head, n_embd, N)
        self.decoder, self.lm_head = draw(n_head * N, n_embd), draw(n_embd, vocab_size)
        self.attn = nn.Module()
        self.attn.register_buffer("freqs", _turns_per_token(N).float())

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        norm = lambda x: F.layer_norm(x, x.shape[-1:])
        v = norm(self.embed(ids))[:, None]
        for _ in range(self.levels):
            x = (v @ self.encoder).relu()
            phase = torch.arange(ids.shape[1], dtype=torch.float32).view(1, 1, -1, 1) * self.attn.freqs
            phase = phase % 1 * (2 * torch.pi)
            r = x * phase.cos() + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * phase.sin()
            a = norm((r @ r.mT).tril(-1) @ v)
            z = x * (a @ self.encoder_v).relu()
            v = norm(v + norm(z.transpose(1, 2).flatten(2)[:, None] @ self.decoder))
        logits = v[:, 0] @ self.lm_head
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _turns_per_token(N: int) -> Tensor:
    """[1, 1, 1, N] fp64: the frequencies, of which the released are the fp32."""
    return (65536.0 ** -(torch.arange(N, dtype=torch.float64) // 2 * 2 / N) / (2 * torch.pi)).view(1, 1, 1, N)


class Row(NamedTuple):
    who: str
    tokens: int
    tokens_per_s: float
    tokens_per_cpu_s: float
    forward_per_cpu_s: float
    mib: float  # added to the peak by one step, in a process of its own


def released(path: str) -> nn.Module:
    """A released file's model at SIZES."""
    spec = importlib.util.spec_from_file_location("released_bdh", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.BDH(module.BDHConfig(dropout=0.0, **SIZES))


def models(peer: str | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Loss functions by name, of one set of weights."""
    torch.manual_seed(0)
    plain = Plain(**SIZES)
    ours = from_bdh_state_dict({name: x.clone() for name, x in plain.state_dict().items()}, num_layers=plain.levels)
    each = {
        "ours": lambda ids, targets: ours(ids, shift_labels=targets, use_cache=False).loss,
        "plain": lambda ids, targets: plain(ids, targets)[1],
    }
    if peer:
        theirs = released(peer)
        theirs.load_state_dict(plain.state_dict())
        each["released"] = lambda ids, targets: theirs(ids, targets)[1]
    return each


def check(draws: int = 4, T: int = 256) -> dict[str, float]:
    """How far ours is from plain in fp64 with fp64's phases: of each weight's gradient, as a share of its norm.

    `fp64`: ours in fp64, the same formulas, so only rounding. `fp32`: ours as timed, of draws where every level counts
    as many active neurons as in fp64. `flipped`: of the other draws. There some x or y is within rounding of 0 and
    falls on the other side of its relu; one among millions moves a gradient by 1e-6 to some 1e-3 of its norm. The fp32
    phases of plain and of a released file flip some too: that is why their gradients are as far from ours.

    Raises:
        ValueError: farther than that explains, or flips in every draw.
    """
    far: dict[str, list[float]] = dict(fp64=[], fp32=[], flipped=[])
    for seed in range(draws):
        torch.manual_seed(seed)
        plain, (ids, targets) = Plain(**SIZES), torch.randint(256, (2, 1, T))
        weights = {name: x.clone() for name, x in plain.state_dict().items()}
        plain.double().attn.freqs = _turns_per_token(plain.encoder.shape[2])
        plain(ids, targets)[1].backward()
        wanted = {name: x.grad for name, x in plain.named_parameters()}
        exact, active = _gradients(weights, torch.float64, ids, targets)
        single, counted = _gradients(weights, torch.float32, ids, targets)
        share = lambda got, wanted=wanted: max(((got[n] - x).norm() / x.norm()).item() for n, x in wanted.items())
        far["fp64"].append(share(exact))
        far["fp32" if counted == active else "flipped"].append(share(single))
    worst = {name: max(values) for name, values in far.items() if values}
    if not (worst["fp64"] < 1e-9 and worst.get("fp32", 1.0) < 1e-5 and worst.get("flipped", 0.0) < 0.03):
        raise ValueError(f"gradients: expected fp64 within 1e-9, fp32 1e-5, flipped 0.03 of plain's, got {worst}")
    return worst


def _gradients(
    weights: dict[str, Tensor], dtype: torch.dtype, ids: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], list[float]]:
    """Ours, by the released names and as they lie; and how many x and x * y each level counts."""
    model = from_bdh_state_dict(weights, num_layers=SIZES["n_layer"]).to(dtype)
    out = model(ids, use_cache=False)
    F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()).backward()  # transformers' is in fp32
    block = model.stack.blocks[0]
    grads = {
        "embed.weight": model.embed_tokens.weight.grad,
        "encoder": block.encoder.grad.mT,
        "encoder_v": block.encoder_v.grad.mT,
        "decoder": block.decoder.grad.flatten(0, 1),
        "lm_head": model.lm_head.weight.grad.T,
    }
    return grads, [float(level[name]) for level in out.stats for name in ("x", "xy")]


def batch(B: int, T: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def peak(who: str, B: int, T: int, threads: int, peer: str | None, answer) -> None:
    """In a process of its own: MiB that one step adds."""
    torch.set_num_threads(threads)
    loss = models(peer)[who]
    loss(*batch(1, 8)).backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak_kib()
    loss(*batch(B, T)).backward()
    answer.put((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def added_peak(who: str, B: int, T: int, threads: int, peer: str | None) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak, args=(who, B, T, threads, peer, answer))
    process.start()
    process.join()
    return answer.get(timeout=5) if process.exitcode == 0 else float("nan")


def train(B: int, lengths: list[int], rounds: int, threads: int, peer: str | None) -> list[Row]:
    """Every model's steps in turn."""
    each, rows = models(peer), []
    for T in lengths:
        data, seconds = batch(B, T), {who: [] for who in each}
        losses = {}
        for i in range(rounds + 1):
            for who, loss in each.items():
                start = time.perf_counter(), time.process_time()
                value = loss(*data)
                forward = time.process_time() - start[1]
                value.backward()
                if i:  # the first is to warm up
                    seconds[who].append((time.perf_counter() - start[0], time.process_time() - start[1], forward))
                losses[who] = value.item()
        worst = max(abs(x - losses["plain"]) for x in losses.values())
        if worst > 1e-4:
            raise ValueError(f"losses: expected the same, got {losses}")
        for who, runs in seconds.items():
            wall, cpu, forward = (B * T / statistics.median(column) for column in zip(*runs, strict=True))
            rows.append(Row(who, T, wall, cpu, forward, added_peak(who, B, T, threads, peer)))
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def decode(prefixes: list[int], tokens: int) -> list[dict[str, float]]:
    """Tokens one after the other behind a prefix: ours from the state, plain from the whole prefix again."""
    torch.manual_seed(0)
    plain = Plain(**SIZES)
    ours = from_bdh_state_dict(plain.state_dict(), num_layers=plain.levels).eval()
    rows = []
    for P in prefixes:
        ids = batch(1, P + tokens)[0]
        past = ours(ids[:, :P], use_cache=True).past_key_values
        start = time.perf_counter(), time.process_time()
        for t in range(P, P + tokens):
            past = ours(ids[:, t : t + 1], past_key_values=past, use_cache=True).past_key_values
        row = dict(prefix=P, ours=tokens / (time.perf_counter() - start[0]))
        row["ours_per_cpu_s"] = tokens / (time.process_time() - start[1])
        start, few = (time.perf_counter(), time.process_time()), 3
        for t in range(P, P + few):
            plain(ids[:, : t + 1])
        row |= dict(
            plain=few / (time.perf_counter() - start[0]), plain_per_cpu_s=few / (time.process_time() - start[1])
        )
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[Row], decoded: list[dict[str, float]], far: dict[str, float]) -> str:
    """In Markdown; ratios are to ours, of CPU seconds."""
    lines = [f"{machine()}; {SIZES}; no dropout, fp32", ""]
    lines += ["Gradients beside plain's in fp64 (`check`): " + ", ".join(f"{k} {v:.0e}" for k, v in far.items()), ""]
    lines += ["| tokens | | tokens/s | tokens/CPU-s | forward, tokens/CPU-s | ours is faster | MiB a step adds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    ours = {row.tokens: row for row in rows if row.who == "ours"}
    for row in rows:
        ratio = ours[row.tokens].tokens_per_cpu_s / row.tokens_per_cpu_s
        lines.append(
            f"| {row.tokens} | {row.who} | {row.tokens_per_s:.0f} | {row.tokens_per_cpu_s:.0f} "
            f"| {row.forward_per_cpu_s:.0f} | {ratio:.2f}x | {row.mib:.0f} |"
        )
    lines += ["", "| prefix | ours, tokens/s (CPU-s) | plain, tokens/s (CPU-s) |", "|---|---|---|"]
    for d in decoded:
        cells = [f"{d[who]:.1f} ({d[f'{who}_per_cpu_s']:.1f})" for who in ("ours", "plain")]
        lines.append(f"| {d['prefix']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode", type=int, nargs="*", default=[64, 1000])
    parser.add_argument("--decoded", type=int, default=100, help="tokens decoded behind each prefix")
    parser.add_argument("--peer", help="a released bdh.py")
    parser.add_argument("--out", type=Path, help="results go to OUT.md and OUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    far = check()
    print(far, flush=True)
    rows = train(args.batch, args.tokens, args.rounds, args.threads, args.peer)
    decoded = decode(args.decode, args.decoded)
    text = table(rows, decoded, far)
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text)
        content = dict(machine=machine(), sizes=SIZES, gradients=far, decoding=decoded)
        content["training"] = [row._asdict() for row in rows]
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
