"""How tensors lie for a kernel over tokens, and how wide its blocks are. Nothing here imports triton."""

from torch import Tensor


def even_rows(x: Tensor) -> Tensor:
    """x [B, T, heads, width] with a token's heads adjacent, tokens evenly apart through all rows; copied where not."""
    B, T, heads, width = x.shape
    even = x.stride(3) == 1 and (heads == 1 or x.stride(2) == width) and (B == 1 or x.stride(0) == T * x.stride(1))
    return x if even else x.contiguous()


def block(width: int) -> int:
    """The least power of two that holds a width and that a product of matrices takes."""
    return max(16, 1 << (width - 1).bit_length())
