"""Cross-entropy of what a linear head predicts: the definition.

    z_n  = W h_n                                             logits
    nats = sum_n [ log sum_v exp(z_nv)  -  z_n,label(n) ]    over the labels that are not IGNORED

N tokens   D width   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that is none, as in torch's cross-entropy


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Shapes and units: `op.linear_cross_entropy`."""
    logits = hidden @ weight.mT
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")
