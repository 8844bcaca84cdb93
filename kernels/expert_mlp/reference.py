"""Many small gated MLPs, of which each token passes through a few: the definition.

    h_e(x) = down_e [ silu(gate_e x) * (up_e x) ]
    y_n    = sum_j weight_nj h_e(x_n),  e = chosen_nj

N tokens   k slots per token   E experts   D width   I width inside an expert   gate_e, up_e the halves of gate_up_e
Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 1; the gated MLP: Shazeer 2020, arXiv 2002.05202.
"""

import torch.nn.functional as F
from torch import Tensor


def expert_mlp_reference(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert by expert. Shapes and units: `op.expert_mlp`."""
    y = x.new_zeros(x.shape)
    for e in chosen.unique().tolist():
        token, slot = (chosen == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[e]) * weight[token, slot, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y
