"""bdh_level: one level of BDH, from the model width to the neurons and back. A public op of this folder.

Everything of the width of all neurons is inside, so that a backend need not ever hold T of them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import across
from seqzoo.kernels.checks import check_tensors
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import takes
from seqzoo.kernels.strict_linear_attention import level_cpp
from seqzoo.kernels.strict_linear_attention.chunked import strict_linear_attention_chunked
from seqzoo.kernels.strict_linear_attention.gpu import strict_linear_attention_triton
from seqzoo.kernels.strict_linear_attention.op import attend
from seqzoo.kernels.strict_linear_attention.reference import level_of, strict_linear_attention_reference

LEVELS = {
    "reference": level_of(strict_linear_attention_reference),
    "torch": level_of(strict_linear_attention_chunked),
    "cpp": level_cpp.bdh_level_cpp,
    "triton": level_of(strict_linear_attention_triton, wide=False),
}


def bdh_level(
    v: Float[Tensor, "B T D"],
    encoder: Float[Tensor, "H N D"],
    gate: Float[Tensor, "H N D"],
    decoder: Float[Tensor, "H N D"],
    cos: Float[Tensor, "R T N_2"],
    sin: Float[Tensor, "R T N_2"],
    *,
    state: Float[Tensor, "B H N D"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    decay: Float[Tensor, " H"] | None = None,
    passed: Bool[Tensor, "B H N T"] | None = None,
    dropout: float = 0.0,
    norm_eps: float = 1e-5,
    x_before: Float[Tensor, "B H T N"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H N D"], Float[Tensor, " 2"], Float[Tensor, "B H T N"] | None]:
    """What a level adds to v. Definition: `reference.py`; arXiv 2509.26507.

    Args:
        v: the level's input, normed; 0 for padding, which then writes nothing and gives 0.
        encoder, gate, decoder: D_x, D_y and E, a row per neuron. (D_x and D_y are published as [H, D, N].)
        cos, sin: of the positions' phases, [R = B, or 1 if alike in all rows]; a CPU likes T innermost in memory.
        state, starts, decay: as in `strict_linear_attention`.
        passed: x * y that dropout lets through, which are then divided by 1 - dropout. None is all, undivided.
        norm_eps: of the norm of what was read.
        x_before: added to x; it is what a level before this one returned. None is nothing, and no x is returned.

    Returns:
        u; the memory after the last token, in fp32 (fp64 where v is); how many x and how many x * y were not 0, before
        dropout, over all tokens and neurons; and x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a forced backend that cannot run this.
    """
    _check(v, encoder, gate, decoder, cos, sin, state, starts, decay, passed, x_before)
    how = dict(
        state=state, starts=starts, decay=decay, passed=passed, dropout=dropout, norm_eps=norm_eps, x_before=x_before
    )
    if across.ranks() is not None:
        return level_of(attend)(v, encoder, gate, decoder, cos, sin, **how)
    able = lambda backend: _able(backend, v, encoder, x_before)
    name = choose(LEVELS, tokens=v.shape[1], device=v.device, able=able)
    return LEVELS[name](v, encoder, gate, decoder, cos, sin, **how)


def _able(backend: str, v: Tensor, encoder: Tensor, x_before: Tensor | None) -> bool:
    if backend == "triton":
        device = v.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
        return takes(v.new_empty(0, dtype=dtype))  # as x will be
    return x_before is None and level_cpp.usable(v, encoder)


def _check(v, encoder, gate, decoder, cos, sin, state, starts, decay, passed, x_before) -> None:
    if v.ndim != 3 or encoder.ndim != 3 or 0 in v.shape or 0 in encoder.shape or encoder.shape[1] % 2:
        raise ValueError(
            "bdh_level: v and encoder: expected [B, T, D] and [H, N, D], every size >= 1, N even, "
            f"got {tuple(v.shape)} and {tuple(encoder.shape)}"
        )
    (B, T, D), (H, N, _) = v.shape, encoder.shape
    turns = (B if cos.shape[0] == B else 1, T, N // 2)
    check_tensors(
        "bdh_level",
        dict(
            v=(v, v.shape), encoder=(encoder, (H, N, D)), gate=(gate, (H, N, D)), decoder=(decoder, (H, N, D)),
            cos=(cos, turns), sin=(sin, turns), state=(state, (B, H, N, D)), starts=(starts, (B, T)),
            decay=(decay, (H,)), passed=(passed, (B, H, N, T)), x_before=(x_before, (B, H, T, N)),
        ),
        like="v",
    )  # fmt: skip
