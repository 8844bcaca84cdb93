"""The gated delta rule in C++ on a CPU: `chunked.cpp`, compiled on first use, forward and backward.

float32 or bfloat16 in and out, sums and memory in float32; float16 is computed in float32. A sequence gets the same
bits alone and in a batch, and a document the same bits alone and packed.
"""

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels import native

SOURCE = Path(__file__).with_name("chunked.cpp")
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


def usable() -> bool:
    """Whether this machine can build and load it; logs once why not. torch.compile needs a compiler itself."""
    return torch.compiler.is_compiling() or native.usable("gated_delta_rule", SOURCE)


@cache
def _library() -> ctypes.CDLL:
    library = native.library("gated_delta_rule", [SOURCE])
    library.gated_delta_rule_chunks.restype = c_int64
    for name in ("chunks", "forward", "backward", "steps"):
        getattr(library, f"gated_delta_rule_{name}").argtypes = [ctypes.POINTER(Call)]
    library.gated_delta_rule_backward.argtypes = [ctypes.POINTER(Call), c_void_p, c_void_p]
    for name in ("forward", "backward", "steps"):
        getattr(library, f"gated_delta_rule_{name}").restype = None
    return library


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
    q, k = (_rows(x, torch.bfloat16 if q.dtype == k.dtype == torch.bfloat16 else torch.float32) for x in (q, k))
    v = _rows(v, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    g, beta = g.float().contiguous(), beta.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    inputs = (q, k, v, g, beta) if state is None else (q, k, v, g, beta, state)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if learns or torch.compiler.is_compiling():
        o, state, _ = _differentiable(q, k, v, g, beta, state, starts, learns)
    else:
        memory = _memory(q, v) if state is None else state.float().contiguous()
        o = _forward(q, k, v, g, beta, memory, state is not None, starts)
        state = memory
    return o.to(dtype), state


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, the elements of a head adjacent; other strides may be any."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _memory(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def _call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, starts: Tensor | None) -> Call:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    bf16 = torch.bfloat16
    return Call(
        *(B, T, H, HV, K, V, torch.get_num_threads(), q.dtype == bf16, v.dtype == bf16),
        *(x.stride()[:3] for x in (q, k, v)),
        *(x.data_ptr() for x in (q, k, v, g, beta)),
        None if starts is None else starts.data_ptr(),
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
    if kept is not None:
        call.kept = kept.data_ptr()
    run = _library().gated_delta_rule_steps if kept is None and v.shape[1] <= FEW else None
    (run or _library().gated_delta_rule_forward)(call)
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
    memory = (
        _memory(q, v) if state is None else state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    )
    kept = None
    if keep:
        chunks = _library().gated_delta_rule_chunks(_call(q, k, v, g, beta, starts))
        kept = torch.empty(chunks, *memory.shape[1:])
    o = _forward(q, k, v, g, beta, memory, state is not None, starts, kept)
    return o, memory, memory.new_empty(0) if kept is None else kept


@_differentiable.register_fake
def _(q, k, v, g, beta, state, starts, keep):
    memory = _memory(q, v)
    kept = (
        memory.new_empty(torch.library.get_ctx().new_dynamic_size(), *memory.shape[1:]) if keep else memory.new_empty(0)
    )
    return v.new_empty(v.shape), memory, kept


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
    _library().gated_delta_rule_backward(call, *([x.data_ptr() for x in grouped] or (None, None)))
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
