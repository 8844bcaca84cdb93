"""Counts what kernels really load, store and multiply, by running them in Triton's interpreter.

What a roofline model says of a kernel's bytes and products can so be held against the kernel itself. Elements that are
masked out do not count. `touched` counts each address once for reading and once for writing, launch by launch, as a
cache would that has no end while a kernel runs; `moved` each load and store.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from seqzoo.kernels.gpu.launch import Launch, instead, run


@dataclass
class Traffic:
    """Of one kernel, all its launches together."""

    launches: int = 0
    programs: int = 0
    loaded: int = 0  # [bytes]
    stored: int = 0
    touched: int = 0
    flops: int = 0  # of matrix products; a multiply-add is 2

    @property
    def moved(self) -> int:
        """[bytes] All loads and stores."""
        return self.loaded + self.stored


@contextmanager
def counting() -> Iterator[dict[str, Traffic]]:
    """Inside the block launches run in the interpreter and are counted, by their kernel's name."""
    from triton.runtime.interpreter import interpreter_builder as builder

    counts: dict[str, Traffic] = {}
    current: list[Traffic] = []
    seen: dict[tuple[str, int], list[np.ndarray]] = {}  # of a launch: addresses by what was done there, and bytes
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def note(how: str, pointers, mask) -> int:
        """Keeps where all is that is not masked out; its bytes."""
        width = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        where = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].ravel()
        seen.setdefault((how, width), []).append(where)
        return len(where) * width

    def counted_load(pointers, mask, *rest):
        current[-1].loaded += note("read", pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        current[-1].stored += note("written", pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_dot(a, b, *rest):
        current[-1].flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    def start(this: Launch) -> None:
        name = getattr(this.kernel, "__name__", None) or this.kernel.fn.__name__
        current.append(counts.setdefault(name, Traffic()))
        current[-1].launches += 1
        current[-1].programs += int(np.prod(this.grid))
        seen.clear()
        try:
            run(this)
            current[-1].touched += sum(width * len(np.unique(np.concatenate(x))) for (_, width), x in seen.items())
        finally:
            current.pop()

    patches = dict(create_masked_load=counted_load, create_masked_store=counted_store, create_dot=counted_dot)
    for name, function in patches.items():
        setattr(builder, name, function)
    try:
        with instead(start):
            yield counts
    finally:
        for name in patches:
            delattr(builder, name)  # the class's own again
