"""The gated delta rule of the package flash-linear-attention, in Triton on a GPU; imported when first used.

It wants packed documents as one row with offsets, and a memory for each. Its names and signatures are those of 0.6.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("fla") is not None  # found out here, for torch.compile cannot trace the search


def usable() -> bool:
    """Whether the package is installed; nothing is imported."""
    return INSTALLED


def fold(state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of packed documents as one row.

    Args:
        state: [B, HV, K, V], the memory with which each row begins.
        starts: [B, T] bool, the first token of each document.

    Returns:
        `offsets` int64 [N + 1] of the N documents in the B T tokens, a row's first tokens counting as one document too;
        `states` [N, HV, K, V], the memory each begins with (a row's own where it continues one, else zeros);
        `last` int64 [B], which document is the last of each row.
    """
    B, T = starts.shape
    begins = starts.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().squeeze(1)
    offsets = torch.cat([first, first.new_tensor([B * T])])
    row, continues = first // T, ~starts.flatten()[first]
    states = torch.where(continues[:, None, None, None], state[row], 0.0)
    return offsets, states, begins.sum(1).cumsum(0) - 1


def gated_delta_rule_fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `gated_delta_rule_reference`, in v's dtype inside.

    Raises:
        ValueError: the package is missing, or the tensors are not on a GPU, or not of 16 bits, which is all it takes.
    """
    if not usable():
        raise ValueError("backend fla: expected the package flash-linear-attention, which is not installed here")
    if v.device.type != "cuda" or v.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"backend fla: expected CUDA tensors of bfloat16 or float16, got {v.dtype} on {v.device}")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, state))
    run = fused_recurrent_gated_delta_rule if v.shape[1] == 1 and not learns else chunk_gated_delta_rule
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    options = dict(initial_state=state.float(), scale=1.0, output_final_state=True)
    inputs = dict(q=q.to(v.dtype), k=k.to(v.dtype), v=v, g=g.float(), beta=beta.float())
    if run is fused_recurrent_gated_delta_rule and v.shape[2] > q.shape[2]:
        group = v.shape[2] // q.shape[2]
        inputs |= {name: inputs[name].repeat_interleave(group, dim=2) for name in ("q", "k")}
    if starts is None:
        return run(**inputs, **options)
    offsets, options["initial_state"], last = fold(state.float(), starts)
    o, states = run(**{name: x.flatten(0, 1)[None] for name, x in inputs.items()}, **options, cu_seqlens=offsets)
    return o.view(v.shape), states[last]
