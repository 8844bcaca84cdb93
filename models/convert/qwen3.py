"""Qwen3, dense: the rows and the config, both ways. Heads of q and k are normed; windows by `layer_types`.

Source: arXiv 2505.09388 and transformers' Qwen3ForCausalLM.
"""

from transformers import Qwen3Config

from seqzoo.models.convert.plain import KEPT, Family, by_layer_types, of_layer_types  # noqa: F401

FAMILY = Family(
    "Qwen3",
    Qwen3Config,
    "Qwen3ForCausalLM",
    qk_norm="rms",
    windows=by_layer_types,
    biases=lambda c: (c.attention_bias, c.attention_bias),
    of_windows=of_layer_types,
    of_biases=lambda qkv, out: dict(attention_bias=qkv),
)
to_ours, to_theirs, rows = FAMILY.to_ours, FAMILY.to_theirs, FAMILY.rows
