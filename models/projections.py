"""The projections of a model, found by name: what spikes and int8 weights are put in."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from seqzoo.layers.conv import CausalConv


class Projection(NamedTuple):
    """A linear layer, where it hangs, or a matrix that a part holds itself, as a mixture its experts'."""

    name: str  # from the model's root
    parent: nn.Module
    attribute: str
    linear: nn.Linear | None  # None for a part's own


def projections(model: nn.Module, *, head: bool, skip: list[str], what: str) -> list[Projection]:
    """All in the stack, and the head where asked for, but those whose name a pattern of `skip` is found in.

    Raises:
        ValueError: a pattern that is found in none; the message begins with `what`.
    """
    found = [p for name, module in model.stack.named_modules(prefix="stack") for p in _of(name, module)]
    if head:
        found.append(Projection("lm_head", model, "lm_head", model.lm_head))
    for pattern in skip:
        if not any(re.search(pattern, p.name) for p in found):
            names = ", ".join(p.name for p in found[:8])
            raise ValueError(f"{what}: skip: expected a pattern that is found in a projection's name, got {pattern!r}; "
                             f"there are {names}{', ...' if len(found) > 8 else ''}")  # fmt: skip
    return [p for p in found if not any(re.search(pattern, p.name) for pattern in skip)]


def _of(name: str, module: nn.Module) -> Iterator[Projection]:
    for attribute, child in module.named_children():
        if isinstance(child, nn.Linear):
            yield Projection(f"{name}.{attribute}", module, attribute, child)
    if not isinstance(module, nn.Linear | nn.Embedding | CausalConv):
        for attribute, own in module.named_parameters(recurse=False):
            if own.ndim > 1:
                yield Projection(f"{name}.{attribute}", module, attribute, None)


def refuse_own(projection: Projection, what: str) -> None:
    """Raises ValueError: a part holds a matrix itself, and has no way to do `what` to it."""
    part = type(projection.parent).__name__
    raise ValueError(
        f"{what}: {projection.name}: expected a linear layer, got a matrix that {part} holds itself and cannot do this "
        "with; name it in skip to leave it as it is"
    )


def options(schema: type[NamedTuple], given: dict[str, Any], what: str) -> dict[str, Any]:
    """`given`, checked, with every default written out. `schema`: has `k`, `head` and `skip`, and may have `group`.

    Raises:
        ValueError: an unknown key, or a value out of its range.
    """
    if not isinstance(given, dict) or set(given) - set(schema._fields):
        keys = sorted(set(given) - set(schema._fields)) if isinstance(given, dict) else given
        raise ValueError(f"{what}: expected keys of {list(schema._fields)}, got {keys!r}")
    full = schema(**given)._asdict()
    for name, default in schema._field_defaults.items():
        if isinstance(default, bool) and not isinstance(full[name], bool):
            raise ValueError(f"{what}: {name}: expected true or false, got {full[name]!r}")
    k = full["k"]
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k < float("inf"):
        raise ValueError(f"{what}: k: expected a positive number, got {k!r}")
    return full | {"k": float(k), "skip": _patterns(full["skip"], what)}


def _patterns(skip: Any, what: str) -> list[str]:
    if not isinstance(skip, list | tuple) or not all(isinstance(pattern, str) for pattern in skip):
        raise ValueError(f"{what}: skip: expected a list of regular expressions, got {skip!r}")
    for pattern in skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{what}: skip: expected a regular expression, got {pattern!r}: {error}") from None
    return list(skip)
