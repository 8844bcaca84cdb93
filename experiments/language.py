"""Every tiny model of the zoo on the same text: what it learns of it, how fast, and what it keeps to go on.

    python -m seqzoo.experiments.language

The runs are `seqzoo-train`'s own, one thread each, alike but for the model (and what `overrides` says).
"""

import tempfile
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path

import hydra
from omegaconf import DictConfig

from seqzoo.experiments.report import CONFIGS, Report, by_model, lines, mean, settings, spread
from seqzoo.experiments.runs import compose_run
from seqzoo.models.cost import cost
from seqzoo.train import model_config, train
from seqzoo.training.stopping import StopRequest


@hydra.main(config_path=CONFIGS, config_name="language", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg, names(cfg.patterns))
    report = Report("language", given)
    cells = {
        f"{name}/{seed}": dict(
            overrides=[f"model={name}", *given["train"], *given["overrides"].get(name, [])],
            seed=seed,
            contexts=given["contexts"],
        )
        for name in given["models"]
        for seed in given["seeds"]
    }
    found = by_model(report.run(cell, cells), given["models"])
    report.save(
        "Tiny models on Python's standard library, bytes",
        [table(found, given["contexts"])],
        lambda figure: draw(figure, found, given["contexts"]),
        note=(
            f"Each: `seqzoo-train model=NAME {' '.join(given['train'])}`. Validation on held-out files; tokens/s: of "
            "training, one thread; state: what decoding keeps after so many tokens, bf16 where it is not fp32 by "
            "definition. Overrides of single models: "
            + ("; ".join(f"{name}: {' '.join(options)}" for name, options in given["overrides"].items()) or "none")
            + "."
        ),
    )
    return report


def names(patterns: list[str]) -> dict[str, None]:
    """The zoo's model configs that fit one of the patterns. Raises ValueError where one fits none."""
    known = sorted(Path(path.name).stem for path in files("seqzoo.configs").joinpath("model").iterdir())
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            raise ValueError(f"patterns: expected some that fit names of {known}, got {pattern!r}")
    return {name: None for name in known if any(fnmatch(name, pattern) for pattern in patterns)}


def cell(*, overrides: list[str], seed: int, contexts: list[int]) -> dict:
    """One run of seqzoo-train -> what its closing record says, and the state after each number of tokens."""
    cfg = compose_run([*overrides, f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        record = train(cfg, Path(folder), stop)
    if not record:
        raise KeyboardInterrupt
    kept = ("bits_per_byte", "xz_bits_per_byte", "tokens", "seconds", "parameters", "active_parameters")
    state = {tokens: cost(model_config(cfg), context=tokens).state_bytes for tokens in contexts}
    return dict(**{name: record[name] for name in kept}, state_bytes=state)


def table(found: dict[str, list[dict]], contexts: list[int]) -> list[tuple]:
    head = ["model", "bits per byte", "tokens/s", "parameters", "active"]
    rows = [(*head, *(f"state at {tokens:,}, bytes" for tokens in contexts))]
    for model, results in sorted(found.items(), key=lambda item: _bits(item[1])):
        first, speeds = results[0], [r["tokens"] / r["seconds"] for r in results]
        sizes = (f"{first[name]:,}" for name in ("parameters", "active_parameters"))
        state = (f"{first['state_bytes'][str(tokens)]:,}" for tokens in contexts)
        rows.append(
            (model, spread([r["bits_per_byte"] for r in results], 3, 1.0), spread(speeds, 0, 1.0), *sizes, *state)
        )
    return rows


def draw(figure, found: dict[str, list[dict]], contexts: list[int]) -> None:
    by_speed, by_state = figure.subplots(1, 2, sharey=True)
    for (model, results), style in zip(found.items(), lines(), strict=False):
        speed = mean([r["tokens"] / r["seconds"] for r in results])
        for axes, x in ((by_speed, speed), (by_state, results[0]["state_bytes"][str(max(contexts))])):
            axes.plot(x, _bits(results), **style)
            axes.annotate(model, (x, _bits(results)), xytext=(4, 4), textcoords="offset points", fontsize=7)
    xz = next(iter(found.values()))[0]["xz_bits_per_byte"]
    by_speed.set(xlabel="tokens/s in training, one thread", ylabel="bits per byte, held-out files")
    by_state.set(xlabel=f"state after {max(contexts):,} tokens [bytes]", xscale="log")
    for axes in (by_speed, by_state):
        axes.axhline(xz, color="tab:gray", linestyle="--", linewidth=1, label=f"xz -9 on the same bytes ({xz:.3f})")
        axes.margins(x=0.2)
        axes.grid(alpha=0.3)
    by_speed.legend(fontsize=7)


def _bits(results: list[dict]) -> float:
    return mean([r["bits_per_byte"] for r in results])


if __name__ == "__main__":
    main()
