"""float8_linear: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.dispatch import choose, forced
from seqzoo.kernels.float8_linear.reference import float8_linear_reference
from seqzoo.kernels.float8_linear.scaled import UNIT, float8_linear_emulated, float8_linear_scaled

BACKENDS = {
    "reference": float8_linear_reference,
    "torch": float8_linear_emulated,
    "scaled_mm": float8_linear_scaled,  # sizes that are multiples of 16
}


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies such numbers: NVIDIA's from sm_89 on, AMD's gfx950 (gfx942 has others)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    properties = torch.cuda.get_device_properties(device)  # which torch.compile takes as it is
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0] == "gfx950"
    return (properties.major, properties.minor) >= (8, 9)


def float8_linear(
    x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """A linear layer whose products, forward and backward, are of numbers of eight bits. Definition: `reference.py`.

    Args:
        x: rows, as many as there are tokens.
        weight: a row per output channel; any floating dtype, and rounded from that.
        bias: added to the result.

    Returns:
        y, in x's dtype (autocast's where that is on).

    Raises:
        ValueError: shapes that do not agree, a device that has no such products where none that emulates them is
            asked for with `use_backend`, or sizes that are no multiples of 16 for one that has.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"float8_linear: weight: expected [out, in] for x of {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"float8_linear: bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    name = choose(BACKENDS, tokens=2, device=x.device) if forced() else "scaled_mm"
    if name == "scaled_mm" and not forced() and not has_float8(x.device):
        raise ValueError(
            f"float8_linear: expected a device that multiplies numbers of eight bits, or use_backend, got {x.device}"
        )
    if name == "scaled_mm" and any(n % UNIT for n in weight.shape):
        raise ValueError(f"float8_linear: weight: expected multiples of {UNIT}, got {tuple(weight.shape)}")
    device = x.device.type
    rows = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    with torch.autocast(device, enabled=False):
        y = BACKENDS[name](rows.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0]).to(rows.dtype)
