"""A Transformer becomes an efficient hybrid: how many tokens does it take to win back what the conversion lost?

    python -m seqzoo.experiments.recovery

A small Transformer is trained on real bytes and converted to each layout. The hybrid is then recovered in two ways, by
alignment of its new mixers and distillation after it, and by distillation alone; and the same hybrid learns from
scratch. The claim (SpikingBrain, arXiv 2509.05276, of models 10^4 times as large): under 2 % of the tokens of
pretraining are enough.
"""

import tempfile
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

import seqzoo
from seqzoo.experiments.report import CONFIGS, Report, mean, settings, spread
from seqzoo.experiments.runs import compose_run
from seqzoo.models import SeqZooForCausalLM
from seqzoo.models.convert import convert
from seqzoo.train import plain, prepare, ranks_of
from seqzoo.training.logbook import Logbook, records
from seqzoo.training.progress import Progress
from seqzoo.training.settings import Settings
from seqzoo.training.stopping import StopRequest

WAYS = ("aligned", "distilled", "scratch")
CLOSED = (0.95, 0.99)  # of the gap between the hybrid as converted and the Transformer
Curve = list[tuple[int, float]]  # tokens learned from, bits per byte of held-out text


@hydra.main(config_path=CONFIGS, config_name="recovery", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg)
    report = Report("recovery", given)
    shared = {name: given[name] for name in ("shared", "teacher", "aligning", "recovering", "scratch")}
    cells = {f"all/{seed}": dict(layouts=given["models"], seed=seed, **shared) for seed in given["seeds"]}
    found = list(report.run(cell, cells).values())
    steps = {name: next(x for x in given[name] if "steps" in x) for name in shared if name != "shared"}
    report.save(
        "What a conversion lost, and the tokens that bring it back",
        [table(found, given["models"])],
        lambda figure: draw(figure, found, given["models"]),
        note=(
            "A Transformer trained on Python's standard library (bytes), converted, and recovered: `aligned` by "
            "aligning its new mixers and distilling after it, `distilled` by distilling alone; `scratch` is the same "
            f"hybrid, newly drawn, on the next token. {steps}. Bits per byte of held-out files; the share of the "
            "Transformer's tokens at which so much of the gap is closed between the hybrid as converted and the "
            "Transformer, mean over seeds; `no` where a seed does not get there."
        ),
    )
    return report


def cell(
    *, layouts: dict[str, dict], seed: int, shared: list[str], teacher: list[str], aligning: list[str],
    recovering: list[str], scratch: list[str],
) -> dict:  # fmt: skip
    """One Transformer and all that it becomes -> its tokens and bits, and the curves of every layout by way."""
    common = [*shared, f"seed={seed}"]
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        old, path = curve([*common, *teacher], folder / "teacher")
        result: dict[str, Any] = dict(tokens=old[-1][0], bits=old[-1][1], curves={})
        for name, layout in layouts.items():
            place = folder / name
            convert(path, place / "converted", to=layout, seed=seed)
            config = seqzoo.load(place / "converted").config
            fresh = SeqZooForCausalLM(config)
            fresh.save_pretrained(place / "fresh")
            new = [*common, f"init_from={place / 'converted'}"]
            distil = [*recovering, "objective=distil", f"objective.teacher={path}"]
            first, aligned = curve([*new, *aligning, "objective=align", f"objective.teacher={path}"], place / "aligned")
            second, _ = curve([*common, f"init_from={aligned}", *distil], place / "both", after=first[-1][0])
            alone, _ = curve([*new, *distil], place / "distilled")
            drawn, _ = curve([*common, f"init_from={place / 'fresh'}", *scratch], place / "scratch")
            result["curves"][name] = dict(zip(WAYS, (first + second[1:], alone, drawn), strict=True))
    return result


def curve(overrides: list[str], folder: Path, *, after: int = 0) -> tuple[Curve, str]:
    """A run's held-out bits, from before its first step to its end, `after` so many tokens; and its checkpoint.

    Raises:
        KeyboardInterrupt: the run was stopped.
    """
    cfg = compose_run(overrides)
    chosen = Settings(**plain(cfg.trainer))
    folder.mkdir(parents=True)
    with StopRequest() as stop:
        trainer, _ = prepare(cfg, chosen, folder, ranks_of(cfg))
        points = [(after, trainer.validate(chosen.validation_tokens)["bits_per_byte"])]
        book = Logbook(folder, 0, tensorboard=False, wandb=False, config={})
        with Progress(chosen.steps, 0, chosen.steps) as progress:
            trainer.fit(book, stop, progress)
        book.close()
        if stop.received is not None:
            raise KeyboardInterrupt
    seen = [line for line in records(folder) if line["split"] == "validation"]
    points += [(after + line["tokens"], line["bits_per_byte"]) for line in seen]
    points.append((after + trainer.tokens, trainer.validate(chosen.validation_tokens)["bits_per_byte"]))
    return points, str(trainer.last_good)


def needed(points: Curve, begin: float, end: float, part: float) -> int | None:
    """The tokens at which so much of the gap from `begin` to `end` is closed; None where it is not."""
    return next((tokens for tokens, bits in points if bits <= begin - part * (begin - end)), None)


def table(found: list[dict], layouts: dict[str, dict]) -> list[tuple]:
    head = ["hybrid", "way", "bits at the start", "at the end", "of the Transformer", "gap closed"]
    rows = [(*head, *(f"{part:.0%} after, of its tokens" for part in CLOSED))]
    for name in layouts:
        for way in WAYS:
            curves, begins = (
                [x["curves"][name][way] for x in found],
                [x["curves"][name]["distilled"][0][1] for x in found],
            )
            ends = [x["bits"] for x in found]
            closed = [(b - c[-1][1]) / (b - e) for c, b, e in zip(curves, begins, ends, strict=True)]
            shares = []
            for part in CLOSED:
                tokens = [needed(c, b, e, part) for c, b, e in zip(curves, begins, ends, strict=True)]
                there = all(x is not None for x in tokens)
                shares.append(
                    spread([x / y["tokens"] for x, y in zip(tokens, found, strict=True)]) + " %" if there else "no"
                )
            bits = (spread([c[i][1] for c in curves], 3, 1.0) for i in (0, -1))
            rows.append((name, way, *bits, spread(ends, 3, 1.0), spread(closed) + " %", *shares))
    return rows


def draw(figure, found: list[dict], layouts: dict[str, dict]) -> None:
    for axes, name in zip(figure.subplots(1, len(layouts), sharey=True, squeeze=False)[0], layouts, strict=True):
        for way, colour in zip(WAYS, ("tab:blue", "tab:orange", "tab:gray"), strict=True):
            for i, result in enumerate(found):
                points = result["curves"][name][way]
                x = [100 * tokens / result["tokens"] for tokens, _ in points]
                axes.plot(x, [bits for _, bits in points], color=colour, label=None if i else way, linewidth=1.4)
        end = mean([x["bits"] for x in found])
        axes.axhline(end, color="black", linestyle="--", linewidth=1, label=f"the Transformer ({end:.2f})")
        axes.set(title=name, xlabel="tokens, % of the Transformer's")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="bits per byte, held-out files")
    figure.axes[0].legend()


if __name__ == "__main__":
    main()
