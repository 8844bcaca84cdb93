"""Counts what kernels really load, store and multiply, by running them in Triton's interpreter.

What a roofline model says of a kernel's bytes and products can so be held against the kernel itself. Elements that are
masked out do not count. `touched` counts each address once, as a cache without end would; `moved` each load and store.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from seqzoo.kernels.gpu.launch import Launch, instead, run


@dataclass
class Traffic:
    """Of one kernel, all its launches together."""

    launches: int = 0
    programs: int = 0
    loaded: int = 0  # [bytes]
    stored: int = 0
    flops: int = 0  # of matrix products; a multiply-add is 2
    _read: list[np.ndarray] = field(default_factory=list, repr=False)
    _written: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def moved(self) -> int:
        """[bytes] All loads and stores."""
        return self.loaded + self.stored

    @property
    def touched(self) -> int:
        """[bytes] Each address once for reading and once for writing."""
        return sum(len(np.unique(np.concatenate(x))) for x in (self._read, self._written) if x)


@contextmanager
def counting() -> Iterator[dict[str, Traffic]]:
    """Inside the block launches run in the interpreter and are counted, by their kernel's name."""
    from triton.runtime.interpreter import interpreter_builder as builder

    counts: dict[str, Traffic] = {}
    current: list[Traffic] = []
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def addresses(pointers, mask) -> tuple[np.ndarray, int]:
        """Every byte of what is not masked out, and how many there are."""
        width = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        first = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64).ravel()
        return (first[:, None] + np.arange(width)).ravel(), len(first) * width

    def counted_load(pointers, mask, *rest):
        where, n = addresses(pointers, mask)
        current[-1].loaded += n
        current[-1]._read.append(np.unique(where))
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        where, n = addresses(pointers, mask)
        current[-1].stored += n
        current[-1]._written.append(np.unique(where))
        return store(pointers, value, mask, *rest)

    def counted_dot(a, b, *rest):
        current[-1].flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    def start(this: Launch) -> None:
        name = getattr(this.kernel, "__name__", None) or this.kernel.fn.__name__
        current.append(counts.setdefault(name, Traffic()))
        current[-1].launches += 1
        current[-1].programs += int(np.prod(this.grid))
        try:
            run(this)
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
