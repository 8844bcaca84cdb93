"""Causal softmax attention: the definition, over a dense mask, in any dtype.

    o_t = sum_s p_ts v_s      p_ts = softmax over the seen s of q_t . k_s / sqrt K

Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245; sliding
window: Beltagy et al. 2020, arXiv 2004.05150; sink tokens: SpikingBrain 2025, arXiv 2509.05276.
"""

import torch
from torch import Tensor


def causal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """See `causal_attention`; holds T x S scores. A query that sees no key reads nothing: zeros."""
    T, S = q.shape[2], k.shape[2]
    back = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    seen = (back >= 0) & (back < (window or S))  # [T, S]
    if key_document is not None:
        same = (query_document[:, :, None] == key_document[:, None]) & (key_document >= 0)[:, None]
        seen = (seen & same)[:, None]  # [B, 1, T, S]
    seen = seen | (torch.arange(S, device=q.device) < sinks)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
    return scores.softmax(-1) * seen @ v
