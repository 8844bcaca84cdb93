"""The calls that stand for an op's shape classes: what is compiled without a GPU, tuned on one, and counted for bytes.

An op with Triton kernels has a `gpu.py`, and where it decodes in place a `step.py`, with

    def examples(make) -> Iterator[tuple[str, Callable[[], object]]]

which yields names and calls that start every kernel of the op in every shape class of its tables. Its tensors come from
`make(shape, dtype)`, and the calls are to the plain functions that start kernels, since torch would run the fake of a
custom op on the meta device.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

import torch
from torch import Tensor

from seqzoo.kernels.gpu.tables import KERNELS

FILES = ("gpu", "step")


def ops() -> list[str]:
    """The folders that have Triton kernels."""
    return sorted({path.parent.name for file in FILES for path in KERNELS.glob(f"*/{file}.py")})


def on_meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def drawn(device: torch.device) -> Callable[[Sequence[int], torch.dtype], Tensor]:
    """Tensors with numbers of about 1 / sqrt(width): small enough for any op; whole numbers are 0, bools False."""

    def make(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(*shape, dtype=dtype, device=device)
        return (torch.rand(*shape, device=device) - 0.5).mul_(shape[-1] ** -0.5 if shape else 1.0).to(dtype)

    return make


def examples(op: str, make: Callable[[Sequence[int], torch.dtype], Tensor]) -> Iterator[tuple[str, Callable]]:
    """Those of one op."""
    for file in FILES:
        if (KERNELS / op / f"{file}.py").exists():
            yield from import_module(f"seqzoo.kernels.{op}.{file}").examples(make)
