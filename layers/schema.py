"""The signature is the schema: a part's arguments are of the types that it writes beside them."""

import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping",
    NoneType: "null",
}  # fmt: skip


def check_types(what: str, function: Callable, given: Mapping[str, Any]) -> None:
    """Those of `given` that the function has, by its annotations; what is inside a list or a mapping, it checks itself.

    Raises:
        ValueError: the first that is of another type: what, the argument, what was expected and what came.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        wanted = parameter.annotation
        kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
        kinds = [get_origin(kind) or kind for kind in kinds]
        if name in given and all(kind in WORDS for kind in kinds) and not _is_one(given[name], kinds):
            expected = " or ".join(WORDS[kind] for kind in kinds)
            raise ValueError(f"{what}: {name}: expected {expected}, got {given[name]!r}")


def _is_one(x: Any, kinds: list[type]) -> bool:
    """A whole number is a number; true and false are none."""
    if isinstance(x, bool):
        return bool in kinds
    return isinstance(x, tuple(kinds)) or (float in kinds and isinstance(x, int))
