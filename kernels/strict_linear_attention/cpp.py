"""Strict linear attention in C++ on a CPU: `strict.cpp`, compiled on first use; float32, forward and backward.

A sequence gets the same bits alone and in a batch, and a document the same bits alone and packed.
"""

import ctypes
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import calls
from seqzoo.kernels.native.rows import address

NATIVE = calls.Calls("strict_linear_attention", Path(__file__).with_name("strict.cpp"), "segments")
usable = NATIVE.usable


class Call(ctypes.Structure):
    """Arguments of the native functions: the fields of strict.cpp's Call, in order."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "G", "N", "D", "threads", "has_state")),
        *((name, c_void_p) for name in ("r", "v", "decay", "starts", "state", "a", "kept")),
        *((name, c_void_p) for name in ("da", "d_state", "dr", "dv")),
    ]


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
    learns = calls.learns(r, v, state)
    if learns or torch.compiler.is_compiling():
        return _differentiable(r, v, state, starts, decay, learns)[:2]
    memory = calls.memory(state, _shape(r, v), copy=False)
    return _forward(_call(r, v, starts, decay), r, v, memory, state is not None, None), memory


def _shape(r: Tensor, v: Tensor) -> tuple[int, ...]:
    """Of the memory."""
    return r.shape[0], *r.shape[2:], v.shape[3]


def _call(r: Tensor, v: Tensor, starts: Tensor | None, decay: Tensor | None) -> Call:
    call = Call(*r.shape[:3], v.shape[2], r.shape[3], v.shape[3], torch.get_num_threads())
    call.held = (r, v, decay, starts)  # as long as the addresses are used
    call.r, call.v, call.decay, call.starts = (address(x) for x in call.held)
    return call


def _forward(call: Call, r: Tensor, v: Tensor, memory: Tensor, has_state: bool, kept: Tensor | None) -> Tensor:
    """a; `memory` is written over. kept: room for the memories that backward starts from."""
    a = v.new_empty(*r.shape[:3], v.shape[3])
    call.has_state, call.state, call.a = has_state, memory.data_ptr(), a.data_ptr()
    call.kept = address(kept)
    NATIVE.run("forward", call)
    return a


@torch.library.custom_op("seqzoo::strict_linear_attention_cpp", mutates_args=())
def _differentiable(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, decay: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """a, the last memory, and where `keep` the memories for backward."""
    memory, call = calls.memory(state, _shape(r, v), copy=True), _call(r, v, starts, decay)
    call.has_state = state is not None
    kept = calls.kept(memory, NATIVE.run("segments", call) if keep else 0)
    return _forward(call, r, v, memory, state is not None, kept if keep else None), memory, kept


@_differentiable.register_fake
def _(r, v, state, starts, decay, keep):
    memory = calls.memory(None, _shape(r, v), copy=True)
    return v.new_empty(*r.shape[:3], v.shape[3]), memory, calls.kept_fake(memory, keep)


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
    NATIVE.run("backward", call)
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
