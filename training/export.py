"""seqzoo-export: a checkpoint that many processes wrote becomes one folder that `from_pretrained` opens."""

import argparse
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from seqzoo.models.checkpoints import MANIFEST, RUN_FACTS
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.writing import check_target
from seqzoo.training.checkpoint import damage_of
from seqzoo.training.shards import INDEX, SHARDS, is_sharded, whole_state

LEFT = {INDEX, SHARDS, RUN_FACTS, MANIFEST}  # what only a run needs


def export(checkpoint: Path, dst: Path, *, max_shard_size: int = 5 * 10**9) -> list[Path]:
    """The weights as they would be saved by one process, tensor after tensor; the optimizer's memory stays behind.

    Args:
        checkpoint: of a run with parallel=fsdp or its kin.
        dst: the folder to make; it appears when it is complete.
        max_shard_size: [bytes] of one file, which is also the memory that is taken.

    Returns:
        The files of weights.

    Raises:
        ValueError: no such checkpoint, a damaged one, or a `dst` with something in it.
        OSError: no space left; nothing is left of `dst`.
    """
    check_target(checkpoint, dst)
    if not is_sharded(checkpoint):
        raise ValueError(f"{checkpoint}: expected one of many processes, with {INDEX}; others open as they are")
    damage = damage_of(checkpoint)
    if damage is not None:
        raise ValueError(f"{checkpoint}: expected a whole checkpoint: {damage}")
    tied = SeqZooConfig.from_pretrained(checkpoint).tie_word_embeddings
    partial = dst.with_name(f".{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files: list[dict[str, Tensor]] = [{}]
        where: dict[str, int] = {}
        size = total = 0
        for name, x in whole_state(checkpoint):
            if tied and name == "lm_head.weight":
                continue
            if files[-1] and size + x.nbytes > max_shard_size:
                _write(partial, len(files), files[-1])
                files[-1] = dict.fromkeys(files[-1])
                files.append({})
                size = 0
            files[-1][name], where[name] = x, len(files)
            size, total = size + x.nbytes, total + x.nbytes
        _write(partial, len(files), files[-1])
        _name(partial, len(files), where, total)
        for path in checkpoint.iterdir():
            if path.name not in LEFT:
                shutil.copyfile(path, partial / path.name)
        if dst.exists():
            dst.rmdir()  # empty, as was seen above
        os.replace(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(dst.glob("*.safetensors"))


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / f"part-{number}", metadata={"format": "pt"})


def _name(folder: Path, count: int, where: dict[str, int], total: int) -> None:
    """The names that transformers looks for, now that it is known how many there are."""
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    for n, name in enumerate(names, 1):
        (folder / f"part-{n}").rename(folder / name)
    if count > 1:
        index = dict(metadata={"total_size": total}, weight_map={name: names[n - 1] for name, n in where.items()})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="seqzoo-export", description=__doc__.partition(": ")[2])
    parser.add_argument("checkpoint", type=Path, help="step-... of a run on many processes")
    parser.add_argument("dst", type=Path, help="the folder to make")
    parser.add_argument("--max-shard-size", type=int, default=5 * 10**9, help="bytes of one file")
    args = parser.parse_args()
    try:
        files = export(args.checkpoint, args.dst, max_shard_size=args.max_shard_size)
    except (OSError, ValueError) as error:
        parser.exit(1, f"seqzoo-export: {error}\n")
    print(f"{args.dst}: {len(files)} files of weights, {sum(file.stat().st_size for file in files):,} bytes")
    return 0
