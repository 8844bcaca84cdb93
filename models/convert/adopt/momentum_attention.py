"""Momentum attention from attention: the same projections; only the shear is new (arXiv 2602.04902)."""

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import copied
from seqzoo.models.convert.plain import Table


def complete(attention: Spec, wanted: Spec) -> Spec:
    return {**attention, **wanted}


def rows(attention: Spec, spec: Spec) -> Table:
    return copied(attention)
