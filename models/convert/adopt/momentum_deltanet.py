"""Momentum DeltaNet from attention: as `gated_deltanet`, whose tensors it has; it has no place for biases."""

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import options, refuse
from seqzoo.models.convert.adopt.gated_deltanet import fresh, rows, sizes  # noqa: F401


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: attention with biases or an output gate."""
    refuse("momentum_deltanet", attention, "output_gate", "bias", "out_bias")
    return options("momentum_deltanet", wanted, sizes(attention))
