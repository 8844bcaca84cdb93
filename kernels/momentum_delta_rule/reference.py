"""The momentum delta rule: its definition.

    w_t = -(v_t - S_{t-1}^T p_t)                      the error of the memory at p_t
    M_t = mu_t M_{t-1} + (eta_t k_t) w_t^T            is gathered, an older one weighs less
    S_t = alpha_t S_{t-1} - beta_t M_t                the memory fades, and moves against what was gathered
    o_t = S_t^T q_t                                   then is read at q_t

    alpha = exp(log_alpha), mu = exp(log_mu); at a document's start S_{t-1} = M_{t-1} = 0

B batch   T time   H key heads   HP heads of p   HV value heads   K key width   V value width
Value head h has memories of its own, takes its q and k from key head h // (HV / H) and its p from h // (HV / HP).
mu = 0 and p = alpha k is the gated delta rule with step size beta eta.
Source: Huang et al. 2026, arXiv 2605.05838.
"""

import torch
from torch import Tensor, einsum


def momentum_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    beta: Tensor,
    eta: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: q, k, p [B,HV,K]; v [B,HV,V]; the rest [B,HV]; state [B,HV,2,K,V] -> o [B,HV,V], state."""
    S, M = state.unbind(2)
    w = einsum("bhkv,bhk->bhv", S, p) - v
    M = log_mu.exp()[..., None, None] * M + einsum("bhk,bhv->bhkv", eta[..., None] * k, w)
    S = log_alpha.exp()[..., None, None] * S - beta[..., None, None] * M
    return einsum("bhkv,bhk->bhv", S, q), torch.stack([S, M], dim=2)


def momentum_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    beta: Tensor,
    eta: Tensor,
    state: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All tokens, one after the other. Shapes and units: `op.momentum_delta_rule`."""
    dtype, HV = torch.promote_types(v.dtype, torch.float32), v.shape[2]
    q, k, p = (x.to(dtype).repeat_interleave(HV // x.shape[2], dim=2) for x in (q, k, p))
    time = q, k, v.to(dtype), p, *(x.to(dtype) for x in (log_alpha, log_mu, beta, eta))
    state = q.new_zeros(*q.shape[::2], 2, q.shape[3], v.shape[3]) if state is None else state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None, None], 0, state)
        o, state = momentum_delta_rule_step(*(x[:, t] for x in time), state)
        outputs.append(o)
    return torch.stack(outputs, dim=1).to(v.dtype), state
