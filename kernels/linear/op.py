"""linear: the public op. Everything above this folder calls this and nothing else in it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.dispatch import choose, forced
from seqzoo.kernels.linear.cpp import NATIVE, few, linear_cpp, run
from seqzoo.kernels.linear.reference import linear_reference

BACKENDS = {
    "reference": linear_reference,
    "torch": F.linear,
    "cpp": linear_cpp,  # float32 and bfloat16 on a CPU; its own product for few rows, as in decoding
}


def linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """Multiply every row by a matrix. Definition: `reference.py`.

    Args:
        x: rows in any strides.
        weight: a row per output channel, in x's dtype (any under autocast, which takes its own for all).
        bias: added to the result.

    Returns:
        y, in x's dtype (autocast's where that is on). Summed in fp32 or wider; what the C++ computes does not
        depend, to the bit, on a row's neighbours or on the number of threads.

    Raises:
        ValueError: shapes or dtypes that do not agree, or a forced backend that cannot run this.
    """
    if not forced() and NATIVE.usable(x) and few(x, weight, bias):  # decoding, for every matrix: asks no more than this
        return run(x, weight, bias)
    _check(x, weight, bias)
    if not forced():
        return F.linear(x, weight, bias)
    return BACKENDS[choose(BACKENDS, tokens=2, device=x.device)](x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        expected = f"[out, {x.shape[-1]}]" if x.ndim else "a row to each element of x's last dimension"
        raise ValueError(
            f"linear: weight: expected shape {expected} for x of {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"linear: {name}: expected x's dtype {x.dtype}, got {given.dtype}")
