"""kimi_delta_rule: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import across
from seqzoo.kernels.checks import check_tensors
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.fla import usable as has_fla
from seqzoo.kernels.kimi_delta_rule import gpu
from seqzoo.kernels.kimi_delta_rule.chunked import kimi_delta_rule_chunked
from seqzoo.kernels.kimi_delta_rule.fla import kimi_delta_rule_fla
from seqzoo.kernels.kimi_delta_rule.reference import kimi_delta_rule_reference

BACKENDS = {
    "reference": kimi_delta_rule_reference,
    "torch": kimi_delta_rule_chunked,
    "triton": gpu.kimi_delta_rule_triton,
    "fla": kimi_delta_rule_fla,  # bfloat16 and float16 on a GPU
}


def kimi_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Correct an associative memory whose key channels fade each at its own rate, and read it, token by token.

    Definition: `reference.py`; Kimi Delta Attention, arXiv 2510.26692.

    Args:
        q, k: query and key, used as they are; give k unit length, or the memory may grow without bound.
        v: value.
        g: natural log of the decay per token of each key channel, <= 0. A value of -inf forgets the channel.
        beta: step size, 0 (keep) to 1 (overwrite).
        state: the memory before the first token; None is zeros. It is used up: where no gradient is recorded, the
            memory after the last token may be written over it.
        starts: True at the first token of each packed document, where the memory is emptied before the token; a row
            continues `state` up to its first start. None is no start at all.

    Returns:
        What was read, in v's dtype, and the memory after the last token, in fp32 (fp64 where v is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token, or a forced backend that cannot run this.
    """
    _check(q, v, k, g, beta, state, starts)
    if across.ranks() is not None:
        across.check_whole("kimi_delta_rule", state)
        return across.recurrence(lambda v, memory: _run(q, k, v, g, beta, memory, starts), v, (q.shape[3],))
    return _run(q, k, v, g, beta, state, starts)


def _run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    name = choose(BACKENDS, tokens=v.shape[1], device=v.device, able=lambda backend: _able(backend, q, v))
    if not torch.is_autocast_enabled(v.device.type):
        return BACKENDS[name](q, k, v, g, beta, state, starts)
    with torch.autocast(v.device.type, enabled=False):  # the memory stays in fp32
        return BACKENDS[name](q, k, v, g, beta, state, starts)


def _able(backend: str, q: Tensor, v: Tensor) -> bool:
    """Ours has not been timed on a GPU beside the package's, which comes first where it is there and can."""
    packaged = v.dtype in (torch.bfloat16, torch.float16) and has_fla()
    return gpu.able(q, v) and not packaged if backend == "triton" else packaged


def _check(
    q: Tensor, v: Tensor, k: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None
) -> None:
    if q.ndim != 4 or v.ndim != 4 or 0 in q.shape or 0 in v.shape:
        raise ValueError(
            "kimi_delta_rule: q and v: expected [B, T, H, K] and [B, T, H, V], every size >= 1, "
            f"got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    (B, T, H, K), V = q.shape, v.shape[3]
    check_tensors(
        "kimi_delta_rule",
        dict(
            q=(q, q.shape), k=(k, (B, T, H, K)), v=(v, (B, T, H, V)), g=(g, (B, T, H, K)), beta=(beta, (B, T, H)),
            state=(state, (B, H, K, V)), starts=(starts, (B, T)),
        ),
        like="q",
    )  # fmt: skip
