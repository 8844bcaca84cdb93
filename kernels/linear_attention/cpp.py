"""Linear attention in C++ on a CPU: `linear_attention.cpp`, compiled on first use, forward and backward.

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

NATIVE = calls.Calls("linear_attention", Path(__file__).with_name("linear_attention.cpp"), "segments")
usable = NATIVE.usable
FEW = 4  # tokens up to which one after the other is faster than a chunk


class Call(ctypes.Structure):
    """Arguments of the native functions: the fields of linear_attention.cpp's Call, in order."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "G", "K", "V", "threads", "is_bf16", "decays")),
        *((name, c_int64 * 3) for name in ("q_step", "k_step", "v_step")),
        *((name, c_void_p) for name in ("q", "k", "v", "g", "starts", "state")),
        ("has_state", c_int64),
        *((name, c_void_p) for name in ("o", "kept", "d_o", "d_state", "dq", "dk", "dv", "dg")),
    ]


def linear_attention_cpp(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `linear_attention_reference`; without gradients it may write the last memory over `state`.

    Raises:
        ValueError: float64, or tensors that are not on the CPU.
        BuildError: no compiler that works.
    """
    if v.dtype == torch.float64 or v.device.type != "cpu":
        raise ValueError(f"backend cpp: expected float32, bfloat16 or float16 on the CPU, got {v.dtype} on {v.device}")
    dtype = v.dtype
    common = torch.bfloat16 if q.dtype == k.dtype == dtype == torch.bfloat16 else torch.float32
    q, k, v = (rows(x.to(common)) for x in (q, k, v))
    g = None if g is None else g.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    learns = calls.learns(q, k, v, g, state)
    if learns or torch.compiler.is_compiling():
        o, state, _ = _differentiable(q, k, v, g, state, starts, learns)
    else:
        memory = calls.memory(state, _shape(k, v), copy=False)
        o = _forward(q, k, v, g, memory, state is not None, starts)
        state = memory
    return o.to(dtype), state


def _shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Of the memory."""
    return v.shape[0], v.shape[2], k.shape[3], v.shape[3]


def _out(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


def _call(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, starts: Tensor | None) -> Call:
    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    decays = 0 if g is None else g[0, 0, 0].numel()
    return Call(
        *(B, T, H, G, K, V, torch.get_num_threads(), v.dtype == torch.bfloat16, decays),
        *(x.stride()[:3] for x in (q, k, v)),
        *(address(x) for x in (q, k, v, g, starts)),
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor,
    has_state: bool,
    starts: Tensor | None,
    kept: Tensor | None = None,
) -> Tensor:
    """o; `memory` is written over. In float32, contiguous; `kept`: room for the memory at the start of each segment."""
    call, o = _call(q, k, v, g, starts), _out(q, v)
    call.state, call.has_state, call.o = memory.data_ptr(), has_state, o.data_ptr()
    call.kept = address(kept)
    NATIVE.run("steps" if kept is None and v.shape[1] <= FEW else "forward", call)
    return o


@torch.library.custom_op("seqzoo::linear_attention_cpp", mutates_args=())
def _differentiable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the last memory, and where `keep` the memory at the start of each segment for backward."""
    memory = calls.memory(state, _shape(k, v), copy=True)
    kept = calls.kept(memory, NATIVE.run("segments", _call(q, k, v, g, starts)) if keep else 0)
    return _forward(q, k, v, g, memory, state is not None, starts, kept if keep else None), memory, kept


@_differentiable.register_fake
def _(q, k, v, g, state, starts, keep):
    memory = calls.memory(None, _shape(k, v), copy=True)
    return _out(q, v), memory, calls.kept_fake(memory, keep)


@torch.library.custom_op("seqzoo::linear_attention_cpp_backward", mutates_args=())
def _gradients(
    d_o: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
    has_state: bool,
) -> list[Tensor]:
    """Gradients of the first memory, q, k, v and, where there is one, g."""
    d_o, d_state = d_o.contiguous(), d_last.clone(memory_format=torch.contiguous_format)
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, g) if x is not None]
    call = _call(q, k, v, g, starts)
    call.has_state, call.kept, call.d_o, call.d_state = has_state, kept.data_ptr(), d_o.data_ptr(), d_state.data_ptr()
    for name, x in zip(("dq", "dk", "dv", "dg"), grads, strict=False):
        setattr(call, name, x.data_ptr())
    NATIVE.run("backward", call)
    return [d_state, *grads]


@_gradients.register_fake
def _(d_o, d_last, q, k, v, g, starts, kept, has_state):
    return [d_last.new_empty(d_last.shape), *(x.new_empty(x.shape) for x in (q, k, v, g) if x is not None)]


def _remember(ctx, inputs, output):
    q, k, v, g, state, starts, _ = inputs
    ctx.save_for_backward(q, k, v, g, starts, output[2])
    ctx.state_dtype = None if state is None else state.dtype
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, d_o, d_last, _):
    *inputs, kept = ctx.saved_tensors
    d_state, dq, dk, dv, *dg = _gradients(d_o, d_last, *inputs, kept, ctx.state_dtype is not None)
    d_state = None if ctx.state_dtype is None else d_state.to(ctx.state_dtype)
    return dq, dk, dv, dg[0] if dg else None, d_state, None, None


_differentiable.register_autograd(_backward, setup_context=_remember)
