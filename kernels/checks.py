"""What every op checks of the tensors it is given."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

KINDS = {"starts": torch.bool, "valid": torch.bool, "passed": torch.bool}  # by an argument's name; others are floating


def check_tensors(
    op: str,
    expected: Mapping[str, tuple[Tensor | None, Sequence[int]]],
    *,
    like: str,
    kinds: Mapping[str, torch.dtype] = KINDS,
) -> None:
    """Shapes, devices and dtypes of an op's arguments.

    Args:
        op: its name, for messages.
        expected: argument -> what came (None is left out) and the shape it should have.
        like: the argument whose device all others must be on.
        kinds: argument -> its dtype, where that is not any floating one.

    Raises:
        ValueError: the first that does not fit: the op, the argument, what was expected and what came.
    """
    device = expected[like][0].device
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        if x.shape != tuple(shape):
            raise ValueError(f"{op}: {name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{op}: {name}: expected {like}'s device {device}, got {x.device}")
        kind = kinds.get(name)
        if x.dtype != kind and (kind or not x.is_floating_point()):
            words = "bool" if kind is torch.bool else kind or "a floating dtype"
            raise ValueError(f"{op}: {name}: expected {words}, got {x.dtype}")
