"""Does a monotone feed-forward part make a language model harder to attack?

    python -m seqzoo.experiments.monotone

Cooper et al. 2026 (arXiv 2602.02686) report so of a summariser. Here: the same small transformer with SwiGLU and with
MonotoneMLP in every block, equally many parameters, the same real bytes, attacked at what it reads (`attacks.py`).
"""

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from seqzoo.experiments.attacks import Windows, blind, clean, fgsm, guided, noise, pgd, swaps
from seqzoo.experiments.report import CONFIGS, Report, by_model, lines, mean, settings, spread
from seqzoo.experiments.runs import trained
from seqzoo.training.trainer import Trainer

Losses = dict[str, dict[str, float]]  # attack -> how much of it -> bits per byte
EMBEDDINGS, SWAPS = ("noise", "fgsm", "pgd"), ("chance", "blind", "guided")


@hydra.main(config_path=CONFIGS, config_name="monotone", version_base=None)
def main(cfg: DictConfig) -> None:
    run(cfg)


def run(cfg: DictConfig) -> Report:
    """All cells, then table, JSON and picture. Raises ValueError where the configuration cannot be."""
    given = settings(cfg)
    windows, attacks = given["windows"], given["attacks"]
    for name, numbers in {**windows, **attacks}.items():
        if not numbers or min(numbers if isinstance(numbers, list) else [numbers]) <= 0:
            raise ValueError(f"{name}: expected numbers above 0, got {numbers}")
    report = Report("monotone", given)
    cells = {
        f"{name}/{seed}": dict(overrides=[*given["train"], *own], seed=seed, windows=windows, attacks=attacks)
        for name, own in given["models"].items()
        for seed in given["seeds"]
    }
    found = by_model(report.run(cell, cells), given["models"])
    own = "; ".join(f"{name}: {' '.join(options) or 'as it is'}" for name, options in given["models"].items())
    report.save(
        "Monotone feed-forward parts under attack, on Python's standard library, bytes",
        [
            clean_table(found),
            rise_table(found, EMBEDDINGS),
            rise_table(found, SWAPS),
            claims_table(found, given["claims"]),
        ],
        lambda figure: draw(figure, found),
        note=(
            f"Each: `seqzoo-train {' '.join(given['train'])}`. {own}. Attacked: {windows['count']} held-out windows of "
            f"{windows['tokens']} bytes; what is to be predicted stays the true text. First the loss, then by how much "
            "it rises, in bits per byte, mean (lowest-highest) over seeds, and in percent of the loss of the unchanged "
            "windows. noise, fgsm, pgd: every channel of every embedding is changed by up to so many times the "
            "embeddings' root mean square: up or down at random, once along the gradient, in "
            f"{attacks['pgd_steps']} steps. chance, blind, guided: so many bytes of a window are swapped, one after "
            f"the other: at random, or each the worst of {attacks['tries']}, drawn or proposed by the gradient. Last, "
            "the rises of one model over those of another: below 1, it is the tougher."
        ),
    )
    return report


def cell(*, overrides: list[str], seed: int, windows: dict, attacks: dict) -> dict:
    """One run, and what attacks on its model do."""
    trainer = trained([*overrides, f"seed={seed}"])
    model = trainer.model.eval().requires_grad_(False)
    held_out = windows_of(trainer, **windows)
    return dict(
        bits_per_byte=trainer.validate()["bits_per_byte"],
        parameters=sum(p.numel() for p in model.parameters()),
        clean=clean(model, held_out).mean().item(),
        attacked=attacked(model, held_out, torch.Generator().manual_seed(seed), **attacks),
    )


def windows_of(trainer: Trainer, *, count: int, tokens: int) -> Windows:
    """The beginnings of held-out rows, spread evenly over all."""
    length = trainer.settings.sequence_length
    rows = next(iter(trainer.validation.batches(count, count * length)))
    return Windows(*(x[:, :tokens] for x in (rows.input_ids, rows.position_ids, rows.shift_labels)))


def attacked(
    model: nn.Module,
    windows: Windows,
    generator: torch.Generator,
    *,
    sizes: list[float],
    pgd_steps: int,
    draws: int,
    counts: list[int],
    tries: int,
) -> Losses:
    """Bits per byte under each attack, the mean over windows."""
    by_size = dict(
        noise=lambda size: noise(model, windows, size, draws=draws, generator=generator),
        fgsm=lambda size: fgsm(model, windows, size),
        pgd=lambda size: pgd(model, windows, size, steps=pgd_steps, generator=generator),
    )
    found = {kind: {str(size): attack(size).mean().item() for size in sizes} for kind, attack in by_size.items()}
    chance = [swaps(model, windows, counts, blind(1, generator)) for _ in range(draws)]
    found["chance"] = {str(n): mean([drawn[n].mean().item() for drawn in chance]) for n in counts}
    for kind, propose in dict(blind=blind(tries, generator), guided=guided(tries)).items():
        after = swaps(model, windows, counts, propose)
        found[kind] = {str(n): after[n].mean().item() for n in counts}
    return found


def clean_table(found: dict[str, list[dict]]) -> list[tuple]:
    rows = [("model", "parameters", "bits per byte, all held-out text", "of the windows")]
    for model, results in found.items():
        bits = (spread([r[name] for r in results], 3, 1.0) for name in ("bits_per_byte", "clean"))
        rows.append((model, f"{results[0]['parameters']:,}", *bits))
    return rows


def rise_table(found: dict[str, list[dict]], kinds: tuple[str, ...]) -> list[tuple]:
    amounts = list(next(iter(found.values()))[0]["attacked"][kinds[0]])
    rows = [("rise of the loss", *amounts)]
    for kind in kinds:
        for model, results in found.items():
            cells = []
            for amount in amounts:
                rises = [rise(r, kind, amount) for r in results]
                share = mean([100 * up / r["clean"] for up, r in zip(rises, results, strict=True)])
                cells.append(f"{spread(rises, 3, 1.0)}; {share:.1f} %")
            rows.append((f"{kind}: {model}", *cells))
    return rows


def claims_table(found: dict[str, list[dict]], claims: list[list[str]]) -> list[tuple]:
    """Of each [tougher, weaker] that are there: at how many seeds, and by how much."""
    rows = [
        ("rise of a model over another's", "attack", "of it", "ratio", "lower at", "lower in percent of its loss at")
    ]
    for one, other in claims:
        if one not in found or other not in found:
            continue
        pairs = list(zip(found[one], found[other], strict=True))
        for kind, losses in found[one][0]["attacked"].items():
            for amount in losses if kind != "noise" else ():  # whose rises are too small to be divided by
                ups = [(rise(a, kind, amount), rise(b, kind, amount)) for a, b in pairs]
                shares = [(up / a["clean"], to / b["clean"]) for (up, to), (a, b) in zip(ups, pairs, strict=True)]
                held = (f"{sum(up < to for up, to in both)} of {len(both)} seeds" for both in (ups, shares))
                ratio = spread([up / to for up, to in ups], 2, 1.0)
                rows.append((f"{one} / {other}", kind, amount, ratio, *held))
    return rows


def draw(figure, found: dict[str, list[dict]]) -> None:
    for axes, kinds in zip(figure.subplots(1, 2), (EMBEDDINGS, SWAPS), strict=True):
        for (model, results), style in zip(found.items(), lines(), strict=False):
            for kind, dashes in zip(kinds, (":", "--", "-"), strict=True):
                amounts = list(results[0]["attacked"][kind])
                rises = [mean([rise(r, kind, amount) for r in results]) for amount in amounts]
                axes.plot([float(a) for a in amounts], rises, label=f"{model}: {kind}", **style, linestyle=dashes)
        axes.set(xscale="log", ylabel="rise of the loss [bits per byte]")
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(bottom=-0.001)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    embeddings, text = figure.axes
    embeddings.set_xlabel("change of the embeddings, over their root mean square")
    text.set_xlabel("bytes swapped in a window")


def rise(result: dict, kind: str, amount: str) -> float:
    return result["attacked"][kind][amount] - result["clean"]


if __name__ == "__main__":
    main()
