"""How sparse are the models that are sparse by nature, layer by layer, while they learn?

    python -m seqzoo.experiments.sparsity

The runs are `seqzoo-train`'s own on real bytes. Before the first step, and whenever the run writes a record, the same
held-out rows are looked at: of BDH the share of neurons whose x, and whose x * y, is not 0; of models that spike the
firing of every projection's input.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from seqzoo.experiments.report import CONFIGS, Report, by_model, lines, mean, settings, spread
from seqzoo.experiments.runs import trained
from seqzoo.models import SeqZooForCausalLM
from seqzoo.models.spiking import spike_report
from seqzoo.training.logbook import Logbook
from seqzoo.training.trainer import Trainer

Look = dict[str, dict[str, float]]  # layer -> what was measured -> its value


@hydra.main(config_path=CONFIGS, config_name="sparsity", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg)
    for name, measured in given["models"].items():
        if measured not in MEASURES:
            raise ValueError(f"models.{name}: expected one of {list(MEASURES)}, got {measured!r}")
    report = Report("sparsity", given)
    cells = {
        f"{name}/{seed}": dict(
            overrides=[f"model={name}", *given["train"]], measured=measured, seed=seed, rows=given["rows"]
        )
        for name, measured in given["models"].items()
        for seed in given["seeds"]
    }
    found = by_model(report.run(cell, cells), given["models"])
    report.save(
        "Sparsity while training on Python's standard library, bytes",
        [table(model, results) for model, results in found.items()],
        lambda figure: draw(figure, found),
        note=(
            f"Each: `seqzoo-train model=NAME {' '.join(given['train'])}`, looked at on {given['rows']} held-out rows; "
            "in percent, mean (lowest-highest) over seeds. x, xy: neurons whose x, and whose x * y, is not 0. silent: "
            "channels that do not fire; spikes: per channel in the bitwise code, in hundredths; sparsity: of three "
            "virtual steps, those without a spike, for counts that fit. Layers with the same input stand as one."
        ),
    )
    return report


def cell(*, overrides: list[str], measured: str, seed: int, rows: int) -> dict:
    """One run: what was seen at each step, by layer, and the loss beside it."""
    seen: list[list] = []

    def logbook(trainer: Trainer, folder: Path) -> Watch:
        length = trainer.settings.sequence_length
        inputs = next(iter(trainer.validation.batches(rows, rows * length))).inputs(trainer.settings.torch_device())
        inputs.pop("shift_labels")
        return Watch(folder, lambda: MEASURES[measured](trainer.model, inputs), seen)

    trainer = trained([*overrides, f"seed={seed}"], logbook)
    return dict(seen=seen, bits_per_byte=trainer.validate()["bits_per_byte"])


class Watch(Logbook):
    """A run's logbook that looks at the model before the first step and whenever a training record is written."""

    def __init__(self, folder: Path, look: Callable[[], Look], seen: list[list]) -> None:
        super().__init__(folder, 0, tensorboard=False, wandb=False, config={})
        self.look, self.seen = look, seen
        seen.append([0, look()])

    def write(self, split: str, step: int, **values: Any) -> None:
        super().write(split, step, **values)
        if split == "train":
            self.seen.append([step, self.look()])


@torch.no_grad()
def densities(model: SeqZooForCausalLM, inputs: dict[str, torch.Tensor]) -> Look:
    """What the blocks count of themselves, by block."""
    stats = model(**inputs, use_cache=False).stats
    blocks = enumerate(zip(model.stack.levels(), stats, strict=True))
    return {f"block {i}": block.metrics(counted) for i, (block, counted) in blocks if counted}


def firing(model: SeqZooForCausalLM, inputs: dict[str, torch.Tensor]) -> Look:
    """How the input of each projection fires."""
    rows = spike_report(model, inputs)
    kept = ("silent", "spikes", "sparsity")
    return {row["name"].removeprefix("stack.blocks."): {name: row[name] for name in kept} for row in rows}


MEASURES = {"densities": densities, "firing": firing}


def table(model: str, results: list[dict]) -> list[tuple]:
    """Of one model: a row per layer, at the first, a middle and the last look."""
    steps = [look[0] for look in results[0]["seen"]]
    shown = sorted({0, len(steps) // 2, len(steps) - 1})
    layers = _apart(results)
    what = list(results[0]["seen"][0][1][layers[0]])
    bits = spread([r["bits_per_byte"] for r in results], 3, 1.0)
    rows = [(f"{model} ({bits} bits per byte)", *(f"{name}, step {steps[i]}" for i in shown for name in what))]
    for layer in layers:
        values = (spread([r["seen"][i][1][layer][name] for r in results]) for i in shown for name in what)
        rows.append((layer, *values))
    return rows


def draw(figure, found: dict[str, list[dict]]) -> None:
    curves = {model: _curves(results) for model, results in found.items()}
    panels = [(model, name) for model, by_name in curves.items() for name in by_name if name != "spikes"]
    for axes, (model, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        steps = [look[0] for look in found[model][0]["seen"]]
        for (layer, values), style in zip(curves[model][name].items(), lines(), strict=False):
            axes.plot(steps, values, label=layer, **{**style, "markersize": 2})
        axes.set(xlabel="step", title=f"{model}: {name} [%]")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=5)


def _apart(results: list[dict]) -> list[str]:
    """The layers, of those with the same input only the first: what was seen of them is the same at every look."""
    looks = [look for _, look in results[0]["seen"]]
    first: dict[str, str] = {}
    for layer in looks[0]:
        first.setdefault(str([look[layer] for look in looks]), layer)
    return list(first.values())


def _curves(results: list[dict]) -> dict[str, dict[str, list[float]]]:
    """What was measured -> layer -> percent at each look, the mean over seeds."""
    curves: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for looks in zip(*(r["seen"] for r in results), strict=True):
        for layer in _apart(results):
            for name in looks[0][1][layer]:
                curves[name][layer].append(100 * mean([look[1][layer][name] for look in looks]))
    return curves


if __name__ == "__main__":
    main()
