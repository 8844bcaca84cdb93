"""What W8ASpike costs: int8 weights, and whole spike counts for activations, by the number of spikes.

    python -m seqzoo.experiments.quantise

Small models are trained on real bytes by `seqzoo-train`, and rounded: to the nearest, and so that errors make up for
each other on rows of the training text (`models/quantise.py`). The claim (SpikingBrain, arXiv 2509.05276, of a 7B
model): with k, the mean activation over the threshold, from 2 to 4, spikes become less sparse, 73.0 to 66.4 %, and what
is lost smaller, at 3 about one point of accuracy.
"""

from copy import deepcopy

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from seqzoo.experiments.report import CONFIGS, Report, by_model, mean, settings, spread
from seqzoo.experiments.runs import trained
from seqzoo.kernels.spike.reference import dequantised
from seqzoo.layers.spike_linear import W8ASpike
from seqzoo.models.quantise import moments, quantisation_spec, quantise
from seqzoo.models.spiking import spike_report

PAPER = {2.0: 73.0, 2.5: 70.9, 3.0: 69.2, 3.5: 67.7, 4.0: 66.4}  # sparsity by k


@hydra.main(config_path=CONFIGS, config_name="quantise", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg)
    report = Report("quantise", given)
    shared = dict(ks=given["ks"], rows=given["rows"])
    cells = {
        f"{name}/{seed}": dict(overrides=[*overrides, *given["train"]], seed=seed, **shared)
        for name, overrides in given["models"].items()
        for seed in given["seeds"]
    }
    found = by_model(report.run(cell, cells), given["models"])
    report.save(
        "int8 weights and spikes, by k",
        [table(name, results, given["ks"]) for name, results in found.items()],
        lambda figure: draw(figure, found, given["ks"]),
        note=(
            f"Each: `seqzoo-train {' '.join(given['train'])}`. Bits per byte of held-out files that rounding adds, to "
            f"the nearest and on {given['rows']} rows of the training text; error: of the weights alone, of what a "
            "projection gives for its spikes on other rows, mean over projections; sparsity: of three virtual steps, "
            "those without a spike, for counts that fit, and what the paper has. Mean (lowest-highest) over seeds."
        ),
    )
    return report


def cell(*, overrides: list[str], seed: int, ks: list[float], rows: int) -> dict:
    """One model -> its bits, and what becomes of them: for each k, by either rounding."""
    trainer = trained([*overrides, f"seed={seed}"])
    floats = trainer.model.eval()
    text, other = (torch.cat([next(trainer.batches).input_ids for _ in range(rows)])[:rows] for _ in range(2))
    result: dict = dict(bits=trainer.validate()["bits_per_byte"], by_k=[])
    for k in ks:
        given = moments(floats, quantisation_spec(dict(k=k)), other)
        made = {}
        for how, ids in (("nearest", None), ("text", text)):
            trainer.model = quantise(deepcopy(floats), k=k, calibration=ids)
            made[how] = dict(bits=trainer.validate()["bits_per_byte"], error=error(floats, trainer.model, given))
        fired = spike_report(trainer.model, other[:8])
        result["by_k"].append(made | dict(sparsity=mean([row["sparsity"] for row in fired])))
    return result


@torch.no_grad()
def error(floats: nn.Module, made: nn.Module, given: dict[str, Tensor]) -> float:
    """||(W' - W) s|| / ||W s||, s what a projection is given, within its groups of channels; mean over projections."""
    found = []
    for name, seen in given.items():
        ours = made.get_submodule(name)
        if isinstance(ours, W8ASpike):
            weight = floats.get_submodule(name).weight
            off = dequantised(ours.weight, ours.scales, ours.group) - weight
            found.append((_size(off, seen) / _size(weight, seen)) ** 0.5)
    return mean(found)


def _size(weight: Tensor, seen: Tensor) -> float:
    G, group = seen.shape[:2]
    parts = nn.functional.pad(weight, (0, G * group - weight.shape[1])).unflatten(1, (G, group)).transpose(0, 1)
    return ((parts @ seen) * parts).sum().item()


def table(name: str, results: list[dict], ks: list[float]) -> list[tuple]:
    bits = spread([r["bits"] for r in results], 3, 1.0)
    head = ("bits more, nearest", "on a text", "error of weights, nearest", "on a text", "sparsity", "the paper's, 7B")
    rows = [(f"{name} ({bits} bits per byte), k", *head)]
    for i, k in enumerate(ks):
        at = [r["by_k"][i] for r in results]
        more = (
            spread([x[how]["bits"] - r["bits"] for x, r in zip(at, results, strict=True)], 4, 1.0)
            for how in ("nearest", "text")
        )
        errors = (spread([x[how]["error"] for x in at], 2) + " %" for how in ("nearest", "text"))
        sparsity = spread([x["sparsity"] for x in at]) + " %"
        rows.append((f"{k:g}", *more, *errors, sparsity, f"{PAPER[k]} %" if k in PAPER else "-"))
    return rows


def draw(figure, found: dict[str, list[dict]], ks: list[float]) -> None:
    for axes, (name, results) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for how, colour in (("nearest", "tab:orange"), ("text", "tab:blue")):
            for i, r in enumerate(results):
                more = [x[how]["bits"] - r["bits"] for x in r["by_k"]]
                axes.plot(ks, more, color=colour, label=None if i else how, marker="o", markersize=3, linewidth=1.2)
        axes.axhline(0, color="black", linewidth=1)
        axes.set(title=name, xlabel="k", ylabel="bits per byte more than with floats")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    main()
