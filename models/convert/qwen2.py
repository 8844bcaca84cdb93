"""Qwen2 and Qwen2.5, dense: the rows and the config, both ways. Biases on q, k and v; windows by `layer_types`.

Source: arXiv 2407.10671, 2412.15115 and transformers' Qwen2ForCausalLM.
"""

from transformers import Qwen2Config

from seqzoo.models.convert.plain import KEPT, Family, by_layer_types, of_layer_types  # noqa: F401

FAMILY = Family(
    "Qwen2",
    Qwen2Config,
    "Qwen2ForCausalLM",
    windows=by_layer_types,
    biases=lambda c: (True, False),
    of_windows=of_layer_types,
)
to_ours, to_theirs, rows = FAMILY.to_ours, FAMILY.to_theirs, FAMILY.rows
