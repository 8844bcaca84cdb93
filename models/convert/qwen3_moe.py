"""Qwen3-MoE: Qwen3 with experts, none of them shared: the rows and the config, both ways.

A window holds for all layers or for none. Source: arXiv 2505.09388 and transformers' Qwen3MoeForCausalLM.
"""

from transformers import Qwen3MoeConfig

from seqzoo.models.convert.plain import KEPT, Family  # noqa: F401

FAMILY = Family(
    "Qwen3-MoE",
    Qwen3MoeConfig,
    "Qwen3MoeForCausalLM",
    qk_norm="rms",
    windows=lambda c: [c.sliding_window] * c.num_hidden_layers,
    biases=lambda c: (c.attention_bias, c.attention_bias),
    of_windows=lambda windows: dict(use_sliding_window=windows[0] is not None, sliding_window=windows[0]),
    of_biases=lambda qkv, out: dict(attention_bias=qkv),
)
to_ours, to_theirs, rows = FAMILY.to_ours, FAMILY.to_theirs, FAMILY.rows
