"""Mistral: the rows and the config, both ways. A window holds for all layers or for none.

Source: arXiv 2310.06825 and transformers' MistralForCausalLM.
"""

from typing import Any

from transformers import MistralConfig

from seqzoo.models.convert.plain import KEPT, Family  # noqa: F401


def _windows(c: Any) -> list[int | None]:
    """Raises ValueError: `layer_types` that say otherwise, which is another architecture's, Ministral's."""
    every = "full_attention" if c.sliding_window is None else "sliding_attention"
    if other := set(getattr(c, "layer_types", None) or ()) - {every}:
        raise ValueError(f"config.json: layer_types: expected {every} alone, got {sorted(map(str, other))}")
    return [c.sliding_window] * c.num_hidden_layers


FAMILY = Family(
    "Mistral",
    MistralConfig,
    "MistralForCausalLM",
    windows=_windows,
    of_windows=lambda windows: dict(sliding_window=windows[0]),
)
to_ours, to_theirs, rows = FAMILY.to_ours, FAMILY.to_theirs, FAMILY.rows
