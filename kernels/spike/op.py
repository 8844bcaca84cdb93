"""spike, spike_counts, spike_linear: the public ops. Everything above this folder calls these alone."""

import math

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import usable
from seqzoo.kernels.spike import cpp, gpu
from seqzoo.kernels.spike.composed import spike_composed, spike_linear_composed
from seqzoo.kernels.spike.reference import spike_counts_reference, spike_linear_reference, spike_reference

BACKENDS = {
    "reference": spike_reference,
    "torch": spike_composed,
    "cpp": cpp.spike_cpp,  # float32 and bfloat16 on a CPU
    "triton": gpu.spike_triton,  # float32, bfloat16 and float16 on a GPU
}
LINEAR_BACKENDS = {
    "reference": spike_linear_reference,
    "torch": spike_linear_composed,
    "cpp": cpp.spike_linear_cpp,
}
KINDS = (torch.float32, torch.bfloat16, torch.float16)  # that Triton has
MOST = 1 << 14  # channels in a group, whose sum must not leave int32


def spike_counts(x: Float[Tensor, "*rows W"], *, k: float = 3.0) -> tuple[Tensor, Tensor]:
    """The signed whole numbers of spikes that stand for x. Definition: `reference.py`.

    Args:
        x: rows of W channels, any floating dtype.
        k: mean absolute value over threshold; the larger, the more spikes.

    Returns:
        counts [*rows, W], whole numbers in fp32 (fp64 where x is), and the threshold [*rows, 1] they are counts of.
        Neither has a gradient. A row with a NaN in it is NaN.

    Raises:
        ValueError: x of whole numbers, no channels, or k that is no positive number.
    """
    _check("spike_counts", x, k)
    return spike_counts_reference(x.detach(), k)


def spike(x: Float[Tensor, "*rows W"], *, k: float = 3.0, through_threshold: bool = False) -> Float[Tensor, "*rows W"]:
    """What the spike counts of x stand for: the threshold times the counts.

    Args:
        x, k: as in `spike_counts`.
        through_threshold: let the gradient see that the threshold moves with x; otherwise it is that of y = x.

    Returns:
        y, in x's dtype. A row with a NaN in it is NaN, one with an infinity is not finite. float16 has no
        number for what is rounded up beyond 65504.

    Raises:
        ValueError: as `spike_counts`, or a forced backend that cannot run this.
    """
    _check("spike", x, k)
    name = choose(BACKENDS, tokens=2, device=x.device, able=lambda name: _able(name, x, through_threshold))
    return BACKENDS[name](x, k, through_threshold)


def spike_linear(
    x: Float[Tensor, "*rows I"],
    weight: Int8[Tensor, "O I"],
    scales: Float[Tensor, "O G"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    k: float = 3.0,
    group: int = 128,
) -> Float[Tensor, "*rows O"]:
    """Multiply spike counts by int8 weights, as whole numbers, and scale what comes out.

    Args:
        x, k: as in `spike_counts`.
        weight: any int8, -128 too; frozen.
        scales: what a step of the weight is, one for every `group` of input channels; frozen.
        bias: added to the result, in any floating dtype.
        group: channels; the last group may be short.

    Returns:
        y, in x's dtype (autocast's where that is on): the same as the product of what counts and weights stand for, to
        rounding. A row with a NaN or an infinity in it is not finite.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree, scales that want a gradient, k or group out of range,
            or a forced backend that cannot run this.
    """
    _check("spike_linear", x, k)
    _check_weight(x, weight, scales, bias, group)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):  # which would round the counts
            return _spike_linear(x, weight, scales, bias, k, group).to(dtype)
    return _spike_linear(x, weight, scales, bias, k, group)


def _spike_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, k: float, group: int) -> Tensor:
    able = lambda name: (
        torch.compiler.is_compiling() and x.dtype in (torch.float32, torch.bfloat16) or cpp.PRODUCT.usable(x)
    )
    run = LINEAR_BACKENDS[choose(LINEAR_BACKENDS, tokens=2, device=x.device, able=able)]
    return run(x, weight, scales, bias, k, group)


def _able(name: str, x: Tensor, through_threshold: bool) -> bool:
    """Whether a fast backend is for such a spike."""
    if name == "triton":
        return usable() and x.dtype in KINDS and not torch.compiler.is_compiling()  # for then torch fuses by itself
    return not through_threshold and cpp.SPIKE.usable(x)


def _check(op: str, x: Tensor, k: float) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: x: expected a floating dtype, got {x.dtype}")
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{op}: x: expected rows of one channel and more, got shape {tuple(x.shape)}")
    if not 0 < k < math.inf:
        raise ValueError(f"{op}: k: expected a positive number, got {k}")


def _check_weight(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> None:
    if not 1 <= group <= MOST:
        raise ValueError(f"spike_linear: group: expected 1 to {MOST} channels, got {group}")
    if weight.dtype != torch.int8 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"spike_linear: weight: expected int8 [out, {x.shape[-1]}], got {got}")
    for name, given in dict(weight=weight, scales=scales, bias=bias).items():
        if given is not None and given.device != x.device:  # whose address is none here
            raise ValueError(f"spike_linear: {name}: expected to be on {x.device} as x, got {given.device}")
        if given is not None and given is not weight and not given.is_floating_point():
            raise ValueError(f"spike_linear: {name}: expected a floating dtype, got {given.dtype}")
    expected = weight.shape[0], -(-weight.shape[1] // group)
    if scales.shape != expected:
        raise ValueError(f"spike_linear: scales: expected shape {expected}, got {tuple(scales.shape)}")
    if scales.requires_grad:
        raise ValueError("spike_linear: scales: expected frozen ones, got requires_grad=True")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"spike_linear: bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
