"""The cross-entropy of a model's head, without all its logits where the head is nothing but a matrix."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from seqzoo.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from seqzoo.layers.linear import Linear

PLAIN = (Tensor, Parameter)  # a subclass keeps its numbers in its own way


def targets_of(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """[B, T] the token to be predicted at each place, IGNORED where none is. Arguments: `SeqZooForCausalLM`."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shift_labels is None else shift_labels


def cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Nats, summed over the targets that are not IGNORED.

    Args:
        head: what makes logits of hidden states. One that does more than multiply is called, and its logits are whole.
        hidden: [B, T, D].
        targets: [B, T] int64.

    Raises:
        ValueError: shapes that do not agree, or targets outside the vocabulary (on a CPU).
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    if _is_matrix(head):
        return linear_cross_entropy(hidden, head.weight, targets)
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")


def _is_matrix(head: nn.Module) -> bool:
    """Whether calling it is a product with its weight, as it stands here: whole, and nobody listens."""
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    watched = any(hooks) or "forward" in vars(head)  # the latter is how accelerate moves weights
    return type(head) is Linear and head.bias is None and type(head.weight) in PLAIN and not watched
