"""Where 16 bits are too few."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()
