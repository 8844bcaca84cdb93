"""The Python side of small native ops over rows (`rows.h`): checked and called in a few microseconds."""

import ctypes
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from seqzoo.kernels.native.build import library, usable

DTYPES = (torch.float32, torch.bfloat16)


class RowOp:
    """One C++ source whose functions `<name>_forward` and `<name>_backward` take a pointer to one struct.

    Args:
        name: of the op, for its functions, its library and messages.
        source: the C++ file.
        layout: of the struct, as the `struct` module writes it; packing takes a quarter of the time that a ctypes
            structure does.
    """

    def __init__(self, name: str, source: Path, layout: str) -> None:
        self.name, self.source, self.call = name, source, Struct(layout)
        self._functions: dict[str, ctypes._CFuncPtr] = {}
        self._usable: bool | None = None

    def usable(self, x: Tensor) -> bool:
        """Whether it is for x: device and dtype, a compiler that works, and torch does not fuse by itself here."""
        if not x.is_cpu or x.dtype not in DTYPES or torch.compiler.is_compiling():
            return False
        if self._usable is None:
            self._usable = usable(self.name, self.source)
        return self._usable

    def learns(self, *inputs: Tensor | None) -> bool:
        """Whether a gradient will be asked for.

        Raises:
            ValueError: an input on another device, or of another dtype than float32 and bfloat16.
        """
        wanted = False
        for x in inputs:
            if x is None:
                continue
            if not x.is_cpu or x.dtype not in DTYPES:
                raise ValueError(
                    f"{self.name}: backend cpp: expected float32 or bfloat16 on a CPU, got {x.dtype} on {x.device}"
                )
            wanted = wanted or x.requires_grad
        return wanted and torch.is_grad_enabled()

    def run(self, way: str, *fields: int | float) -> None:
        """Call `<name>_<way>` with the struct's fields; what their addresses belong to must be held until it returns.

        Raises:
            BuildError: no compiler that works.
        """
        function = self._functions.get(way)
        if function is None:
            function = getattr(library(self.name, [self.source]), f"{self.name}_{way}")
            function.argtypes, function.restype = [ctypes.c_char_p], None
            self._functions[way] = function
        function(self.call.pack(*fields))


def rows(x: Tensor) -> Tensor:
    """x with the elements of its last dimension side by side, copied only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def address(x: Tensor | None) -> int:
    """Where x begins, 0 for None."""
    return 0 if x is None else x.data_ptr()
