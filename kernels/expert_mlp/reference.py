"""Many small gated MLPs, of which each token passes through a few: the definition.

    h_e(x) = down_e [ f(silu(gate_e x) * (up_e x)) ],  f the identity or what is given as `hidden`
    y_n    = sum_j weight_nj h_e(x_n),  e = chosen_nj

N tokens   k slots per token   E experts   D width   I width inside an expert   gate_e, up_e the halves of gate_up_e
Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 1; the gated MLP: Shazeer 2020, arXiv 2002.05202.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Hidden = Callable[[Tensor], Tensor]  # row by row, of the same shape


def expert_mlp_reference(
    x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, hidden: Hidden | None = None
) -> Tensor:
    """Expert by expert. Shapes and units: `op.expert_mlp`."""
    y = x.new_zeros(x.shape)
    for e in chosen.unique().tolist():
        token, slot = (chosen == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, dim=-1)
        between = F.silu(gate) * up
        out = F.linear(between if hidden is None else hidden(between), down[e]) * weight[token, slot, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y
