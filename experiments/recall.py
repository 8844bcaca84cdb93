"""Multi-query associative recall: which mixer finds which pairs again, with how much state.

    python -m seqzoo.experiments.recall

Every model is one `Probe`, taught with sequences of 4 to 32 pairs in turn, asked in fresh ones; see tasks.recall.
"""

from itertools import pairwise

import hydra
from omegaconf import DictConfig

from seqzoo.experiments import tasks
from seqzoo.experiments.learn import accuracy, learn
from seqzoo.experiments.probe import Probe
from seqzoo.experiments.report import (
    CONFIGS,
    Report,
    by_model,
    cells_of,
    compare,
    lines,
    mean,
    same_start,
    settings,
    spread,
)


@hydra.main(config_path=CONFIGS, config_name="recall", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg)
    pairs = given["task"]["test_pairs"]
    if hardest(given["task"]) not in pairs:
        raise ValueError(f"task.test_pairs: expected {hardest(given['task'])}, the most of task.pairs, got {pairs}")
    report = Report("recall", given)
    found = by_model(report.run(cell, cells_of(given)), given["models"])
    report.save(
        "Multi-query associative recall",
        [table(found, pairs), compare(at_hardest(found, given["task"]), pairwise(given["expected"]))],
        lambda figure: draw(figure, found, given["task"]),
        note=(
            f"Accuracy in percent, mean (lowest-highest) over seeds; taught with {given['task']['pairs']} pairs. "
            f"State: fp32, after the {tokens(given['task'], max(pairs))} tokens of the longest sequence. Seconds: of "
            "one core. Below: the order that the literature leads one to expect (Zoology, arXiv 2312.04927), at "
            f"{hardest(given['task'])} pairs, in percentage points."
        ),
    )
    return report


def cell(*, model: dict, seed: int, task: dict, training: dict) -> dict:
    """One model, one seed: accuracies by number of pairs, and what the model costs."""
    generator, unseen = same_start(seed), same_start(1_000_000 + seed)
    same_start(seed)
    probe = Probe(**model)

    def sequences(pairs: int, rows: int, generator) -> tuple:
        return tasks.recall(
            rows, pairs, tokens(task, pairs), model["vocab_size"], power=task["power"], generator=generator
        )

    def draw_batch(step: int) -> tuple:
        pairs = task["pairs"][step % len(task["pairs"])]
        return sequences(pairs, max(1, task["tokens_per_step"] // tokens(task, pairs)), generator)

    held_out = [sequences(pairs, task["check_rows"], unseen) for pairs in task["pairs"]]
    learnt = learn(probe, draw_batch, held_out, **training)
    return dict(
        accuracy={pairs: accuracy(probe, sequences(pairs, task["test_rows"], unseen)) for pairs in task["test_pairs"]},
        state_bytes=probe.state_bytes(tokens(task, max(task["test_pairs"]))),
        parameters=sum(p.numel() for p in probe.parameters()),
        **learnt,
    )


def tokens(task: dict, pairs: int) -> int:
    """Of a sequence with so many pairs."""
    return pairs * task["tokens_per_pair"]


def hardest(task: dict) -> int:
    return max(task["pairs"])


def at_hardest(found: dict[str, list[dict]], task: dict) -> dict[str, list[float]]:
    return {model: [r["accuracy"][str(hardest(task))] for r in results] for model, results in found.items()}


def table(found: dict[str, list[dict]], pairs: list[int]) -> list[tuple]:
    head = ("model", "parameters", "state, bytes", *(f"{n} pairs" for n in pairs), "steps", "seconds")
    rows = []
    for model, results in found.items():
        shown = (spread([r["accuracy"][str(n)] for r in results]) for n in pairs)
        first, cost = results[0], (spread([r[name] for r in results], 0, 1.0) for name in ("steps", "seconds"))
        rows.append((model, f"{first['parameters']:,}", f"{first['state_bytes']:,}", *shown, *cost))
    return [head, *rows]


def draw(figure, found: dict[str, list[dict]], task: dict) -> None:
    by_pairs, by_bytes = figure.subplots(1, 2, sharey=True)
    for (model, results), style in zip(found.items(), lines(), strict=False):
        mean_at = {n: 100 * mean([r["accuracy"][str(n)] for r in results]) for n in task["test_pairs"]}
        by_pairs.plot(mean_at.keys(), mean_at.values(), label=model, **style)
        by_bytes.plot(results[0]["state_bytes"], mean_at[hardest(task)], **style)
    by_pairs.axvspan(hardest(task), max(task["test_pairs"]), color="gray", alpha=0.1, label="more than was taught")
    by_pairs.set_xscale("log", base=2)
    by_pairs.set(xlabel="pairs in a sequence", ylabel="accuracy [%]", xticks=task["test_pairs"])
    by_pairs.set_xticklabels(task["test_pairs"])
    by_bytes.legend(*by_pairs.get_legend_handles_labels(), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    by_bytes.set_xscale("log")
    by_bytes.set(xlabel=f"state after {tokens(task, max(task['test_pairs']))} tokens [bytes, fp32]")
    by_bytes.set_title(f"{hardest(task)} pairs", fontsize=9)
    for axes in (by_pairs, by_bytes):
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
