"""strict_linear_attention: a public op. Above this folder nobody calls anything but this and `level.py`."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import across
from seqzoo.kernels.checks import check_tensors
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import takes
from seqzoo.kernels.strict_linear_attention import cpp
from seqzoo.kernels.strict_linear_attention.chunked import strict_linear_attention_chunked
from seqzoo.kernels.strict_linear_attention.gpu import strict_linear_attention_triton
from seqzoo.kernels.strict_linear_attention.reference import strict_linear_attention_reference

BACKENDS = {
    "reference": strict_linear_attention_reference,
    "torch": strict_linear_attention_chunked,
    "cpp": cpp.strict_linear_attention_cpp,
    "triton": strict_linear_attention_triton,
}


def strict_linear_attention(
    r: Float[Tensor, "B T H N"],
    v: Float[Tensor, "B T G D"],
    *,
    state: Float[Tensor, "B H N D"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    decay: Float[Tensor, " H"] | None = None,
) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B H N D"]]:
    """Read a memory with a key, then write under the same key. Definition: `reference.py`; arXiv 2509.26507.

    Args:
        r: what is query and key at once, used as it is.
        v: value; head h writes v of group h // (H / G).
        state: the memory before the first token; None is zeros. It is used up: where no gradient is recorded, the
            memory after the last token may be written over it.
        starts: True at the first token of each packed document, where the memory is emptied before the token; a row
            continues `state` up to its first start. None is no start at all.
        decay: natural log of what a head's memory keeps per token, <= 0; a constant, it gets no gradient. None is 0.

    Returns:
        What was read, in v's dtype, and the memory after the last token, in fp32 (fp64 where v is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token, or a forced backend that cannot run this.
    """
    _check(r, v, state, starts, decay)
    return attend(r, v, state, starts, decay)


def attend(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, unchecked, wherever the tokens are."""
    if across.ranks() is None:
        return _run(r, v, state, starts, decay)
    across.check_whole("strict_linear_attention", state)
    a, end = _run(r, v, None, starts, decay)
    (B, T, H), dtype = r.shape[:3], end.dtype
    with torch.autocast(v.device.type, enabled=False):
        rates = r.new_zeros(H, dtype=dtype) if decay is None else decay.to(dtype)
        same = across.open_from_begin(starts, (B, T), v.device)[..., None]
        left = (torch.arange(T + 1, device=v.device)[:, None] * rates).exp()  # [T + 1, H] of a memory, after t tokens
        transition = left[-1] * same[:, -1]
        before = across.memory_before(end, torch.mul, transition[..., None, None].expand(*end.shape[:3], 1))
        reads = r.to(dtype) * (left[:-1] * same)[..., None]
        a = a + torch.einsum("bthn,bhnd->bthd", reads, before).to(a.dtype)
        return a, end + transition[..., None, None] * before


def _run(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    name = choose(BACKENDS, tokens=v.shape[1], device=v.device, able=lambda backend: _able(backend, r, v))
    with torch.autocast(v.device.type, enabled=False):  # the memory stays in fp32
        return BACKENDS[name](r, v, state, starts, decay)


def _able(backend: str, r: Tensor, v: Tensor) -> bool:
    if backend == "triton":
        return r.dtype == v.dtype and takes(r)
    return v.dtype == r.dtype == torch.float32 and cpp.usable()


def _check(r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, decay: Tensor | None) -> None:
    if r.ndim != 4 or v.ndim != 4 or 0 in r.shape or 0 in v.shape or r.shape[:2] != v.shape[:2]:
        raise ValueError(
            "strict_linear_attention: r and v: expected [B, T, H, N] and [B, T, G, D], every size >= 1, "
            f"got {tuple(r.shape)} and {tuple(v.shape)}"
        )
    (B, T, H, N), (G, D) = r.shape, v.shape[2:]
    if H % G:
        raise ValueError(f"strict_linear_attention: v: expected a number of heads that divides r's {H}, got {G}")
    check_tensors(
        "strict_linear_attention",
        dict(v=(v, v.shape), r=(r, r.shape), state=(state, (B, H, N, D)), starts=(starts, (B, T)), decay=(decay, (H,))),
        like="v",
    )
