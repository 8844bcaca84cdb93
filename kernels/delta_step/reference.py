"""A token of Gated DeltaNet between its projections, all parts of it at once: the definition.

    [q', k', v] = silu(sum_i filters_{W-1-i} qkv_{t-i}),  i = 0 .. W-1, as far back as the document goes
    q = K^-1/2 q' / |q'|,  k = k' / |k'|,  |x| = sqrt(x . x + 1e-6)                     head by head
    ba = [b, a]    g = -exp(a_log) softplus(a + dt_bias),  beta = s sigmoid(b)          per value head
    D = exp(g) S_{t-1},  S_t = D + k [beta (v - D^T k)]^T,  o = S_t^T q                 S is 0 before a document's start
    y = silu(gate) weight o / sqrt(mean o^2 + eps)

B batch   T time   H key heads   HV value heads   K key width   V value width   W width of the filters [tokens]
C = 2 H K + HV V channels, s 1 or 2. What `short_conv`, `delta_inputs`, `gated_delta_rule` and `gated_rms_norm` do one
after the other, in fp32 (fp64 where qkv is) from end to end: they round to qkv's dtype between them.
Source: Yang et al. 2024, arXiv 2412.06464, section 3.3; the constants: Qwen3-Next-80B-A3B; s: arXiv 2411.12537.
"""

import torch
from torch import Tensor, einsum


def delta_step_token(
    x: Tensor,
    ba: Tensor,
    gate: Tensor,
    filters: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    window: Tensor,
    state: Tensor,
    *,
    eps: float,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B,C]; ba [B,2HV]; gate [B,HV,V]; filters [C,W]; window [B,W-1,C]; state [B,HV,K,V] -> y, window, state."""
    (HV, K), V = state.shape[1:3], gate.shape[2]
    window = torch.cat([window, x[:, None]], dim=1)
    mixed = einsum("bwc,cw->bc", window, filters)
    mixed = mixed * mixed.sigmoid()
    keys = (mixed.shape[1] - HV * V) // 2
    q, k, v = mixed.split([keys, keys, HV * V], dim=1)
    q, k = (x.unflatten(1, (-1, K)).repeat_interleave(HV * K // keys, dim=1) for x in (q, k))
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    b, a = ba.chunk(2, dim=1)
    g = -a_log.exp() * torch.logaddexp(a + dt_bias, torch.zeros_like(a))
    state = state * g.exp()[..., None, None]
    error = v.unflatten(1, (HV, V)) - einsum("bhkv,bhk->bhv", state, k)
    state = state + einsum("bhk,bhv->bhkv", k, beta_scale * b.sigmoid()[..., None] * error)
    o = einsum("bhkv,bhk->bhv", state, q) * K**-0.5
    y = gate * gate.sigmoid() * weight * o / torch.sqrt(o.square().mean(-1, keepdim=True) + eps)
    return y, window[:, 1:], state


def delta_step_reference(
    qkv: Tensor,
    ba: Tensor,
    gate: Tensor,
    filters: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    past: Tensor,
    state: Tensor,
    starts: Tensor | None,
    eps: float,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens, one after the other -> y, the next past and state. Shapes and units: `op.delta_step_`."""
    dtype, outputs = torch.promote_types(qkv.dtype, torch.float32), []
    time = [x.to(dtype) for x in (qkv, ba, gate)]
    constant = [x.to(dtype) for x in (filters, a_log, dt_bias, weight)]
    window, state = past.to(dtype), state.to(dtype)
    for t in range(qkv.shape[1]):
        if starts is not None:
            window = torch.where(starts[:, t, None, None], 0, window)
            state = torch.where(starts[:, t, None, None, None], 0, state)
        inputs = *(x[:, t] for x in time), *constant, window, state
        y, window, state = delta_step_token(*inputs, eps=eps, beta_scale=beta_scale)
        outputs.append(y)
    return torch.stack(outputs, dim=1).to(qkv.dtype), window.to(past.dtype), state
