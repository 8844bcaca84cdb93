"""Latent attention from attention: the latent is what keys and values of all heads have in common, by singular values.

    [K; V] ~ U W_c, W_c with orthonormal rows
    W_kh, W_vh: rows of U, each query head with its own

Latents are as large as x. Where the norm in front of the mixer has weights near 1, that behind W_c has little to do;
where they are far from it, outputs begin too large or small by as much, and alignment has to find that. Turns are left
out, and norms of q and k become part of the projections. A key that all heads share, where one is asked for, begins as
the mean of the heads' and is not asked for yet (its queries are 0). The bias of v is one of the output; that of k is
the same for all keys, so softmax does not see it. `latent_width` has to be said; with `query_rank` queries are split
likewise. At full width, and without the norms and turns, it is the attention.
Idea: arXiv 2502.07864 (TransMLA), 2502.14837 (MHA2MLA).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import one_way, options, out_bias, projected, refuse, repeat_heads
from seqzoo.models.convert.plain import Table
from seqzoo.models.convert.rules import COPY


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: attention with an output gate, or no latent_width, or one above that of keys and values."""
    refuse("latent_attention", attention, "output_gate")
    most = 2 * attention["num_kv_heads"] * attention["head_width"]
    width = wanted.get("latent_width")
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= most:
        raise ValueError(f"latent_attention: latent_width: expected 1 to {most}, as wide as k and v, got {width!r}")
    shared = wanted.get("shared_width", 0)
    if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
        raise ValueError(f"latent_attention: shared_width: expected a number of channels, got {shared!r}")
    K = attention["head_width"]
    derived = dict(
        num_heads=attention["num_heads"], key_width=K, value_width=K, query_bias=attention["bias"],
        out_bias=attention["bias"] or out_bias(attention) or None,
    )  # fmt: skip
    return options("latent_attention", dict(shared_width=0) | wanted, derived)


def rows(attention: Spec, spec: Spec) -> Table:
    (q, read_q), (k, read_k) = (projected(x, "weight", attention) for x in "qk")
    P, R = spec["shared_width"], spec["latent_width"]

    def latents(v: Tensor, *k: Tensor) -> tuple[Tensor, Tensor]:
        key, dtype = read_k(*k).float(), v.dtype
        even = v.float().norm() / key.norm()  # or the larger of the two would have the latent to itself
        even = torch.where((even > 0) & (even < torch.inf), even, 1.0)
        up, down = _split(torch.cat([even * key, v.float()]), R)
        up_k, up_v = (repeat_heads(x, attention).unflatten(0, (spec["num_heads"], -1)) for x in up.chunk(2))
        shared = key.unflatten(0, (attention["num_kv_heads"], -1)).mean(0)[:P]
        shared = F.pad(shared, (0, 0, 0, P - len(shared)))
        return torch.cat([down, shared]).to(dtype), torch.cat([up_k / even, up_v], 1).flatten(0, 1).to(dtype)

    table: Table = [
        ("out_proj.weight", "out_proj.weight", COPY),
        (("v_proj.weight", *k), ("kv_down_proj.weight", "kv_proj.weight"), one_way("split by rank", latents)),
    ]
    asked = lambda *x: _asking(read_q(*x), spec)
    if spec["query_rank"] is None:
        table.append((q, "q_proj.weight", one_way("scaled", lambda *x: (asked(*x),))))
    else:
        split = lambda *x: tuple(part.to(x[0]) for part in _split(asked(*x).float(), spec["query_rank"]))
        table.append((q, ("q_proj.weight", "q_down_proj.weight"), one_way("split by rank", split)))
    if spec["query_bias"]:
        names, read = projected("q", "bias", attention)
        table.append((names, "q_proj.bias", one_way("scaled", lambda *x: (_asking(read(*x), spec),))))
    if spec["out_bias"]:
        given = [*(["v_proj.bias"] if attention["bias"] else []), *(["out_proj.bias"] if out_bias(attention) else [])]

        def moved(weight: Tensor, *biases: Tensor) -> tuple[Tensor]:
            *v, out = [*biases] if out_bias(attention) else [*biases, torch.zeros_like(weight[:, 0])]
            return (out + sum((weight * repeat_heads(x, attention)).sum(-1) for x in v),)

        table.append((("out_proj.weight", *given), "out_proj.bias", one_way("moved", moved)))
    return table


def _split(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[n, D] -> [n, rank], [rank, D]: their product is the nearest to x; the latter's rows are orthonormal, or 0.

    What is 0 makes the rest larger in a norm behind the latter, so the former is so much smaller."""
    if not x.is_meta and not x.isfinite().all():
        raise ValueError("latent_attention: expected finite weights of k and v, and of q, got NaN or infinity")
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    missing = max(0, rank - len(s))
    up = (u * s)[:, :rank] * (min(rank, len(s)) / rank) ** 0.5
    return F.pad(up, (0, missing)), F.pad(v[:rank], (0, 0, 0, missing))


def _asking(q: Tensor, spec: Spec) -> Tensor:
    """[H K, ...] -> [H (K + P), ...]: larger, for it is divided by the root of more channels; 0 for the shared ones."""
    N, P = spec["key_width"], spec["shared_width"]
    q = q.unflatten(0, (spec["num_heads"], -1)) * ((N + P) / N) ** 0.5
    return torch.cat([q, q.new_zeros(q.shape[0], P, *q.shape[2:])], 1).flatten(0, 1)
