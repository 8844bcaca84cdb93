"""Activations that are computed again on the way back instead of kept: all of a block's, or all but its products'.

Selective: what matrix products, attention and the zoo's registered kernels give is kept, everything between them
(norms, gates, activations, turns) is computed again. It costs hardly any products, and forgets most tensors of a block.
Source: Chen et al. 2016, arXiv 1604.06174; selective, Korthikanti et al. 2022, arXiv 2205.05198, section 5.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.stack import Stack

SELECTIVE = "selective"
KEPT = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_grouped_mm"}
ATTENTION = "aten::_scaled_dot_product"  # how the names of its kernels begin


def compute_again(model: SeqZooForCausalLM, how: bool | str) -> None:
    """In training from now on: True, SELECTIVE, or False."""
    if how is False:
        return
    # transformers renamed it on the way to 6
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if how == SELECTIVE:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        for part in model.modules():
            if isinstance(part, Stack):
                part._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _policy(ctx: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition(".")[0]
    kept = name in KEPT or name.startswith((ATTENTION, "seqzoo::"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
