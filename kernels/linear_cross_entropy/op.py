"""linear_cross_entropy: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from seqzoo.kernels.checks import check_tensors
from seqzoo.kernels.dispatch import choose, readable
from seqzoo.kernels.linear_cross_entropy.chunked import linear_cross_entropy_chunked
from seqzoo.kernels.linear_cross_entropy.reference import IGNORED, linear_cross_entropy_reference

BACKENDS = {"reference": linear_cross_entropy_reference, "torch": linear_cross_entropy_chunked}


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], labels: Int64[Tensor, " N"]
) -> Float[Tensor, ""]:
    """The cross-entropy of a linear head, summed over tokens, without all their logits. Definition: `reference.py`.

    Args:
        hidden: what the head is given.
        weight: the head's, a row per token of the vocabulary, in hidden's dtype (any under autocast).
        labels: the token to be predicted; -100 where there is none.

    Returns:
        Nats, in fp32 (fp64 where hidden is). Logits are rounded as `linear` rounds them, all after them is in fp32. Its
        backward pass can be run once only.

    Raises:
        ValueError: shapes or dtypes that do not agree, labels outside the vocabulary (on a CPU), or a forced backend
            that this op lacks.
    """
    _check(hidden, weight, labels)
    return BACKENDS[choose(BACKENDS, tokens=2, device=hidden.device)](hidden, weight, labels)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    op, shape = "linear_cross_entropy", hidden.shape
    if hidden.ndim != 2 or weight.ndim != 2 or not len(weight):
        raise ValueError(f"{op}: expected hidden [N, D] and weight [V, D], got {[*shape]} and {[*weight.shape]}")
    check_tensors(
        op,
        dict(hidden=(hidden, shape), weight=(weight, (len(weight), shape[1])), labels=(labels, shape[:1])),
        like="hidden",
        kinds=dict(labels=torch.int64),
    )
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"{op}: weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if readable(labels):  # on a GPU the look would wait for all that is under way
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= len(weight)))]
        if len(wrong):
            raise ValueError(f"{op}: labels: expected 0 to {len(weight) - 1} or {IGNORED}, got {wrong[0].item()}")
