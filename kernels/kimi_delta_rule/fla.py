"""The delta rule with a decay per key channel of the package flash-linear-attention, in Triton on a GPU."""

import torch
from torch import Tensor

from seqzoo.kernels.fla import check_runs, fold


def kimi_delta_rule_fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `kimi_delta_rule_reference`, in v's dtype inside.

    Raises:
        ValueError: the package is missing, or the tensors are not on a GPU, or not of 16 bits, which is all it takes.
    """
    check_runs(v)
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, state))
    run = fused_recurrent_kda if v.shape[1] == 1 and not learns else chunk_kda
    if state is None:
        state = v.new_zeros(*v.shape[::2], k.shape[3], v.shape[3], dtype=torch.float32)
    options = dict(initial_state=state.float(), scale=1.0, output_final_state=True)
    inputs = dict(q=q.to(v.dtype), k=k.to(v.dtype), v=v, g=g.float(), beta=beta.float())
    if starts is None:
        return run(**inputs, **options)
    offsets, options["initial_state"], last = fold(state.float(), starts)
    o, states = run(**{name: x.flatten(0, 1)[None] for name, x in inputs.items()}, **options, cu_seqlens=offsets)
    return o.view(v.shape), states[last]
