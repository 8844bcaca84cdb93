"""Online vector-quantised attention (OVQ): its definition.

A document is cut into chunks of C tokens. What is older than the open chunk is seen through slots only, each the mean
D = [Dk | Dv] of the keys and values of n tokens. With t tokens in M = N_t slots, a query of the open chunk, which began
at token b = t, reads by one softmax over slots and tokens

    logit(m) = s <q_i, Dk_m> + log n_m      m = 1 .. M              of value Dv_m
    logit(j) = s <q_i, k_j>                 b <= j <= i             of value v_j

and when the chunk is full, its tokens become N_{t+C} - M new slots, or join old ones:

    r_i = max_m <k_i, Dk_m>,  a_i = argmax       likeness to the old slots, and the slot it is most like
    a_i = M + 1, M + 2, ...                      for the tokens of smallest r_i, as many as there are new slots
    n'_m = n_m + #{i: a_i = m}
    D'_m = D_m + sum_{i: a_i = m} eta_m ([k_i | v_i] - D_m)         eta_m = 1 / n'_m: the mean of all its tokens

What a_i is in the first chunk, and other choices of N_t, a, eta and the logits: `OVQRule`. a and n carry no gradient.

Source: Alonso, Figliolia & Millidge 2026, arXiv 2602.03922. Its idea and the mean update are the paper's; it was not at
hand in full. The plateau schedule, the choice of new slots, logits and the missing straight-through estimator follow a
public re-implementation (arXiv 2605.09877); "farthest" first chunks are ours, "shared" ones its own.
Open in the source, and the option for another reading: how N_t grows (`schedule`); how new slots and a_i are chosen
(`first_chunk`, `choice`, `similarity`); eta (`step`); whether means are brought back to unit length, or their norms are
in the logits (`renormalise`, `norm_correction`); whether counts are (`log_count`); whether gradients end at a chunk
(`detach`). Open too, without an option: s, which the caller gives, and whether the chunk before the open one is exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.ovq_attention.rule import OVQRule, OVQState


def read(q: Tensor, scale: Tensor, memory: Tensor, counts: Tensor, pending: Tensor, rule: OVQRule) -> Tensor:
    """The queries of one token: q [r, K], scale [r], memory [M, K+V], counts [M], pending [c, K+V] -> o [r, V]."""
    K = q.shape[-1]
    slots = scale[:, None] * (q @ memory[:, :K].mT)
    if rule.log_count:
        slots = slots + counts.log()
    if rule.norm_correction:
        slots = slots - scale[:, None] / 2 * (memory[:, :K].square().sum(-1) - 1)
    logits = torch.cat([slots, scale[:, None] * (q @ pending[:, :K].mT)], dim=-1)
    return logits.softmax(-1) @ torch.cat([memory, pending])[:, K:]


def write(memory: Tensor, counts: Tensor, chunk: Tensor, K: int, t: int, rule: OVQRule) -> tuple[Tensor, Tensor]:
    """A full chunk [C, K+V], the first of whose tokens is token t, into memory [M, K+V] -> [M', K+V] and counts."""
    M, grown = rule.used(t), rule.used(t + rule.chunk)
    slot = assign(chunk[:, :K].detach(), memory[:, :K].detach(), grown - M, t, rule)
    old, n = F.pad(memory, (0, 0, 0, grown - M)), F.pad(counts, (0, grown - M))
    added = slot.bincount(minlength=grown).to(n)
    step = 1 / (n + added).clamp(min=1)
    if rule.step is not None:
        step = torch.where(n == 0, step, (1 / added).clamp(max=rule.step))
    new = old.index_add(0, slot, step[slot, None] * (chunk - old[slot]))
    if rule.renormalise:
        new = torch.cat([F.normalize(new[:, :K], dim=-1), new[:, K:]], dim=-1)
    return (new.detach() if rule.detach else new), n + added


def assign(k: Tensor, slots: Tensor, new: int, t: int, rule: OVQRule) -> Tensor:
    """The slot [C] of each key [C, K]: one of the old ones [M, K], or of as many new ones behind them."""
    if rule.similarity == "cosine":
        k, slots = F.normalize(k, dim=-1), F.normalize(slots, dim=-1)
    if len(slots) == 0:
        return assign_first(k @ k.mT, new, rule)
    likeness, slot = (k @ slots.mT).max(-1)
    order = likeness.argsort(stable=True) if rule.choice == "novel" else rule.scatter(t, k.device)
    slot[order[:new]] = torch.arange(len(slots), len(slots) + new, device=slot.device)
    return slot


def assign_first(likeness: Tensor, new: int, rule: OVQRule) -> Tensor:
    """The same where no slot is in use; likeness [C, C] of the chunk's keys."""
    if rule.first_chunk == "shared":
        chosen = [0, *(1 + likeness[0, 1:].argsort(stable=True)).tolist()][:new]
        slot = torch.zeros(len(likeness), dtype=torch.int64, device=likeness.device)
    else:
        chosen = [0]
        while len(chosen) < new:
            covered = likeness[chosen].amax(0)
            covered[chosen] = torch.inf
            chosen.append(int(covered.argmin()))
        slot = likeness[:, chosen].argmax(-1)
    slot[chosen] = torch.arange(new, device=slot.device)
    return slot


def ovq_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    rule: OVQRule,
    state: OVQState | None = None,
    starts: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, OVQState | None]:
    """Row by row, token by token, head by head. Shapes and units: `op.ovq_attention`."""
    rows = [
        _row(q[b], k[b], v[b], scale, rule, state and OVQState(*(x[b] for x in state)),
             None if starts is None else starts[b], None if valid is None else valid[b])
        for b in range(q.shape[0])
    ]  # fmt: skip
    outputs, states = zip(*rows, strict=True)
    after = None if state is None else OVQState(*(torch.stack(x) for x in zip(*states, strict=True)))
    return torch.stack(outputs), after


def _row(q, k, v, scale, rule, state, starts, valid) -> tuple[Tensor, OVQState | None]:
    """The same of one row, without the batch dimension."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    (T, H, K), G, kv = q.shape, k.shape[1], torch.cat([k, v], dim=-1)
    q, scale = q.to(dtype).unflatten(1, (G, H // G)), scale.to(dtype).unflatten(0, (G, H // G))
    nothing = [kv.new_zeros(0, kv.shape[-1], dtype=dtype)] * G, [kv.new_zeros(0, dtype=dtype)] * G
    (memory, counts), t, pending = nothing, 0, []
    if state is not None:
        t = int(state.tokens) // rule.chunk * rule.chunk
        memory, counts = ([x[g, : rule.used(t)].to(dtype) for g in range(G)] for x in state[:2])
        pending = list(state.pending[rule.chunk - 1 - int(state.tokens) % rule.chunk :].to(kv.dtype))
    outputs = []
    for i in range(T):
        if valid is not None and not valid[i]:
            outputs.append(q.new_zeros(H, v.shape[-1]))
            continue
        if starts is not None and starts[i]:
            (memory, counts), t, pending = nothing, 0, []
        pending.append(kv[i])
        chunk = torch.stack(pending, dim=1).to(dtype)  # [G, c, K + V]
        outputs.append(torch.cat([read(q[i, g], scale[g], memory[g], counts[g], chunk[g], rule) for g in range(G)]))
        if len(pending) == rule.chunk:
            written = [write(memory[g], counts[g], chunk[g], K, t, rule) for g in range(G)]
            (memory, counts), t, pending = map(list, zip(*written, strict=True)), t + rule.chunk, []
    o = torch.stack(outputs).to(v.dtype)
    if state is None:
        return o, None
    unused = rule.slots - rule.used(t)
    return o, OVQState(
        torch.stack([F.pad(x, (0, 0, 0, unused)) for x in memory]),
        torch.stack([F.pad(x, (0, unused)) for x in counts]),
        torch.cat([state.pending.to(kv.dtype), *(x[None] for x in pending)])[len(pending) :],
        state.tokens.new_tensor(t + len(pending)),
    )
