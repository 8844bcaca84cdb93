"""The rule's inputs as torch composes them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.delta_inputs.reference import DeltaInputs


def delta_inputs_composed(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, num_key_heads: int, key_width: int, beta_scale: float
) -> DeltaInputs:
    """Same as `delta_inputs_reference`."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    keys = num_key_heads * key_width
    q, k, v = qkv.split([keys, keys, qkv.shape[-1] - 2 * keys], dim=-1)
    q, k = (_unit(x.to(dtype).unflatten(-1, (num_key_heads, key_width))) for x in (q, k))
    b, a = ba.chunk(2, dim=-1)
    g = -a_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias)
    beta = beta_scale * b.to(dtype).sigmoid()
    return DeltaInputs(q * key_width**-0.5, k, v.unflatten(-1, (b.shape[-1], -1)), g, beta)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
