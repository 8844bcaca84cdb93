"""rms_norm and gated_rms_norm: the public ops. Everything above this folder calls these and nothing else in it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import usable
from seqzoo.kernels.rms_norm.composed import gated_rms_norm_composed, rms_norm_composed
from seqzoo.kernels.rms_norm.cpp import NATIVE, gated_rms_norm_cpp, rms_norm_cpp
from seqzoo.kernels.rms_norm.gpu import MOST, gated_rms_norm_triton, rms_norm_triton
from seqzoo.kernels.rms_norm.reference import gated_rms_norm_reference, rms_norm_reference

BACKENDS = {
    "reference": rms_norm_reference,
    "torch": rms_norm_composed,
    "cpp": rms_norm_cpp,  # float32 and bfloat16 on a CPU
    "triton": rms_norm_triton,  # float32, bfloat16 and float16 on a GPU, up to 8192 channels
}
GATED_BACKENDS = {
    "reference": gated_rms_norm_reference,
    "torch": gated_rms_norm_composed,
    "cpp": gated_rms_norm_cpp,
    "triton": gated_rms_norm_triton,
}
KINDS = (torch.float32, torch.bfloat16, torch.float16)  # that Triton has


def rms_norm(
    x: Float[Tensor, "*rows W"], weight: Float[Tensor, " W"], eps: float, *, offset: float = 0.0
) -> Float[Tensor, "*rows W"]:
    """Scale every row to a root mean square of one, and every channel by its weight. Definition: `reference.py`.

    Args:
        x: rows in any strides; nothing is copied where a row's elements stand side by side, as heads split from wider
            rows do.
        weight: per channel, in any floating dtype.
        eps: added to the mean square.
        offset: added to the weight; 1 for one that is kept as its distance from one.

    Returns:
        y, in x's dtype, computed in fp32 (fp64 where x is).

    Raises:
        ValueError: shapes that do not agree, or a forced backend that cannot run this.
    """
    _check("rms_norm", x, weight)
    return _run(BACKENDS, (x, weight), eps, offset)


def gated_rms_norm(
    x: Float[Tensor, "*rows W"], gate: Float[Tensor, "*rows W"], weight: Float[Tensor, " W"], eps: float
) -> Float[Tensor, "*rows W"]:
    """Norm first, then the gate: silu(gate) times the weighted norm of x. Definition: `reference.py`.

    Args:
        x, weight, eps: as in `rms_norm`.
        gate: before its silu, one for every element of x, in any floating dtype.

    Returns:
        y, in x's dtype; computed in fp32, the norm alone rounded to x's dtype before the weight comes to it.

    Raises:
        ValueError: as `rms_norm`.
    """
    _check("gated_rms_norm", x, weight)
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate: expected x's shape {tuple(x.shape)}, got {tuple(gate.shape)}")
    return _run(GATED_BACKENDS, (x, gate, weight), eps)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{op}: x: expected rows of one channel and more, got shape {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight: expected shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")


def _run(backends: dict[str, Callable], tensors: tuple[Tensor, ...], *numbers: float) -> Tensor:
    rows = 2  # of no matter: for one row, too, torch's norm is faster than the definition
    name = choose(backends, tokens=rows, device=tensors[0].device, able=lambda name: _able(name, tensors))
    return backends[name](*tensors, *numbers)


def _able(name: str, tensors: tuple[Tensor, ...]) -> bool:
    """Whether a fast backend is for these; x may be fp32, and a gate or weight fp16."""
    if name == "cpp":
        return all(map(NATIVE.usable, tensors))
    fits = tensors[0].shape[-1] <= MOST and all(t.dtype in KINDS for t in tensors)
    return fits and usable() and not torch.compiler.is_compiling()  # for then torch fuses it with what is beside it
