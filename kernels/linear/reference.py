"""A matrix product with a weight as torch keeps it: y = x W^T + b. The definition."""

from torch import Tensor


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes and units: `op.linear`."""
    y = x @ weight.mT
    return y if bias is None else y + bias.to(y.dtype)
