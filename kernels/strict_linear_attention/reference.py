"""Strict linear attention, and the level of BDH around it: their definitions.

    a_t = S_{t-1}^T r_t                          the memory is read first
    S_t = exp(decay) (S_{t-1} + r_t v_t^T)       then written: a token never sees itself; at a document's start S = 0

so that a_t = sum over s < t of exp(decay (t - s)) (r_t . r_s) v_s: one vector is query and key, nothing normalises.

    x_t = relu(D_x v_t)                          per head: which neurons fire
    r_t = turned by its position, in pairs of neighbours
    y_t = relu(D_y LN(a_t))                      which of them are let through
    u_t = sum over heads of E^T (x_t * y_t)      LN without parameters, over the model width

B batch   T time   H heads   G heads of v   N neurons per head   D model width
Head h takes its v from head h // (H / G).
Source: Kosowski et al. 2025, arXiv 2509.26507, and the code released with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, einsum


def strict_linear_attention_step(r: Tensor, v: Tensor, state: Tensor, fade: Tensor) -> tuple[Tensor, Tensor]:
    """One token: r [B,H,N]; v [B,H,D]; state [B,H,N,D]; fade [H,1,1] -> a [B,H,D], state [B,H,N,D]."""
    a = einsum("bhnd,bhn->bhd", state, r)
    return a, fade * (state + einsum("bhn,bhd->bhnd", r, v))


def strict_linear_attention_reference(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None = None, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens, one after the other. Shapes and units: `op.strict_linear_attention`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    r, values = r.to(dtype), v.to(dtype).repeat_interleave(r.shape[2] // v.shape[2], dim=2)
    fade = r.new_ones(r.shape[2], 1, 1) if decay is None else decay.to(dtype).exp()[:, None, None]
    if state is None:
        state = r.new_zeros(*r.shape[::2], r.shape[3], v.shape[3])
    state, outputs = state.to(dtype), []
    for t in range(r.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0, state)
        a, state = strict_linear_attention_step(r[:, t], values[:, t], state, fade)
        outputs.append(a)
    return torch.stack(outputs, dim=1).to(v.dtype), state


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, N], its channels 2i and 2i + 1 turned as one pair by cos, sin [B or 1, T, N / 2]."""
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def level_of(attend, wide: bool = True):
    """A level of BDH from a backend of strict linear attention. Shapes: `level.bdh_level`, which says what they are.

    wide: what is turned keeps the dtype of cos and sin where that is wider than x's.
    """

    def level(v, encoder, gate, decoder, cos, sin, *, state, starts, decay, passed, dropout, norm_eps, x_before):
        x = (v[:, None] @ encoder.mT).relu()  # [B, H, T, N]
        x = x if x_before is None else x + x_before
        r = turned(x, cos, sin)
        r = r if wide else r.to(x.dtype)
        with torch.autocast(v.device.type, enabled=False):
            a, state = attend(r.transpose(1, 2), v[:, :, None].to(r.dtype), state, starts, decay)
        a = F.layer_norm(a, a.shape[-1:], eps=norm_eps).to(v.dtype)
        z = x * (a.transpose(1, 2) @ gate.mT).relu()
        active = torch.stack([(x.detach() > 0).sum(), (z.detach() > 0).sum()]).to(torch.float32)
        z = z if passed is None else z * (passed.mT / (1.0 - dropout))
        return (z @ decoder).sum(1), state, active, None if x_before is None else x

    return level
