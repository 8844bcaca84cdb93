"""What a conversion takes: peak memory, and time against copying the files, for synthetic checkpoints in bf16.

`copy`: every row copies (SpikingBrain-7B's layers). `permute`: most bytes are permuted (Qwen3-Next's projections, few
MLPs). `stack`: two layers of Qwen3-Next-80B as published, whose experts are joined into tensors of 2 GB.

The conversion runs in a process of its own. Memory is what the kernel counted for it: VmHWM, the most it ever had
resident, pages of mapped files among it, and RssAnon, sampled, which is what the process itself asked for; both stand
above what the same process had after its imports. Time is of the call alone. What is copied is synced to the disk, as a
conversion does; the page cache holds the files before every run (warm) or none of them (cold). They run in turn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqzoo.benchmarks.timing import machine
from seqzoo.models import checkpoints
from seqzoo.models.checkpoints import Folder, Head
from seqzoo.models.convert import architecture, convert, folders
from seqzoo.models.convert.rules import expected_of

_NEXT = dict(
    model_type="qwen3_next", head_dim=256, num_attention_heads=16, num_key_value_heads=2, linear_num_key_heads=16,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_num_value_heads=32, vocab_size=151936,
    max_position_embeddings=262144,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "copy": dict(model_type="gla_swa", hidden_size=3584, num_hidden_layers=14, intermediate_size=18944),
    "permute": _NEXT | dict(hidden_size=4096, num_hidden_layers=44, intermediate_size=1024, num_experts=0),
    "stack": _NEXT | dict(hidden_size=2048, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
                          num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
                          shared_expert_intermediate_size=512),
}  # fmt: skip


def make(folder: Path, config: dict[str, Any], shards: int) -> int:
    """A checkpoint folder of random weights, written with little memory. Returns the bytes of its tensors."""
    theirs = architecture(config["model_type"])
    ours = theirs.to_ours(config)
    shapes = expected_of(theirs.rows(ours, {}), folders.shapes_of(ours))
    heads = {name: Head(shape, "BF16", "") for name, shape in shapes.items()}
    total = sum(head.bytes for head in heads.values())
    size = total // shards
    while len({head.file for head in checkpoints.place(heads, size).values()}) > shards:
        size += total // 100
    heads = checkpoints.place(heads, size)
    folder.mkdir(parents=True)
    pool = torch.randn(1 << 22).mul_(0.02).bfloat16()

    def chunks(name: str) -> Iterator[Tensor]:
        left = heads[name].bytes // 2
        while left:
            yield pool[: min(left, pool.numel())]
            left -= min(left, pool.numel())

    for file in sorted({head.file for head in heads.values()}):
        mine = {name: head for name, head in heads.items() if head.file == file}
        checkpoints.write_tensors(folder / file, mine, chunks, {"format": "pt"})
    checkpoints.write_index(folder, heads, {"total_size": total})
    (folder / "config.json").write_text(json.dumps(config))
    return total


def copy(source: Path, target: Path) -> None:
    """Every file, and it is on the disk when this returns."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def set_cache(source: Path, warm: bool) -> None:
    """All of a folder in the page cache, or nothing."""
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            if warm:
                buffer = bytearray(1 << 24)
                while file.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(source: Path, target: Path) -> dict[str, float]:
    """Converts, in this process. Returns seconds, and bytes of memory above those before."""
    before, peak, done = _status(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _status()["RssAnon"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    convert(source, target)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    after = _status()
    return dict(seconds=seconds, peak=after["VmHWM"] - before["VmRSS"], peak_with_imports=after["VmHWM"],
                anonymous=max(0, peak[0] - before["RssAnon"]))  # fmt: skip


def _status() -> dict[str, int]:
    """Of this process: [bytes] by the kernel's names."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def in_turn(source: Path, work: Path, rounds: int, warm: bool) -> dict[str, Any]:
    """Copying and converting, round by round."""
    copied, converted = [], []
    for _ in range(rounds):
        set_cache(source, warm)
        start = time.perf_counter()
        copy(source, work / "copied")
        copied.append(time.perf_counter() - start)
        shutil.rmtree(work / "copied")
        set_cache(source, warm)
        command = [sys.executable, "-m", "seqzoo.benchmarks.convert", "--measure", str(source), str(work / "ours")]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        converted.append(json.loads(run.stdout))
        shutil.rmtree(work / "ours")
    most = {name: max(run[name] for run in converted) for name in ("peak", "peak_with_imports", "anonymous")}
    return dict(copy_seconds=copied, convert_seconds=[run["seconds"] for run in converted], **most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("convert_benchmark"), help="a folder to make and to remove")
    parser.add_argument("--kinds", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--layers", type=int, help="other than the kind's own, for a smaller disk")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--json", type=Path, help="the figures, to a file")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(*args.measure)))
        return
    print(machine())
    figures = []
    for kind in args.kinds:
        try:
            layers = {} if args.layers is None else dict(num_hidden_layers=args.layers)
            total = make(args.work / "theirs", CONFIGS[kind] | layers, args.shards)
            for cache in args.cache:
                found = in_turn(args.work / "theirs", args.work, args.rounds, cache == "warm")
                figures.append(
                    dict(kind=kind, cache=cache, bytes=total, shards=len(Folder(args.work / "theirs").files)) | found
                )
                print(line(figures[-1]), flush=True)
        finally:
            shutil.rmtree(args.work, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine(), rows=figures), indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """One row of figures in words."""
    copied, converted = (statistics.median(row[name]) for name in ("copy_seconds", "convert_seconds"))
    spread = f"{min(row['convert_seconds']):.1f}-{max(row['convert_seconds']):.1f}"
    return (
        f"{row['kind']:8s} {row['cache']}  {row['bytes'] / 1e9:.2f} GB in {row['shards']} shards  "
        f"copy {copied:6.1f} s [{min(row['copy_seconds']):.1f}-{max(row['copy_seconds']):.1f}]  "
        f"convert {converted:6.1f} s [{spread}]  {copied / converted:.2f} of copy's speed  "
        f"peak {row['peak'] / 1e6:,.0f} MB above imports (VmHWM {row['peak_with_imports'] / 1e6:,.0f} MB), "
        f"anonymous {row['anonymous'] / 1e6:,.0f} MB"
    )


if __name__ == "__main__":
    main()
