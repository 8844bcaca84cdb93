"""The Python side of native ops whose functions take the address of one struct, and of those that carry a memory."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native.build import library, usable


class Calls:
    """The functions `<name>_<way>(Call*, ...)` of one C++ source.

    Args:
        name: of the op, for its functions, its library and messages.
        source: the C++ file.
        numbers: ways that return a whole number; others return nothing.
    """

    def __init__(self, name: str, source: Path, *numbers: str) -> None:
        self.name, self.source, self.numbers = name, source, numbers
        self._functions: dict[str, ctypes._CFuncPtr] = {}

    def usable(self) -> bool:
        """Whether this machine can build and load it; logs once why not. torch.compile needs a compiler itself."""
        return torch.compiler.is_compiling() or usable(self.name, self.source)

    def run(self, way: str, call: ctypes.Structure, *pointers: int | None) -> int | None:
        """`<name>_<way>` of the struct and further addresses; what these belong to must be held until it returns.

        Raises:
            BuildError: no compiler that works.
        """
        function = self._functions.get(way)
        if function is None:
            function = getattr(library(self.name, [self.source]), f"{self.name}_{way}")
            function.argtypes = [ctypes.POINTER(type(call)), *[ctypes.c_void_p] * len(pointers)]
            function.restype = ctypes.c_int64 if way in self.numbers else None
            self._functions[way] = function
        return function(call, *pointers)


def learns(*inputs: Tensor | None) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def memory(state: Tensor | None, shape: tuple[int, ...], *, copy: bool) -> Tensor:
    """What a native op reads its memory from and writes it over: [shape] float32, contiguous.

    Args:
        state: where the memory begins; None is room for one, not filled yet.
        shape: of that room.
        copy: the state stays as it is; else it may be what comes back.
    """
    if state is None:
        return torch.empty(shape, dtype=torch.float32)
    if copy:
        return state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return state.float().contiguous()


def kept(memory: Tensor, places: int) -> Tensor:
    """Room for the memory at each of the places that backward begins from, one sequence after the other; 0 is none."""
    return memory.new_empty(places, *memory.shape[1:])


def kept_fake(memory: Tensor, keep: bool) -> Tensor:
    """The same where shapes alone are traced: how many places there are, nobody knows then."""
    return kept(memory, torch.library.get_ctx().new_dynamic_size() if keep else 0)
