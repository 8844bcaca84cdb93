"""Starting a Triton kernel: on a GPU, on a CPU through Triton's interpreter, or nowhere, to see what would be started.

Nothing here imports triton; the kernels do, and they are imported where they are first started.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None  # found out here, for torch.compile cannot trace the search
_start: Callable[["Launch"], None] | None = None  # what is done with a launch instead of running it


class Launch(NamedTuple):
    """One start of a kernel."""

    kernel: Any  # what triton.jit made
    grid: tuple[int, ...]  # programs
    arguments: tuple  # its tensors and numbers, by position
    constants: dict[str, Any]  # its constexprs and the compiler's options num_warps and num_stages, by name


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its tensors. On the meta device nothing runs, which is for `recording` only."""
    this = Launch(kernel, tuple(grid), arguments, constants)
    if _start is not None:
        _start(this)
    else:
        run(this)


def run(this: Launch) -> None:
    """Really start it."""
    device = next(x.device for x in this.arguments if isinstance(x, Tensor))
    if device.type != "cuda":
        this.kernel[this.grid](*this.arguments, **this.constants)
        return
    with torch.cuda.device(device):
        this.kernel[this.grid](*this.arguments, **this.constants, enable_fp_fusion=True)


@contextmanager
def instead(start: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the block every launch goes to `start`, in place of running."""
    global _start
    before, _start = _start, start
    try:
        yield
    finally:
        _start = before


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside the block are not run but gathered in the list, in order."""
    launches: list[Launch] = []
    with instead(launches.append):
        yield launches


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU: TRITON_INTERPRET was set before they were imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def usable() -> bool:
    """Whether triton is installed; nothing is imported."""
    return INSTALLED


def needs_gpu(x: Tensor) -> None:
    """Raises:
    ValueError: x is where no Triton kernel can run.
    """
    if not usable():
        raise ValueError("backend triton: expected the package triton, which is not installed here")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"backend triton: expected float32, bfloat16 or float16, got {x.dtype}")
    nowhere = _start is not None  # nothing runs, so anywhere will do
    if x.device.type not in ("cuda", "meta") and not (x.device.type == "cpu" and interpreted()) and not nowhere:
        raise ValueError(f"backend triton: expected tensors on a GPU (or TRITON_INTERPRET=1), got {x.device}")


def takes(x: Tensor) -> bool:
    """Whether kernels with products of matrices are to be chosen for x: float32 only where torch, too, would use tf32.

    `torch.set_float32_matmul_precision("high")` says so; by default torch wants float32 products exact.
    """
    if x.dtype == torch.float32:
        return usable() and torch.get_float32_matmul_precision() != "highest"
    return usable() and x.dtype in (torch.bfloat16, torch.float16)


def products(x: Tensor) -> dict[str, Any]:
    """How a kernel multiplies matrices for inputs of x's dtype: what to give it as `DOT` and `PRECISION`.

    bfloat16 stays what it is. float32 is multiplied as tf32, and so is float16, whose range sums kept as operands pass.
    The interpreter multiplies all in fp32: it takes the bits of bfloat16 for whole numbers.
    """
    import triton.language as tl

    from seqzoo.kernels.gpu.tables import arch

    if interpreted():
        return dict(DOT=tl.float32, PRECISION="ieee")
    if x.dtype == torch.bfloat16:
        return dict(DOT=tl.bfloat16, PRECISION="ieee")
    amd = arch(x.device).startswith("gfx")  # whose matrix units take fp32 itself
    return dict(DOT=tl.float32, PRECISION="ieee" if amd else "tf32")
