"""Qwen3.5 with experts, as released with vision: its text part, both ways; the rest is kept for the way back.

Source: transformers' Qwen3_5MoeForConditionalGeneration.
"""

from transformers import Qwen3_5MoeConfig

from seqzoo.models.convert.qwen3_5_moe_text import HYBRID
from seqzoo.models.convert.qwen3_hybrid import KEPT, Seeing  # noqa: F401

SEEING = Seeing(HYBRID, Qwen3_5MoeConfig, "Qwen3_5MoeForConditionalGeneration")
to_ours, to_theirs, rows, added = SEEING.to_ours, SEEING.to_theirs, SEEING.rows, SEEING.added
