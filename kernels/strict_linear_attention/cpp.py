"""Strict linear attention in C++ on a CPU: `strict.cpp`, compiled on first use; float32, forward and backward.

A sequence gets the same bits alone and in a batch, and a document the same bits alone and packed.
"""

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels import native

SOURCE = Path(__file__).with_name("strict.cpp")


class Call(ctypes.Structure):
    """Arguments of the native functions: the fields of strict.cpp's Call, in order."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "G", "N", "D", "threads", "has_state")),
        *((name, c_void_p) for name in ("r", "v", "decay", "starts", "state", "a", "kept")),
        *((name, c_void_p) for name in ("da", "d_state", "dr", "dv")),
    ]


def usable() -> bool:
    """Whether this machine can build and load it; logs once why not. torch.compile needs a compiler itself."""
    return torch.compiler.is_compiling() or native.usable("strict_linear_attention", SOURCE)


@cache
def _library() -> ctypes.CDLL:
    library = native.library("strict_linear_attention", [SOURCE])
    for name, result in (("segments", c_int64), ("forward", None), ("backward", None)):
        function = getattr(library, f"strict_linear_attention_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(Call)], result
    return library


def strict_linear_attention_cpp(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None = None, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `strict_linear_attention_reference`; without gradients it may write the last memory over `state`.

    Raises:
        ValueError: another dtype than float32, or tensors that are not on the CPU.
        BuildError: no compiler that works.
    """
    if not r.dtype == v.dtype == torch.float32 or v.device.type != "cpu":
        raise ValueError(
            f"strict_linear_attention: backend cpp: expected float32 on the CPU, got {v.dtype} on {v.device}"
        )
    r, v, decay = r.contiguous(), v.contiguous(), None if decay is None else decay.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, v, state))
    if learns or torch.compiler.is_compiling():
        return _differentiable(r, v, state, starts, decay, learns)[:2]
    memory = _memory(r, v) if state is None else state.float().contiguous()
    return _forward(_call(r, v, starts, decay), r, v, memory, state is not None, None), memory


def _memory(r: Tensor, v: Tensor) -> Tensor:
    return r.new_empty(r.shape[0], *r.shape[2:], v.shape[3])


def _call(r: Tensor, v: Tensor, starts: Tensor | None, decay: Tensor | None) -> Call:
    call = Call(*r.shape[:3], v.shape[2], r.shape[3], v.shape[3], torch.get_num_threads())
    call.held = (r, v, decay, starts)  # as long as the addresses are used
    call.r, call.v, call.decay, call.starts = (None if x is None else x.data_ptr() for x in call.held)
    return call


def _forward(call: Call, r: Tensor, v: Tensor, memory: Tensor, has_state: bool, kept: Tensor | None) -> Tensor:
    """a; `memory` is written over. kept: room for the memories that backward starts from."""
    a = v.new_empty(*r.shape[:3], v.shape[3])
    call.has_state, call.state, call.a = has_state, memory.data_ptr(), a.data_ptr()
    call.kept = None if kept is None else kept.data_ptr()
    _library().strict_linear_attention_forward(call)
    return a


@torch.library.custom_op("seqzoo::strict_linear_attention_cpp", mutates_args=())
def _differentiable(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, decay: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """a, the last memory, and where `keep` the memories for backward."""
    memory = _memory(r, v) if state is None else state.to(torch.float32, copy=True).contiguous()
    call = _call(r, v, starts, decay)
    call.has_state = state is not None
    kept = v.new_empty(_library().strict_linear_attention_segments(call), *memory.shape[1:]) if keep else None
    a = _forward(call, r, v, memory, state is not None, kept)
    return a, memory, v.new_empty(0) if kept is None else kept


@_differentiable.register_fake
def _(r, v, state, starts, decay, keep):
    memory = _memory(r, v)
    segments = torch.library.get_ctx().new_dynamic_size() if keep else 0
    kept = memory.new_empty(segments, *memory.shape[1:]) if keep else memory.new_empty(0)
    return v.new_empty(*r.shape[:3], v.shape[3]), memory, kept


@torch.library.custom_op("seqzoo::strict_linear_attention_cpp_backward", mutates_args=())
def _gradients(
    d_a: Tensor, d_last: Tensor, r: Tensor, v: Tensor, starts: Tensor | None, decay: Tensor | None, kept: Tensor,
    has_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r, v and the first memory."""
    d_a, d_state = d_a.contiguous(), d_last.clone(memory_format=torch.contiguous_format)
    call, d_r, each = _call(r, v, starts, decay), torch.empty_like(r), torch.empty_like(d_a)
    call.has_state, call.kept, call.da, call.d_state = has_state, kept.data_ptr(), d_a.data_ptr(), d_state.data_ptr()
    call.dr, call.dv = d_r.data_ptr(), each.data_ptr()
    _library().strict_linear_attention_backward(call)
    return d_r, each.unflatten(2, (v.shape[2], -1)).sum(3), d_state


@_gradients.register_fake
def _(d_a, d_last, r, v, *_):
    return r.new_empty(r.shape), v.new_empty(v.shape), d_last.new_empty(d_last.shape)


def _remember(ctx, inputs, output):
    r, v, state, starts, decay, _ = inputs
    ctx.save_for_backward(r, v, starts, decay, output[2])
    ctx.state_dtype = None if state is None else state.dtype
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, d_a, d_last, _):
    d_r, d_v, d_state = _gradients(d_a, d_last, *ctx.saved_tensors, ctx.state_dtype is not None)
    return d_r, d_v, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None, None


_differentiable.register_autograd(_backward, setup_context=_remember)
