"""The norms in C++ on a CPU, float32 and bfloat16, forward and backward: see `rms_norm.cpp`.

For backward the inputs and 1/rms are kept. Bits depend neither on the number of threads nor, but for the weight's
gradient, on the other rows.
"""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native.rows import RowOp, address

NATIVE = RowOp("rms_norm", Path(__file__).with_name("rms_norm.cpp"), "12q2f9P")
Steps = tuple[int, int, int]  # how many rows share an outer step, the outer and the inner step [elements]


def rms_norm_cpp(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Same as `rms_norm_reference`.

    Raises:
        ValueError: another dtype or device.
        BuildError: no compiler that works.
    """
    return _norm(x, None, weight, eps, offset)


def gated_rms_norm_cpp(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as `gated_rms_norm_reference`, with the same errors as `rms_norm_cpp`."""
    return _norm(x, gate, weight, eps, 0.0)


def _norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: float) -> Tensor:
    if NATIVE.learns(x, gate, weight):
        return _Norm.apply(x, gate, weight, eps, offset)
    return _forward(x, gate, weight, eps, offset, None)


def _rows(x: Tensor) -> tuple[Tensor, Steps]:
    """x and where its rows stand; a copy where two steps cannot say it."""
    W = x.shape[-1]
    if x.is_contiguous():
        return x, (max(x.numel(), 1), 0, W)
    runs: list[tuple[int, int]] = []  # step and length, the innermost first
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if runs and step == runs[-1][0] * runs[-1][1]:
            runs[-1] = runs[-1][0], runs[-1][1] * size
        elif size > 1:
            runs.append((step, size))
    if x.stride(-1) != 1 or len(runs) > 2:
        return x.contiguous(), (x.numel(), 0, W)
    (inner, length), (outer, _) = (*runs, (0, 1), (0, 1))[:2]
    return x, (length, outer, inner)


def _forward(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: float, rstd: Tensor | None) -> Tensor:
    """y; `rstd` [rows] is filled with 1/rms."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run("forward", x, gate, weight, eps, offset, y, rstd)
    return y


def _run(
    way: str, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: float, *results: Tensor | None
) -> None:
    """`results`: y, rstd, dy, dx, dgate, dweight, or the first of them."""
    (x, x_steps), (gate, gate_steps) = _rows(x), (None, (1, 0, 0)) if gate is None else _rows(gate)
    W, weight, half = x.shape[-1], weight.contiguous(), torch.bfloat16
    kinds = x.dtype == half, gate is not None and gate.dtype == half, weight.dtype == half, gate is not None
    pointers = [address(t) for t in (x, gate, weight, *results)]
    pointers += [0] * (9 - len(pointers))
    NATIVE.run(way, x.numel() // W, W, *kinds, *x_steps, *gate_steps, eps, offset, *pointers)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: float) -> Tensor:
        rstd = torch.empty(x.numel() // x.shape[-1])
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.numbers = eps, offset
        return _forward(x, gate, weight, eps, offset, rstd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
        dweight = torch.empty(weight.shape, dtype=torch.float32)
        _run("backward", x, gate, weight, *ctx.numbers, None, rstd, dy, dx, dgate, dweight)
        return dx, dgate, dweight.to(weight.dtype), None, None
