"""What Gated DeltaNet makes of its projections before the rule: the definition.

    qkv = [q', k', v]   q = K^-1/2 q' / |q'|,  k = k' / |k'|,  |x| = sqrt(x . x + 1e-6)      head by head
    ba  = [b, a]        g = -exp(a_log) softplus(a + dt_bias),  beta = s sigmoid(b)          per value head

B batch   T time   H key heads   HV value heads   K key width   V value width   s 1 or 2
In fp32 (fp64 where qkv is). Source: Yang et al. 2024, arXiv 2412.06464, section 3.3; the constants: Qwen3-Next-80B-A3B;
s = 2, which lets the memory's eigenvalues be negative: Grazzi et al. 2024, arXiv 2411.12537.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DeltaInputs(NamedTuple):
    """In the order of `gated_delta_rule`."""

    q: Tensor  # [B, T, H, K] of length K^-1/2, fp32
    k: Tensor  # [B, T, H, K] of length 1, fp32
    v: Tensor  # [B, T, HV, V] a view into qkv
    g: Tensor  # [B, T, HV] log decay, fp32
    beta: Tensor  # [B, T, HV] step size, fp32


def delta_inputs_reference(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, num_key_heads: int, key_width: int, beta_scale: float
) -> DeltaInputs:
    """Shapes and units: `op.delta_inputs`."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    keys = num_key_heads * key_width
    q, k, v = qkv.split([keys, keys, qkv.shape[-1] - 2 * keys], dim=-1)
    q, k = (x.to(dtype).unflatten(-1, (num_key_heads, key_width)) for x in (q, k))
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    b, a = ba.to(dtype).chunk(2, dim=-1)
    g = -a_log.to(dtype).exp() * torch.logaddexp(a + dt_bias.to(dtype), torch.zeros_like(a))
    return DeltaInputs(q * key_width**-0.5, k, v.unflatten(-1, (b.shape[-1], -1)), g, beta_scale * b.sigmoid())
