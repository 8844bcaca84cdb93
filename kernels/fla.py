"""What ops share that go through the package flash-linear-attention on a GPU; it is imported when first used.

It wants packed documents as one row with offsets, and a memory for each. Its names and signatures are those of 0.6.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("fla") is not None  # found out here, for torch.compile cannot trace the search


def usable() -> bool:
    """Whether the package is installed; nothing is imported."""
    return INSTALLED


def fold(state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of packed documents as one row.

    Args:
        state: [B, HV, K, V], the memory with which each row begins.
        starts: [B, T] bool, the first token of each document.

    Returns:
        `offsets` int64 [N + 1] of the N documents in the B T tokens, a row's first tokens counting as one document too;
        `states` [N, HV, K, V], the memory each begins with (a row's own where it continues one, else zeros);
        `last` int64 [B], which document is the last of each row.
    """
    B, T = starts.shape
    begins = starts.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().squeeze(1)
    offsets = torch.cat([first, first.new_tensor([B * T])])
    row, continues = first // T, ~starts.flatten()[first]
    states = torch.where(continues[:, None, None, None], state[row], 0.0)
    return offsets, states, begins.sum(1).cumsum(0) - 1


def check_runs(v: Tensor) -> None:
    """Raises ValueError: the package is missing, or v is not on a GPU, or not of 16 bits, which is all it takes."""
    if not usable():
        raise ValueError("backend fla: expected the package flash-linear-attention, which is not installed here")
    if v.device.type != "cuda" or v.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"backend fla: expected CUDA tensors of bfloat16 or float16, got {v.dtype} on {v.device}")
