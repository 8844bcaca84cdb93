"""Parallel mixers from attention: every branch is made of all of it (arXiv 2509.05276 leaves sharing open)."""

from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import adopter, under
from seqzoo.models.convert.plain import Table


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: no branches, or what one of them refuses."""
    given = wanted.get("branches")
    if not isinstance(given, dict) or not all(isinstance(x, dict) and "kind" in x for x in given.values()):
        raise ValueError(f"parallel: branches: expected name -> {{kind: ..., **options}}, got {given!r}")
    branches = {
        name: dict(adopter(branch["kind"]).complete(attention, branch), kind=branch["kind"])
        for name, branch in wanted["branches"].items()
    }
    return {**wanted, "branches": branches}


def rows(attention: Spec, spec: Spec) -> Table:
    return [
        row
        for name, branch in spec["branches"].items()
        for row in under(f"branches.{name}.", adopter(branch["kind"]).rows(attention, branch))
    ]


def fresh(spec: Spec) -> dict[str, Tensor]:
    return {
        f"branches.{name}.{own}": value
        for name, branch in spec["branches"].items()
        for own, value in getattr(adopter(branch["kind"]), "fresh", lambda _: {})(branch).items()
    }
