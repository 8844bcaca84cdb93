"""momentum_delta_rule: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import across
from seqzoo.kernels.checks import check_tensors
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import takes
from seqzoo.kernels.momentum_delta_rule import gpu
from seqzoo.kernels.momentum_delta_rule.chunked import momentum_delta_rule_chunked
from seqzoo.kernels.momentum_delta_rule.reference import momentum_delta_rule_reference

BACKENDS = {
    "reference": momentum_delta_rule_reference,
    "torch": momentum_delta_rule_chunked,
    "triton": gpu.momentum_delta_rule_triton,
}


def momentum_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    p: Float[Tensor, "B T HP K"],
    log_alpha: Float[Tensor, "B T HV"],
    log_mu: Float[Tensor, "B T HV"],
    beta: Float[Tensor, "B T HV"],
    eta: Float[Tensor, "B T HV"],
    *,
    state: Float[Tensor, "B HV 2 K V"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "B HV 2 K V"]]:
    """Correct an associative memory by a moving sum of its errors, and read it. Definition: `reference.py`.

    Exact for decays of any strength: in fp32 as near to fp64 as the recurrence itself. (Measured over 256 tokens of
    constant log_mu, from 0 to -20: output, state and all gradients within a relative error of 1e-6.)

    Args:
        q, k: query and key, used as they are; give k unit length, or the memory may grow without bound.
        v: value; each of its HV heads has its memories, and reads key head h // (HV / H).
        p: where the memory is asked before it is corrected: k, or k times alpha, which asks the faded memory; as many
            heads as k, or as v.
        log_alpha, log_mu: natural logs of the decay per token of the memory and of what is gathered, finite and <= 0.
        beta: step size from what was gathered to the memory, >= 0.
        eta: weight of a token's error in what is gathered, >= 0. Of one key asked at p = k for ever, the memory
            oscillates and settles where beta eta < (1 + alpha)(1 + mu).
        state: memory and gathered errors, [S, M], before the first token; None is zeros. It is used up.
        starts: True at the first token of each packed document, where both are emptied before the token; a row
            continues `state` up to its first start. None is no start at all.

    Returns:
        What was read, in v's dtype, and [S, M] after the last token, in fp32 (fp64 where v is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token, or a forced backend that cannot run this.
    """
    _check(q, v, p, k=k, log_alpha=log_alpha, log_mu=log_mu, beta=beta, eta=eta, state=state, starts=starts)
    gates = log_alpha, log_mu, beta, eta
    if across.ranks() is not None:
        across.check_whole("momentum_delta_rule", state)
        return across.recurrence(lambda v, memory: _run(q, k, v, p, gates, memory, starts), v, (2, q.shape[3]))
    return _run(q, k, v, p, gates, state, starts)


def _run(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, gates: tuple[Tensor, ...], state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    able = lambda backend: takes(q) and q.dtype == k.dtype == v.dtype == p.dtype and q.shape[3] <= gpu.WIDEST
    name = choose(BACKENDS, tokens=v.shape[1], device=v.device, able=able)
    with torch.autocast(v.device.type, enabled=False):  # the memory stays in fp32
        return BACKENDS[name](q, k, v, p, *gates, state, starts)


def _check(q: Tensor, v: Tensor, p: Tensor, **others: Tensor | None) -> None:
    if q.ndim != 4 or v.ndim != 4 or p.ndim != 4 or 0 in (*q.shape, *v.shape, *p.shape):
        raise ValueError(
            "momentum_delta_rule: q, v and p: expected [B, T, H, K], [B, T, HV, V] and [B, T, HP, K], every size >= 1, "
            f"got {tuple(q.shape)}, {tuple(v.shape)} and {tuple(p.shape)}"
        )
    (B, T, H, K), (HV, V), HP = q.shape, v.shape[2:], p.shape[2]
    for name, heads in dict(q=H, p=HP).items():
        if HV % heads:
            raise ValueError(f"momentum_delta_rule: v: expected a multiple of {name}'s {heads} heads, got {HV}")
    shapes = dict(k=q.shape, state=(B, HV, 2, K, V), starts=(B, T))
    expected = dict(q=(q, q.shape), v=(v, (B, T, HV, V)), p=(p, (B, T, HP, K)))
    expected |= {name: (x, shapes.get(name, (B, T, HV))) for name, x in others.items()}
    check_tensors("momentum_delta_rule", expected, like="q")
