"""OVQ attention in C++ on a CPU: `ovq.cpp`, compiled on first use, forward and backward.

Computed in float32. Of training it keeps the inputs, the outputs and each token's slot. Two runs give the same bits, a
document the same alone and packed. A state's gradients, and the options that `takes` refuses, are the torch backend's.
"""

import ctypes
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native.calls import Calls
from seqzoo.kernels.ovq_attention.layout import Document, documents
from seqzoo.kernels.ovq_attention.rule import CHOICES, OVQRule, OVQState

NATIVE = Calls("ovq_attention", Path(__file__).with_name("ovq.cpp"))
usable = NATIVE.usable
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(ctypes.Structure):
    """Arguments of the native functions: the fields of ovq.cpp's Call, in order."""

    _fields_ = [
        *((name, c_int64) for name in ("documents", "T", "S", "H", "G", "K", "V", "chunk", "slots", "schedule")),
        *((name, c_int64) for name in ("horizon", "shared", "log_count", "threads")),
        *((name, c_void_p) for name in ("table", "q", "kv", "past", "past_counts", "memory", "counts", "o", "logsum")),
        *((name, c_void_p) for name in ("slot", "d_o", "d_q", "d_kv")),
    ]


def takes(v: Tensor, rule: OVQRule, learns: bool, state: OVQState | None) -> bool:
    """Whether this backend is for such a call."""
    plain = rule.similarity == "dot" and rule.choice == "novel" and rule.step is None
    plain &= not (rule.norm_correction or rule.renormalise or rule.detach)
    return v.device.type == "cpu" and v.dtype in DTYPES and plain and not (learns and state is not None)


def ovq_attention_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    rule: OVQRule,
    state: OVQState | None = None,
    starts: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, OVQState | None]:
    """Same as `ovq_attention_reference`.

    Raises:
        ValueError: what `takes` refuses.
        BuildError: no compiler that works.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, scale, *(state or ())))
    if not takes(v, rule, learns, state):
        what = f"{v.dtype} on {v.device}, {rule}, {'with' if state else 'without'} a state"
        raise ValueError(f"ovq_attention: backend cpp: expected plain options in up to float32 on a CPU, got {what}")
    kv, seen = torch.cat([k, v], dim=-1), [0] * len(q) if state is None else state.tokens.tolist()
    if state is not None:
        kv = torch.cat([state.pending.to(kv.dtype), kv], dim=1)
    found = documents(q.shape[1], rule.chunk, seen, starts, valid, keep=state is not None)
    table = torch.tensor(found, dtype=torch.int64).view(-1, len(Document._fields))
    q = q.float() * scale.float()[:, None]
    if state is None:
        sizes = [*_rule(rule), v.shape[-1], valid is None]
        return _differentiable(q, kv.float(), table, sizes, learns)[0].to(v.dtype), None
    o, after = _with_state(q, kv.float(), table, found, rule, state, valid is None)
    tokens = {d.row: d.merged + d.pending + d.end - d.begin for d in found if d.end == q.shape[1]}
    pending, idle = kv[:, q.shape[1] :], [row for row in range(len(q)) if row not in tokens]
    if idle:
        pending = pending.index_copy(0, torch.tensor(idle), kv[idle, : rule.chunk - 1])
    tokens = torch.tensor([tokens.get(row, before) for row, before in enumerate(seen)])
    return o.to(v.dtype), OVQState(*after, pending, tokens)


def _rule(rule: OVQRule) -> list[int]:
    schedule = CHOICES["schedule"].index(rule.schedule)
    return [rule.chunk, rule.slots, schedule, rule.horizon or 1, rule.first_chunk == "shared", rule.log_count]


def _call(q: Tensor, kv: Tensor, table: Tensor, sizes: list[int]) -> Call:
    T, H, K = q.shape[1:]
    held = q.contiguous(), kv.contiguous(), table
    call = Call(len(table), T, kv.shape[1], H, kv.shape[2], K, kv.shape[3] - K, *sizes, torch.get_num_threads())
    call.q, call.kv, call.table = (x.data_ptr() for x in held)
    call.held = held  # as long as the addresses are used
    return call


def _with_state(q, kv, table, found, rule, state, everywhere: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o, and memory and counts after; the very ones that came where nothing is merged into them or begun."""
    past = [x.float().contiguous() for x in state[:2]]
    same = all(d.merged and not d.writes for d in found)
    after = past if same else [x.clone() for x in past]
    o = (q.new_empty if everywhere else q.new_zeros)(*q.shape[:3], kv.shape[3] - q.shape[3])
    call = _call(q, kv, table, _rule(rule))
    call.past, call.past_counts, call.memory, call.counts = (x.data_ptr() for x in (*past, *after))
    call.o = o.data_ptr()
    NATIVE.run("forward", call)
    return o, tuple(after)


@torch.library.custom_op("seqzoo::ovq_attention_cpp", mutates_args=())
def _differentiable(
    q: Tensor, kv: Tensor, table: Tensor, sizes: list[int], learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o; where it `learns`, the logarithm of each query's sum and each token's slot, for backward."""
    *rule, V, everywhere = sizes
    new = q.new_empty if everywhere else q.new_zeros
    o, logsum = new(*q.shape[:3], V), q.new_empty(q.shape[:3] if learns else 0)
    slot = q.new_empty(kv.shape[:3] if learns else 0, dtype=torch.int32)
    call = _call(q, kv, table, rule)
    call.o = o.data_ptr()
    if learns:
        call.logsum, call.slot = logsum.data_ptr(), slot.data_ptr()
    NATIVE.run("forward", call)
    return o, logsum, slot


@_differentiable.register_fake
def _(q, kv, table, sizes, learns):
    o, logsum = q.new_empty(*q.shape[:3], sizes[-2]), q.new_empty(q.shape[:3] if learns else 0)
    return o, logsum, q.new_empty(kv.shape[:3] if learns else 0, dtype=torch.int32)


@torch.library.custom_op("seqzoo::ovq_attention_cpp_backward", mutates_args=())
def _gradients(
    d_o: Tensor, q: Tensor, kv: Tensor, table: Tensor, o: Tensor, logsum: Tensor, slot: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv."""
    *rule, _, everywhere = sizes
    d_o, call = d_o.contiguous(), _call(q, kv, table, rule)
    d_q, d_kv = (x.new_empty(x.shape) if everywhere else x.new_zeros(x.shape) for x in (q, kv))
    call.d_o, call.o, call.logsum, call.slot = (x.data_ptr() for x in (d_o, o, logsum, slot))
    call.d_q, call.d_kv = d_q.data_ptr(), d_kv.data_ptr()
    NATIVE.run("backward", call)
    return d_q, d_kv


@_gradients.register_fake
def _(d_o, q, kv, table, o, logsum, slot, sizes):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _remember(ctx, inputs, output):
    q, kv, table, ctx.sizes, _ = inputs
    ctx.save_for_backward(q, kv, table, *output)


def _backward(ctx, d_o, *_):
    return *_gradients(d_o, *ctx.saved_tensors, ctx.sizes), None, None, None


_differentiable.register_autograd(_backward, setup_context=_remember)
