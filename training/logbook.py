"""What a run writes down: metrics.jsonl always, TensorBoard and Weights & Biases where asked."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class Logbook:
    """One line of JSON per record, with its step and its split.

    Args:
        folder: of the run.
        step: the step that the run goes on from; later lines are of a future that did not happen, and are removed.
        tensorboard, wandb: whether to write there too.
        config: what Weights & Biases shows as the run's configuration.

    Raises:
        ValueError: wandb asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool, wandb: bool, config: dict[str, Any]) -> None:
        self.path = folder / METRICS
        _forget_after(self.path, step)
        self.stream = self.path.open("a", encoding="utf-8")
        self.board = _tensorboard(folder, step) if tensorboard else None
        self.wandb = _wandb(folder, config) if wandb else None

    def write(self, split: str, step: int, **values: Any) -> None:
        """Append a record; numbers go to the boards as split/name. Raises OSError naming the file."""
        try:
            self.stream.write(json.dumps(dict(step=step, split=split, **values)) + "\n")
            self.stream.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        numbers = {f"{split}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def to_disk(self) -> None:
        """Before a checkpoint is saved, so that it never knows more than the log."""
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        self.stream.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


class Silence(Logbook):
    """Of a process that leaves the writing to another."""

    def __init__(self) -> None:
        self.board = self.wandb = None

    def write(self, split: str, step: int, **values: Any) -> None:
        """Nothing."""

    def to_disk(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off is none."""
    path, lines = folder / METRICS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _forget_after(path: Path, step: int) -> None:
    """Keep the lines up to a step, but not the closing ones, which the run will write again."""
    kept = [line for line in records(path.parent) if line["step"] <= step and line["split"] != "final"]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def _wandb(folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("trainer.wandb: expected the package wandb to be installed, got none") from error
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # the same run again when it is resumed
    return wandb.init(project="seqzoo", dir=str(folder), id=name, resume="allow", config=config)
