"""Small training runs, for the tests of training and of its checkpoints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module

from seqzoo.train import train
from seqzoo.training.stopping import StopRequest

TRANSFORMER = [
    "model=transformer", "model.hidden_size=32", "model.num_hidden_layers=1", "model.mixers.full.num_heads=2",
    "model.mixers.full.num_kv_heads=1", "model.mixers.full.head_width=16", "model.channels.mlp.width=48",
]  # fmt: skip
HYBRID = [
    "model=qwen3_next_nano", "model.hidden_size=24", "model.mixers.delta.num_key_heads=1",
    "model.mixers.delta.num_value_heads=2", "model.mixers.delta.key_width=8", "model.mixers.delta.value_width=12",
    "model.mixers.full.num_heads=2", "model.mixers.full.num_kv_heads=1", "model.mixers.full.head_width=8",
    "model.mixers.full.rotary_width=4", "model.channels.moe.num_experts=4", "model.channels.moe.expert_width=8",
    "model.channels.moe.shared_width=8",
]  # fmt: skip
TRAINER = dict(
    steps=12, batch_size=2, sequence_length=24, shuffle_buffer=4, device="cpu", tensorboard="false", log_every=2,
    validate_every=4, validation_tokens=200, checkpoint_every=3, final_validation_bytes=600, sample_tokens=5,
)  # fmt: skip
CLOCK = {"seconds", "tokens_per_second", "peak_bytes", "checkpoint", "data_share"}
CLOCK |= {"tokens_per_second_per_device", "model_flops_per_second_per_device"}  # what two equal runs do not share


def options(
    folder: Path, *more: str, model: list[str] = TRANSFORMER, data: str | None = "stdlib", **trainer
) -> list[str]:
    """Overrides of a run in `folder`, on files that are made beside it; without `data` the data are in `more`."""
    text = folder.parent / "text"
    if not text.exists():
        text.mkdir()
        for i in range(20):
            (text / f"m{i}.py").write_text("".join(f"def f{j}(x):\n    return x + {i * j}\n\n" for j in range(i + 1)))
    settings = [f"trainer.{name}={value}" for name, value in (TRAINER | trainer).items()]
    files = [f"data={data}", f"data.folder={text}", "data.validation_share=0.2"] if data else []
    return [*model, *files, f"run_dir={folder}", *settings, *more]


def run(folder: Path, *more: str, picture: bool = False, **trainer) -> dict:
    """Train in this process -> the closing record. A picture takes longer than the rest: only if asked."""
    with initialize_config_module("seqzoo.configs", version_base=None):
        cfg = compose("train", overrides=options(folder, *more, **trainer))
    try:
        with StopRequest() as stop, one_thread(), nullcontext() if picture else patch("seqzoo.train.draw_losses"):
            return train(cfg, folder, stop)
    finally:
        if dist.is_initialized():  # by a layout of many processes, of which this one is all
            dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread, long where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def written(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]
