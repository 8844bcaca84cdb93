"""Momentum DeltaNet from attention: as `gated_deltanet`, whose tensors it has."""

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import options, out_bias, refuse
from seqzoo.models.convert.adopt.gated_deltanet import fresh, rows, sizes  # noqa: F401


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: attention with an output gate."""
    refuse("momentum_deltanet", attention, "output_gate")
    derived = sizes(attention) | dict(bias=attention["bias"], out_bias=out_bias(attention))
    return options("momentum_deltanet", wanted, derived)
