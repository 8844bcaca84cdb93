"""The delta rule with a decay per key channel, as Kimi Delta Attention has it: its definition.

    S_t = diag(exp g_t) S_{t-1}                     each key channel fades at its own rate; at a document's start to 0
    S_t = S_t + beta_t k_t (v_t - S_t^T k_t)^T      what is read at k_t moves towards v_t
    o_t = S_t^T q_t

B batch   T time   H heads   K key width   V value width
Source: Kimi Team 2025, arXiv 2510.26692, eq. 1; with one decay per head it is `gated_delta_rule`.
"""

import torch
from torch import Tensor, einsum


def kimi_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k, g [B,H,K]; v [B,H,V]; beta [B,H]; state [B,H,K,V] -> o [B,H,V], state."""
    state = g.exp()[..., None] * state
    error = beta[..., None] * (v - einsum("bhkv,bhk->bhv", state, k))
    state = state + einsum("bhk,bhv->bhkv", k, error)
    return einsum("bhkv,bhk->bhv", state, q), state


def kimi_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens, one after the other. Shapes and units: `op.kimi_delta_rule`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    inputs = [x.to(dtype) for x in (q, k, v, g, beta)]
    if state is None:
        state = inputs[2].new_zeros(*v.shape[::2], k.shape[3], v.shape[3])
    outputs = []
    for t in range(v.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0, state)
        o, state = kimi_delta_rule_step(*(x[:, t] for x in inputs), state)
        outputs.append(o)
    return torch.stack(outputs, dim=1).to(v.dtype), state
