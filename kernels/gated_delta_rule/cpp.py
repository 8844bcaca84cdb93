"""The gated delta rule in C++ on a CPU: `chunked.cpp`, compiled on first use, forward and backward.

float32 or bfloat16 in and out, sums and memory in float32; float16 is computed in float32. A sequence gets the same
bits alone and in a batch, and a document the same bits alone and packed.
"""

import ctypes
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import calls
from seqzoo.kernels.native.rows import address, rows

NATIVE = calls.Calls("gated_delta_rule", Path(__file__).with_name("chunked.cpp"), "chunks")
usable = NATIVE.usable
FEW = 4  # tokens up to which one after the other is faster than a chunk


class Call(ctypes.Structure):
    """Arguments of the native functions: the fields of chunked.cpp's Call, in order."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "HV", "K", "V", "threads", "qk_bf16", "v_bf16")),
        *((name, c_int64 * 3) for name in ("q_step", "k_step", "v_step")),
        *((name, c_void_p) for name in ("q", "k", "v", "g", "beta", "starts", "state")),
        ("has_state", c_int64),
        *((name, c_void_p) for name in ("o", "kept", "d_o", "d_state", "dq", "dk", "dv", "dg", "dbeta")),
    ]


def gated_delta_rule_cpp(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `gated_delta_rule_reference`; without gradients it may write the last memory over `state`.

    Raises:
        ValueError: float64, or tensors that are not on the CPU.
        BuildError: no compiler that works.
    """
    if v.dtype == torch.float64 or v.device.type != "cpu":
        raise ValueError(f"backend cpp: expected float32, bfloat16 or float16 on the CPU, got {v.dtype} on {v.device}")
    dtype = v.dtype
    common = torch.bfloat16 if q.dtype == k.dtype == torch.bfloat16 else torch.float32
    q, k = (rows(x.to(common)) for x in (q, k))
    v = rows(v.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32))
    g, beta = g.float().contiguous(), beta.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    learns = calls.learns(q, k, v, g, beta, state)
    if learns or torch.compiler.is_compiling():
        o, state, _ = _differentiable(q, k, v, g, beta, state, starts, learns)
    else:
        memory = calls.memory(state, _shape(q, v), copy=False)
        o = _forward(q, k, v, g, beta, memory, state is not None, starts)
        state = memory
    return o.to(dtype), state


def _shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Of the memory."""
    return v.shape[0], v.shape[2], k.shape[3], v.shape[3]


def _call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, starts: Tensor | None) -> Call:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    bf16 = torch.bfloat16
    return Call(
        *(B, T, H, HV, K, V, torch.get_num_threads(), q.dtype == bf16, v.dtype == bf16),
        *(x.stride()[:3] for x in (q, k, v)),
        *(address(x) for x in (q, k, v, g, beta, starts)),
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    memory: Tensor,
    has_state: bool,
    starts: Tensor | None,
    kept: Tensor | None = None,
) -> Tensor:
    """o; `memory` is written over. In float32, contiguous; `kept`: room for the memory at the start of each chunk."""
    call = _call(q, k, v, g, beta, starts)
    o = torch.empty(v.shape, dtype=v.dtype)
    call.state, call.has_state, call.o = memory.data_ptr(), has_state, o.data_ptr()
    call.kept = address(kept)
    NATIVE.run("steps" if kept is None and v.shape[1] <= FEW else "forward", call)
    return o


@torch.library.custom_op("seqzoo::gated_delta_rule_cpp", mutates_args=())
def _differentiable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last memory, and where `keep` the memory at the start of each chunk for backward."""
    memory = calls.memory(state, _shape(q, v), copy=True)
    kept = calls.kept(memory, NATIVE.run("chunks", _call(q, k, v, g, beta, starts)) if keep else 0)
    return _forward(q, k, v, g, beta, memory, state is not None, starts, kept if keep else None), memory, kept


@_differentiable.register_fake
def _(q, k, v, g, beta, state, starts, keep):
    memory = calls.memory(None, _shape(q, v), copy=True)
    return v.new_empty(v.shape), memory, calls.kept_fake(memory, keep)


@torch.library.custom_op("seqzoo::gated_delta_rule_cpp_backward", mutates_args=())
def _gradients(
    d_o: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    kept: Tensor,
    has_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the first memory."""
    d_o, d_state = d_o.contiguous(), d_last.clone(memory_format=torch.contiguous_format)
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, g, beta)]
    call = _call(q, k, v, g, beta, starts)
    call.has_state, call.kept, call.d_o, call.d_state = has_state, kept.data_ptr(), d_o.data_ptr(), d_state.data_ptr()
    call.dq, call.dk, call.dv, call.dg, call.dbeta = (x.data_ptr() for x in grads)
    grouped = [torch.empty(*v.shape[:3], q.shape[3]) for _ in range(2)] if v.shape[2] > q.shape[2] else []
    NATIVE.run("backward", call, *([x.data_ptr() for x in grouped] or (None, None)))
    return *grads, d_state


@_gradients.register_fake
def _(d_o, d_last, q, k, v, g, beta, starts, kept, has_state):
    return *(x.new_empty(x.shape) for x in (q, k, v, g, beta)), d_last.new_empty(d_last.shape)


def _remember(ctx, inputs, output):
    q, k, v, g, beta, state, starts, _ = inputs
    ctx.save_for_backward(q, k, v, g, beta, starts, output[2])
    ctx.state_dtype = None if state is None else state.dtype
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, d_o, d_last, _):
    *inputs, kept = ctx.saved_tensors
    *grads, d_state = _gradients(d_o, d_last, *inputs, kept, ctx.state_dtype is not None)
    return *grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None


_differentiable.register_autograd(_backward, setup_context=_remember)
