"""short_conv: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import across
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import usable
from seqzoo.kernels.short_conv.composed import short_conv_composed
from seqzoo.kernels.short_conv.cpp import NATIVE, short_conv_cpp
from seqzoo.kernels.short_conv.gpu import MOST, short_conv_triton
from seqzoo.kernels.short_conv.reference import short_conv_reference

BACKENDS = {
    "reference": short_conv_reference,
    "torch": short_conv_composed,
    "cpp": short_conv_cpp,  # float32 and bfloat16 on a CPU
    "triton": short_conv_triton,  # float32, bfloat16 and float16 on a GPU, up to 8 taps
}
KINDS = (torch.float32, torch.bfloat16, torch.float16)  # that Triton has


def short_conv(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    past: Float[Tensor, "B W1 C"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W1 C"]]:
    """Filter every channel over the last W tokens of its document, then silu. Definition: `reference.py`.

    Args:
        x: inputs, any strides; nothing is copied where a token's channels stand side by side.
        weight: one filter per channel, its last tap is for the token itself.
        past: the W-1 inputs before the first token, in any floating dtype; None is zeros.
        starts: True at the first token of each packed document, before which its filter sees zeros; a row continues
            `past` up to its first start. None is no start at all.

    Returns:
        y, in x's dtype, and the next past, in the dtype of the one that came (of x, where none did): the last W-1
        inputs, zeros for those before the last start.

    Raises:
        ValueError: shapes that do not agree, no token, or a forced backend that cannot run this.
    """
    (B, T, C), (filters, W) = x.shape, weight.shape
    if not (B and T and C):
        raise ValueError(f"short_conv: x: expected [B, T, C], every size >= 1, got {tuple(x.shape)}")
    if filters != C or not W:
        raise ValueError(f"short_conv: weight: expected shape [{C}, W], W >= 1, got {tuple(weight.shape)}")
    if past is not None and past.shape != (B, W - 1, C):
        raise ValueError(f"short_conv: past: expected shape {(B, W - 1, C)}, got {tuple(past.shape)}")
    if starts is not None and (starts.shape != (B, T) or starts.dtype != torch.bool):
        raise ValueError(f"short_conv: starts: expected bool {(B, T)}, got {starts.dtype} {tuple(starts.shape)}")
    if across.ranks() is not None and W > 1:
        across.check_whole("short_conv", past)
        past = _tail_before(x, W - 1, starts)
    name = choose(BACKENDS, tokens=T, device=x.device, able=lambda name: able(name, x, weight))
    if not torch.is_autocast_enabled(x.device.type):
        return BACKENDS[name](x, weight, past, starts)
    with torch.autocast(x.device.type, enabled=False):  # y keeps x's dtype
        return BACKENDS[name](x, weight, past, starts)


def _tail_before(x: Tensor, length: int, starts: Tensor | None) -> Tensor:
    """The last inputs of the rank before, zeros for those of documents that have ended there."""
    if x.shape[1] < length:
        raise ValueError(f"short_conv: x: expected at least {length} tokens on each rank, got {x.shape[1]}")
    goes_on = across.open_until_end(starts, tuple(x.shape[:2]), x.device)[:, -length:, None]
    return across.from_before(x[:, -length:] * goes_on)


def able(name: str, x: Tensor, weight: Tensor) -> bool:
    """Whether a fast backend is for such inputs."""
    if name == "triton":
        return usable() and x.dtype in KINDS and weight.shape[1] <= MOST
    return NATIVE.usable(x)
