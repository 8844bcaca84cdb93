"""Adaptive spikes at the input of a model's projections, by its config, and a report of how they fire.

Source: SpikingBrain, arXiv 2509.05276, which spikes the input of every linear projection; its released forward leaves
out the MLPs' down projections and the head. Here that is `skip: [down_proj]`, and `head: false`, the default.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.layers.spike import AdaptiveSpike, FiringStatistics, spike_counts
from seqzoo.layers.spike_linear import SpikingLinear, W8ASpike, W8ASpikeStack
from seqzoo.models.projections import options, projections, refuse_own

FIRE = AdaptiveSpike, W8ASpike, W8ASpikeStack  # whose input is counted, with their k


class Spikes(NamedTuple):
    """The options of `spikes` in a model's config."""

    k: float = 3.0  # mean absolute value over threshold, as in AdaptiveSpike
    through_threshold: bool = False  # the gradient sees that the threshold moves
    head: bool = False  # the head's input too
    skip: list[str] = []  # regular expressions: projections in whose name one is found are left as they are


def spikes_spec(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """With every default written out. Raises ValueError: `projections.options`."""
    return None if given is None else options(Spikes, given, "spikes")


def add_spikes(model: nn.Module, spec: dict[str, Any]) -> None:
    """Put spikes where a complete spec says. Parameters and their names stay what they are.

    Raises:
        ValueError: a pattern in `skip` that is found nowhere, or a part with matrices of its own that cannot spike.
    """
    for projection in projections(model, head=spec["head"], skip=spec["skip"], what="spikes"):
        spike = AdaptiveSpike(spec["k"], spec["through_threshold"])
        if projection.linear is not None:
            setattr(projection.parent, projection.attribute, SpikingLinear(projection.linear, spike))
            continue
        places = getattr(type(projection.parent), "SPIKES", {})
        if projection.attribute not in places:
            refuse_own(projection, "spikes")
        setattr(projection.parent, places[projection.attribute], spike)


@torch.no_grad()
def spike_report(model: nn.Module, batch: Tensor | dict[str, Any], *, window: int = 3) -> list[dict[str, Any]]:
    """How a model's layers fire on a batch, a row per layer in the model's order, ready for JSON; see `table`.

    Args:
        model: left as it was.
        batch: token ids [B, T], or what the model's forward takes.
        window: steps that sparsity is counted over.

    Returns:
        name (of the module, from the model's root), and the numbers of `FiringStatistics.summary`. An expert's layer
        is counted over all experts.

    Raises:
        ValueError: a model without spikes, a batch with padding (it would be counted as silent), a window of no
            steps, activations that are NaN or infinite.
    """
    inputs = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
    mask = inputs.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("spike_report: attention_mask: expected no padding, got some")
    firing = {name: module for name, module in model.named_modules() if isinstance(module, FIRE)}
    if not firing:
        raise ValueError("spike_report: expected a model with spikes, got one without")
    statistics = {name: FiringStatistics(window) for name in firing}

    def listen(name: str, k: float):
        return lambda module, args: statistics[name].add(spike_counts(args[0], k=k)[0])

    handles = [module.register_forward_pre_hook(listen(name, module.k)) for name, module in firing.items()]
    try:
        model(**{"use_cache": False, **inputs})
    finally:
        for handle in handles:
            handle.remove()
    return [{"name": name.removesuffix(".spike"), **heard.summary()} for name, heard in statistics.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """A report as text: a line per layer, under a line of headings."""
    cells = [list(rows[0])] + [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = lambda row: "  ".join(
        [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]
    )
    return "\n".join(line(row) for row in cells)
