"""Induction in one layer: does momentum attention do what plain attention takes two layers for?

    python -m seqzoo.experiments.induction

Two tasks: pairs (tasks.recall, without the convolution that other experiments have) and induction (tasks.repeat). The
claim is arXiv 2602.04902's; the controls are a lower temperature, the shear without its growth of the logits, half of
the shear, its sign, its place, tokens apart so that a neighbour says nothing, and two plain layers.
"""

import hydra
from omegaconf import DictConfig
from torch import Generator

from seqzoo.experiments import tasks
from seqzoo.experiments.learn import learn
from seqzoo.experiments.probe import Probe
from seqzoo.experiments.report import CONFIGS, Report, by_model, compare, mean, same_start, settings, spread

TASKS = ("pairs", "induction")


@hydra.main(config_path=CONFIGS, config_name="induction", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg)
    report = Report("induction", given)
    cells = {
        f"{task} {name}/{seed}": dict(
            task=dict(kind=task, **given["task"]), seed=seed, training=given["training"], **described(given, model)
        )
        for task in TASKS
        for name, model in given["models"].items()
        for seed in given["seeds"]
    }  # fmt: skip
    results = report.run(cell, cells)
    found = {task: by_model(results, {f"{task} {name}": 0 for name in given["models"]}) for task in TASKS}
    found = {task: {name.removeprefix(f"{task} "): r for name, r in found[task].items()} for task in TASKS}
    last = {name: [r["seen"][-1][1] for r in runs] for name, runs in found["induction"].items()}
    report.save(
        "Induction in one layer of momentum attention",
        [table(found), compare(last, given["claims"])],
        lambda figure: draw(figure, found, given["curves"]),
        note=(
            "Accuracy in percent on fresh sequences, mean (lowest-highest) over seeds, after so many steps at a "
            f"constant rate. pairs: {given['task']['pairs']} of them, a guess among their values is right at "
            f"{100 / given['task']['pairs']:.1f}. induction: {given['task']['length']} tokens and the same again, a "
            f"guess is right at {100 / given['task']['length']:.1f}. Below: what is claimed, in percentage points of "
            "induction at the last step."
        ),
    )
    return report


def described(given: dict, model: dict) -> dict:
    """A model's row in full: the probe it is, what multiplies its logits, how far apart its tokens stand."""
    parts = dict(layers=["momentum"] * model.get("depth", 1))
    parts["mixers"] = {"momentum": {**given["mixer"], **model["mixer"]}}
    return dict(
        model={**given["probe"], **parts},
        logits_times=model.get("logits_times", 1.0),
        spacing=model.get("spacing", 1),
    )


def cell(*, task: dict, seed: int, training: dict, model: dict, logits_times: float, spacing: int) -> dict:
    """One model, one task, one seed."""
    generator, unseen = same_start(seed), same_start(1_000_000 + seed)
    same_start(seed)
    probe = Probe(**model)
    for layer in probe.layers:
        layer.q_proj.register_forward_hook(lambda module, inputs, q: q * logits_times)

    def sequences(rows: int, generator: Generator) -> tuple:
        if task["kind"] == "induction":
            drawn = tasks.repeat(rows, task["length"], model["vocab_size"], generator=generator)
        else:
            n = task["pairs"]
            drawn = tasks.recall(rows, n, 4 * n, model["vocab_size"], power=1.0, generator=generator)
        return tasks.apart(*drawn, spacing)

    return learn(
        probe, lambda step: sequences(task["rows"], generator), [sequences(task["test_rows"], unseen)], **training
    )


def table(found: dict[str, dict[str, list[dict]]]) -> list[tuple]:
    looks = [look[0] for look in next(iter(found["pairs"].values()))[0]["seen"]]
    rows = [("model", *(f"{task}, {step} steps" for task in TASKS for step in looks), "seconds")]
    for model in found["pairs"]:
        shown = []
        for task in TASKS:
            stopped = [_filled(r["seen"], len(looks)) for r in found[task][model]]
            shown += [spread([seen[i] for seen in stopped]) for i in range(len(looks))]
        rows.append((model, *shown, spread([r["seconds"] for r in found["induction"][model]], 0, 1.0)))
    return rows


def draw(figure, found: dict[str, dict[str, list[dict]]], curves: dict[str, dict[str, float]]) -> None:
    for axes, task in zip(figure.subplots(1, 2, sharey=True), TASKS, strict=True):
        for label, gammas in curves.items():
            there = {gamma: found[task][model] for model, gamma in gammas.items() if model in found[task]}
            last = [[100 * r["seen"][-1][1] for r in runs] for runs in there.values()]
            axes.plot(there.keys(), [mean(values) for values in last], marker="o", label=label)
            axes.fill_between(list(there), [min(v) for v in last], [max(v) for v in last], alpha=0.2)
        axes.set(xlabel="gamma", title=task)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("accuracy at the last step [%]")


def _filled(seen: list[list[float]], looks: int) -> list[float]:
    """Accuracies at every look; who knew enough and stopped stays there."""
    values = [look[1] for look in seen]
    return values + values[-1:] * (looks - len(values))


if __name__ == "__main__":
    main()
