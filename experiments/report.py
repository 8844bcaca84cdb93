"""What an experiment leaves: NAME.json, its cells; NAME.md, a table; NAME.png, a picture."""

from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from seqzoo.benchmarks.timing import machine
from seqzoo.experiments.cells import add_facts, run_cells
from seqzoo.train import plain

CONFIGS = str(Path(__file__).parent / "configs")
RESULTS = Path(__file__).parent / "results"


def settings(cfg: DictConfig, models: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration in plain containers; with `smoke=true`, with what its `small` says put over it.

    `models`: where the configuration does not list them.

    Raises:
        ValueError: `only` names no model, or there are no seeds.
    """
    given = plain(OmegaConf.merge(cfg, cfg.small) if cfg.smoke else cfg)
    models = given["models"] if models is None else models
    only = given["only"] or list(models)
    for name in only:
        if name not in models:
            raise ValueError(f"only: expected names of {list(models)}, got {name!r}")
    if not given["seeds"]:
        raise ValueError("seeds: expected at least one, got none")
    return {**given, "models": {name: models[name] for name in only}}


class Report:
    """Args:
    name: of the experiment, its module and its files.
    given: what `settings` returned.
    """

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.name, self.given = name, given
        self.folder = Path(given["out"]) if given["out"] else RESULTS
        self.json = self.folder / f"{name}.json"

    def run(self, function: Callable[..., dict], cells: dict[str, dict]) -> dict[str, dict]:
        """The cells' results, by name."""
        return run_cells(
            function, cells, self.json, workers=self.given["workers"], keep_others=bool(self.given["only"])
        )

    def save(self, title: str, tables: list[list[tuple]], draw: Callable[[Any], None], *, note: str) -> None:
        """Write all three.

        Args:
            title: one line.
            tables: each a row of headings, then rows; numbers with the digits they are to have.
            draw: draws on a new matplotlib Figure.
            note: how to read the tables.
        """
        facts = self._facts()
        add_facts(self.json, facts)
        head = [f"# {title}", "", f"`{facts['command']}`; seeds {facts['seeds']}; {facts['machine']}; {facts['date']}"]
        text = "\n".join([*head, "", note, "", *("\n".join([*markdown(table), ""]) for table in tables)])
        (self.folder / f"{self.name}.md").write_text(text)
        _picture(self.folder / f"{self.name}.png", draw)
        print(text)

    def _facts(self) -> dict[str, Any]:
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        command = " ".join([f"python -m seqzoo.experiments.{self.name}", *overrides])
        threads = f"{self.given['workers']} processes of one thread" if self.given["workers"] else "one process"
        where = f"{threads} on {machine()}"
        return dict(command=command, seeds=self.given["seeds"], machine=where, date=str(date.today()))


def markdown(rows: list[tuple]) -> list[str]:
    """Lines of a table: the first row is its headings."""
    line = lambda row: "| " + " | ".join(map(str, row)) + " |"
    return [line(rows[0]), "|" + "---|" * len(rows[0]), *map(line, rows[1:])]


def spread(values: list[float], digits: int = 1, scale: float = 100.0) -> str:
    """Mean (lowest-highest), in percent where not said otherwise."""
    values = [scale * value for value in values]
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def compare(at: dict[str, list[float]], claims: Iterable[tuple[str, str]]) -> list[tuple]:
    """Table of the claims [better, worse] whose models are there, seed by seed; `at`: each model's accuracies."""
    rows = [("expected", "difference", "holds at")]
    for better, worse in claims:
        if better in at and worse in at:
            gaps = [a - b for a, b in zip(at[better], at[worse], strict=True)]
            held = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} seeds"
            rows.append((f"{better} > {worse}", spread(gaps), held))
    return rows


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def cells_of(given: dict[str, Any]) -> dict[str, dict]:
    """Every model with every seed, called model/seed, where models are what makes one `Probe` another."""
    shared = {name: given[name] for name in ("task", "training")}
    return {
        f"{name}/{seed}": dict(model={**given["probe"], **model}, seed=seed, **shared)
        for name, model in given["models"].items()
        for seed in given["seeds"]
    }


def by_model(results: dict[str, dict], models: dict[str, Any]) -> dict[str, list[dict]]:
    """The seeds' results of each model; a cell is called model/seed."""
    return {model: [found for name, found in results.items() if name.rpartition("/")[0] == model] for model in models}


def same_start(seed: int) -> torch.Generator:
    """The generator of a run's data; its weights are drawn from torch's own, which starts from the seed too."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def _picture(path: Path, draw: Callable[[Any], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    draw(figure)
    figure.savefig(path)


def lines() -> list[dict[str, Any]]:
    """Styles of many curves that can be told apart."""
    from matplotlib import colormaps

    colours = [colormaps["tab20"](i % 20) for i in range(40)]
    return [dict(color=c, marker="osv^D*"[i % 6], markersize=5, linewidth=1.3) for i, c in enumerate(colours)]
