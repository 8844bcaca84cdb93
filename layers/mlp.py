"""Gated MLP: y = W_down [ silu(W_gate x) * (W_up x) ]. Source: Shazeer 2020, arXiv 2002.05202."""

import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.layers.linear import Linear


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=bias)
        self.up_proj = Linear(hidden_size, width, bias=bias)
        self.down_proj = Linear(width, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def active_parameters(self) -> int:
        """Parameters a token passes through: all of them."""
        return sum(p.numel() for p in self.parameters())
