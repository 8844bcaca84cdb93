"""Qwen3.5 with experts, the text model alone: the rows and the config, both ways.

As `qwen3_5_text`; every layer has experts, whose weights always sum to 1. Source: transformers' Qwen3_5MoeForCausalLM.
"""

from transformers import Qwen3_5MoeTextConfig

from seqzoo.models.convert.qwen3_hybrid import KEPT, Hybrid, flat_rows  # noqa: F401

HYBRID = Hybrid(
    "Qwen3.5-MoE",
    Qwen3_5MoeTextConfig,
    "Qwen3_5MoeForCausalLM",
    flat_rows,
    is_sparse=lambda c, i: True,
    renormalise=lambda c: True,
    of_sparse=lambda sparse: {},
)
to_ours, to_theirs, rows = HYBRID.to_ours, HYBRID.to_theirs, HYBRID.rows
