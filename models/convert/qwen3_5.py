"""Qwen3.5, dense, as released with vision: its text part, both ways; the rest is kept for the way back.

Source: transformers' Qwen3_5ForConditionalGeneration.
"""

from transformers import Qwen3_5Config

from seqzoo.models.convert.qwen3_5_text import HYBRID
from seqzoo.models.convert.qwen3_hybrid import KEPT, Seeing  # noqa: F401

SEEING = Seeing(HYBRID, Qwen3_5Config, "Qwen3_5ForConditionalGeneration")
to_ours, to_theirs, rows, added = SEEING.to_ours, SEEING.to_theirs, SEEING.rows, SEEING.added
