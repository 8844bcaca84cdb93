"""ovq_attention: the public op. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import across
from seqzoo.kernels.checks import KINDS, check_tensors
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.ovq_attention import cpp, gpu
from seqzoo.kernels.ovq_attention.chunked import ovq_attention_chunked
from seqzoo.kernels.ovq_attention.reference import ovq_attention_reference
from seqzoo.kernels.ovq_attention.rule import OVQRule, OVQState

BACKENDS = {
    "reference": ovq_attention_reference,
    "torch": ovq_attention_chunked,
    "cpp": cpp.ovq_attention_cpp,
    "triton": gpu.ovq_attention_triton,
}


def ovq_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    scale: Float[Tensor, " H"],
    rule: OVQRule,
    *,
    state: OVQState | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    valid: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], OVQState | None]:
    """Look at the open chunk's tokens, and at all before them through a few means. Definition: `reference.py`.

    Args:
        q, k: query and key, used as they are; give both unit length.
        v: value; H is a multiple of its G heads, each of which has a memory, and serves H / G query heads.
        scale: of each query head's logits, as sqrt K.
        rule: the memory's size and how it is written; the chunk is a part of it, and changes what comes out.
        state: of the tokens before, from `OVQState.empty` or the last call; None is none, and none is handed back.
        starts: True at the first token of each packed document, which sees nothing before it and begins a chunk; a row
            continues `state` up to its first start. None is no start at all.
        valid: False for padding, which stands on the left, is seen by nobody, and reads nothing. None is all valid.

    Returns:
        What was read, in v's dtype, zeros for padding; and, if a state came in, the next one.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token, or a forced backend that is not there.
    """
    _check(q, k, v, scale, rule, state, starts, valid)
    if (split := across.ranks()) is not None:  # chunks cannot be put together: each moves what the next finds
        across.check_whole("ovq_attention", state)
        B, T = v.shape[:2]
        marks = (v.new_zeros(B, T) if starts is None else starts), (v.new_ones(B, T) if valid is None else valid)
        starts, valid = (across.joined(x.float()) > 0 for x in marks)
        q, k, v = (across.joined(x) for x in (q, k, v))
        with across.split_sequence(None):
            o, _ = ovq_attention(q, k, v, scale, rule, starts=starts, valid=valid)
        return o[:, split.rank * T : (split.rank + 1) * T], None
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, scale, *(state or ())))
    traced = torch.compiler.is_compiling()  # torch.compile, which needs a compiler itself
    here = dict(
        cpp=lambda: cpp.takes(v, rule, learns, state) and (traced or cpp.usable()), triton=lambda: gpu.runs(q, v)
    )
    name = choose(  # one token too: the definition loops over heads
        BACKENDS, tokens=2, device=q.device, able=lambda name: here[name]()
    )
    run = BACKENDS[name]
    if traced and (state, starts, valid) != (None, None, None):  # what is done depends on them: a break in the graph
        run = torch.compiler.disable(run)
    with torch.autocast(v.device.type, enabled=False):  # a rounded key may end up in another slot
        return run(q, k, v, scale, rule, state, starts, valid)


def _check(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, rule: OVQRule, state: OVQState | None, starts: Tensor | None,
    valid: Tensor | None,
) -> None:  # fmt: skip
    for name, x, kind in (("rule", rule, OVQRule), ("scale", scale, Tensor), ("state", state, OVQState | None)):
        if not isinstance(x, kind):
            raise ValueError(f"ovq_attention: {name}: expected {kind}, got {type(x)}")
    if q.ndim != 4 or v.ndim != 4 or 0 in q.shape or 0 in v.shape:
        raise ValueError(
            "ovq_attention: q and v: expected [B, T, H, K] and [B, T, G, V], every size >= 1, "
            f"got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    if H % G:
        raise ValueError(f"ovq_attention: q: expected a multiple of v's {G} heads, got {H}")
    wanted = dict(q=(q, (B, T, H, K)), k=(k, (B, T, G, K)), v=(v, (B, T, G, V)), scale=(scale, (H,)))
    wanted |= dict(starts=(starts, (B, T)), valid=(valid, (B, T)))
    if state is not None:
        N, C = rule.slots, rule.chunk
        shapes = ((B, G, N, K + V), (B, G, N), (B, C - 1, G, K + V), (B,))
        wanted |= {f"state.{name}": x for name, *x in zip(state._fields, state, shapes, strict=True)}
    check_tensors("ovq_attention", wanted, like="q", kinds=KINDS | {"state.tokens": torch.int64})
