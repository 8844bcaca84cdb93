"""Attention from attention: all as it was, with a window, or without one. Exact for what fits the window."""

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import copied
from seqzoo.models.convert.plain import Table


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: other options than a window and the turns."""
    allowed = {"kind", "window", "rope_theta", "rope_scaling"}
    if not set(wanted) <= allowed:
        raise ValueError(f"attention: expected options of {sorted(allowed)}, got {sorted(set(wanted) - allowed)}")
    return {**attention, **wanted}


def rows(attention: Spec, spec: Spec) -> Table:
    return copied(attention)
