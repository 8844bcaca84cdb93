"""Mistral: the rows and the config, both ways. A window holds for all layers or for none.

Source: arXiv 2310.06825 and transformers' MistralForCausalLM.
"""

from transformers import MistralConfig

from seqzoo.models.convert.plain import KEPT, Family  # noqa: F401

FAMILY = Family(
    "Mistral",
    MistralConfig,
    "MistralForCausalLM",
    windows=lambda c: [c.sliding_window] * c.num_hidden_layers,
    of_windows=lambda windows: dict(sliding_window=windows[0]),
)
to_ours, to_theirs, rows = FAMILY.to_ours, FAMILY.to_theirs, FAMILY.rows
