"""Qwen3.5, dense, the text model alone: the rows and the config, both ways.

Its turns know places in pictures; for text they are ordinary ones. Source: transformers' Qwen3_5ForCausalLM.
"""

from transformers import Qwen3_5TextConfig

from seqzoo.models.convert.qwen3_hybrid import KEPT, Hybrid, flat_rows  # noqa: F401

HYBRID = Hybrid(
    "Qwen3.5",
    Qwen3_5TextConfig,
    "Qwen3_5ForCausalLM",
    flat_rows,
    is_sparse=lambda c, i: False,
    renormalise=lambda c: True,
    of_sparse=lambda sparse: {},
)
to_ours, to_theirs, rows = HYBRID.to_ours, HYBRID.to_theirs, HYBRID.rows
