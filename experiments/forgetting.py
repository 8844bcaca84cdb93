"""What a mixer still knows of a pair, by how long ago it saw it.

    python -m seqzoo.experiments.forgetting

Pairs come and are asked for in one stream, each once, after 1 to 2n - 1 others' slots; see tasks.stream. A memory of
fixed size has to give something up, and differs in what: a window the old, a sum nothing in particular, a decay the
old, a dictionary what is like something else.
"""

from itertools import pairwise

import hydra
import torch
from omegaconf import DictConfig

from seqzoo.experiments import tasks
from seqzoo.experiments.learn import answers, learn
from seqzoo.experiments.probe import Probe
from seqzoo.experiments.report import CONFIGS, Report, by_model, cells_of, lines, mean, same_start, settings, spread


@hydra.main(config_path=CONFIGS, config_name="forgetting", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg)
    task = given["task"]
    ages = task["ages"]
    if sorted(set(ages)) != ages or len(ages) < 2:
        raise ValueError(f"task.ages: expected borders that rise, two or more, got {ages}")
    report = Report("forgetting", given)
    found = by_model(report.run(cell, cells_of(given)), given["models"])
    report.save(
        "Recall by the age of a pair",
        [table(found, ages)],
        lambda figure: draw(figure, found, ages),
        note=(
            "Accuracy in percent, mean (lowest-highest) over seeds, by tokens between a pair and its query, in "
            f"streams of {task['test_pairs']} pairs ({4 * task['test_pairs']} tokens); taught with {task['pairs']}. "
            "State: fp32, at a stream's end."
        ),
    )
    return report


def cell(*, model: dict, seed: int, task: dict, training: dict) -> dict:
    """One model, one seed: accuracy between each two borders of age."""
    generator, unseen = same_start(seed), same_start(1_000_000 + seed)
    same_start(seed)
    probe = Probe(**model)

    def streams(pairs: int, rows: int, generator) -> tuple:
        return tasks.stream(rows, pairs, model["vocab_size"], generator=generator)

    def draw_batch(step: int) -> tuple:
        pairs = task["pairs"][step % len(task["pairs"])]
        return streams(pairs, max(1, task["tokens_per_step"] // (4 * pairs)), generator)[:2]

    held_out = [streams(pairs, task["check_rows"], unseen)[:2] for pairs in task["pairs"]]
    learnt = learn(probe, draw_batch, held_out, **training)
    ids, targets, age = streams(task["test_pairs"], task["test_rows"], unseen)
    right, age = answers(probe, (ids, targets)).double(), age[targets >= 0]
    bins = torch.bucketize(age, torch.tensor(task["ages"]), right=True) - 1
    inside = range(len(task["ages"]) - 1)
    return dict(
        accuracy=[right[bins == i].mean().item() if (bins == i).any() else None for i in inside],
        asked=[int((bins == i).sum()) for i in inside],
        state_bytes=probe.state_bytes(4 * task["test_pairs"]),
        **learnt,
    )


def table(found: dict[str, list[dict]], ages: list[int]) -> list[tuple]:
    columns = (f"{a}-{b - 1}" for a, b in pairwise(ages))
    rows = [("model", "state, bytes", *columns, "steps", "seconds")]
    for model, results in found.items():
        cost = (spread([r[name] for r in results], 0, 1.0) for name in ("steps", "seconds"))
        shown = (spread(values) for values in _known(results))
        rows.append((model, f"{results[0]['state_bytes']:,}", *shown, *cost))
    return rows


def draw(figure, found: dict[str, list[dict]], ages: list[int]) -> None:
    axes = figure.subplots()
    middle = [(a * (b - 1)) ** 0.5 for a, b in pairwise(ages)]
    for (model, results), style in zip(found.items(), lines(), strict=False):
        label = f"{model} ({results[0]['state_bytes'] / 1024:.1f} KiB)"
        axes.plot(middle, [100 * mean(values) for values in _known(results)], label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="age of the pair [tokens]", ylabel="accuracy [%]")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _known(results: list[dict]) -> list[list[float]]:
    """Per bin of age, the seeds that asked for such a pair; nan where none did."""
    bins = zip(*(r["accuracy"] for r in results), strict=True)
    return [[x for x in values if x is not None] or [float("nan")] for values in bins]


if __name__ == "__main__":
    main()
