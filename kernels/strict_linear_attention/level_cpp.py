"""A level of BDH in C++ on a CPU: `level.cpp`, compiled on first use; float32, forward and backward.

A sequence gets the same bits alone and in a batch. Gradients of the weights are sums over the batch, whose order
depends on the number of threads, and on nothing else.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels import native

SOURCE = Path(__file__).with_name("level.cpp")
FEW = 4  # tokens up to which one after the other, active neurons only, is faster than a chunk


class Call(ctypes.Structure):
    """Arguments of the native functions: the fields of level.cpp's Call, in order."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "T", "H", "N", "D", "threads")),
        *((name, c_int64) for name in ("turn_rows", "has_state", "wants_state", "parts")),
        *((name, c_float) for name in ("norm_eps", "pass_scale")),
        *((name, c_void_p) for name in ("v", "encoder", "gate", "decoder", "cos", "sin", "decay", "starts", "passed")),
        *((name, c_void_p) for name in ("state", "a", "u", "kept", "active")),
        *((name, c_void_p) for name in ("du", "d_state", "dv", "d_encoder", "d_gate", "d_decoder")),
    ]


def usable(v: Tensor, encoder: Tensor) -> bool:
    """Whether this call can run it: plain fp32 and a compiler that works; logs once why there is none."""
    if not v.dtype == encoder.dtype == torch.float32 or torch.is_autocast_enabled(v.device.type):
        return False
    return torch.compiler.is_compiling() or native.usable("bdh_level", SOURCE)


@cache
def _library() -> ctypes.CDLL:
    library = native.library("bdh_level", [SOURCE])
    library.bdh_level_segments.argtypes, library.bdh_level_segments.restype = [ctypes.POINTER(Call)], c_int64
    for name in ("forward", "backward", "steps"):
        function = getattr(library, f"bdh_level_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(Call), c_void_p], None
    return library


def bdh_level_cpp(
    v: Tensor, encoder: Tensor, gate: Tensor, decoder: Tensor, cos: Tensor, sin: Tensor, *, state: Tensor | None,
    starts: Tensor | None, decay: Tensor | None, passed: Tensor | None, dropout: float, norm_eps: float,
    x_before: None = None,
) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
    """Same as the reference; without gradients it may write the last memory over `state`.

    Raises:
        ValueError: another dtype than float32, another device, or an `x_before`.
        BuildError: no compiler that works.
    """
    if x_before is not None or not v.dtype == encoder.dtype == torch.float32 or v.device.type != "cpu":
        raise ValueError(
            f"bdh_level: backend cpp: expected float32 on the CPU and no x_before, got {v.dtype} on {v.device}"
            + ("" if x_before is None else " and an x_before")
        )
    weights = [w.contiguous() for w in (encoder, gate, decoder)]
    turns = [x.float().mT.contiguous() for x in (cos, sin)]
    marks = [None if x is None else x.contiguous() for x in (starts, passed)]
    decay = None if decay is None else decay.float().contiguous()
    inputs = [v.contiguous(), *weights] + ([] if state is None else [state])
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if learns or torch.compiler.is_compiling():
        u, state, active, _, _ = _differentiable(
            v.contiguous(), *weights, *turns, state, marks[0], decay, marks[1], dropout, norm_eps, learns
        )
        return u, state, active, None
    memory = _memory(v, encoder) if state is None else state.float().contiguous()
    call = _call(v.contiguous(), *weights, *turns, marks[0], decay, marks[1], dropout, norm_eps)
    u, active = _forward(call, v, memory, state is not None, None, None)
    return u, memory, active, None


def _memory(v: Tensor, encoder: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], *encoder.shape)


def _call(v, encoder, gate, decoder, cos, sin, starts, decay, passed, dropout, norm_eps) -> Call:
    pointer = lambda x: None if x is None else x.data_ptr()
    call = Call(*v.shape[:2], *encoder.shape, torch.get_num_threads(), cos.shape[0])
    call.norm_eps, call.pass_scale = norm_eps, 1.0 / (1.0 - dropout)
    call.held = (v, encoder, gate, decoder, cos, sin, starts, decay, passed)  # as long as the addresses are used
    for name, x in zip(
        ("v", "encoder", "gate", "decoder", "cos", "sin", "starts", "decay", "passed"), call.held, strict=True
    ):
        setattr(call, name, pointer(x))
    return call


def _forward(
    call: Call, v: Tensor, memory: Tensor, has_state: bool, a: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """u and how many are active; `memory` is written over. a, kept: room for what backward needs."""
    (B, T, D), H = v.shape, call.H
    u, each, active = v.new_empty(B, T, D), v.new_empty(B, H, T, D), v.new_empty(B, H, 2, dtype=torch.float64)
    call.has_state, call.wants_state, call.state = has_state, True, memory.data_ptr()
    call.u, call.active = each.data_ptr(), active.data_ptr()
    call.a, call.kept = (None, None) if a is None else (a.data_ptr(), kept.data_ptr())
    way = "steps" if a is None and T <= FEW and not call.passed else "forward"
    getattr(_library(), f"bdh_level_{way}")(call, u.data_ptr())
    return u, active.sum((0, 1)).float()


@torch.library.custom_op("seqzoo::bdh_level_cpp", mutates_args=())
def _differentiable(
    v: Tensor, encoder: Tensor, gate: Tensor, decoder: Tensor, cos: Tensor, sin: Tensor, state: Tensor | None,
    starts: Tensor | None, decay: Tensor | None, passed: Tensor | None, dropout: float, norm_eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """u, the last memory, how many are active, and where `keep` what was read and the memories for backward."""
    memory = _memory(v, encoder) if state is None else state.to(torch.float32, copy=True).contiguous()
    call, a, kept = _call(v, encoder, gate, decoder, cos, sin, starts, decay, passed, dropout, norm_eps), None, None
    if keep:
        a = v.new_empty(v.shape[0], encoder.shape[0], *v.shape[1:])
        kept = v.new_empty(_library().bdh_level_segments(call), *encoder.shape)
    u, active = _forward(call, v, memory, state is not None, a, kept)
    return (u, memory, active, a, kept) if keep else (u, memory, active, v.new_empty(0), v.new_empty(0))


@_differentiable.register_fake
def _(v, encoder, gate, decoder, cos, sin, state, starts, decay, passed, dropout, norm_eps, keep):
    a = v.new_empty(v.shape[0], encoder.shape[0], *v.shape[1:]) if keep else v.new_empty(0)
    kept = v.new_empty(torch.library.get_ctx().new_dynamic_size(), *encoder.shape) if keep else v.new_empty(0)
    return v.new_empty(v.shape), _memory(v, encoder), v.new_empty(2), a, kept


@torch.library.custom_op("seqzoo::bdh_level_cpp_backward", mutates_args=())
def _gradients(
    du: Tensor, d_last: Tensor, v: Tensor, encoder: Tensor, gate: Tensor, decoder: Tensor, cos: Tensor, sin: Tensor,
    starts: Tensor | None, decay: Tensor | None, passed: Tensor | None, a: Tensor, kept: Tensor, dropout: float,
    norm_eps: float, has_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of v, the weights and the first memory."""
    du, d_state = du.contiguous(), d_last.clone(memory_format=torch.contiguous_format)
    call = _call(v, encoder, gate, decoder, cos, sin, starts, decay, passed, dropout, norm_eps)
    call.has_state, call.a, call.kept = has_state, a.data_ptr(), kept.data_ptr()
    call.parts = min(call.B, -(-call.threads // call.H))  # as many as keep all threads at work
    d_v, each = torch.empty_like(v), torch.empty_like(a)
    weights = [v.new_zeros(call.parts, *encoder.shape) for _ in range(3)]
    call.du, call.d_state, call.dv = du.data_ptr(), d_state.data_ptr(), each.data_ptr()
    call.d_encoder, call.d_gate, call.d_decoder = (w.data_ptr() for w in weights)
    _library().bdh_level_backward(call, d_v.data_ptr())
    return d_v, *(w.sum(0) if call.parts > 1 else w[0] for w in weights), d_state


@_gradients.register_fake
def _(du, d_last, v, encoder, gate, decoder, *_):
    return v.new_empty(v.shape), *(encoder.new_empty(encoder.shape) for _ in range(3)), d_last.new_empty(d_last.shape)


def _remember(ctx, inputs, output):
    *tensors, state, starts, decay, passed, dropout, norm_eps, _ = inputs
    ctx.save_for_backward(*tensors, starts, decay, passed, *output[3:])
    ctx.rest = dropout, norm_eps, state is not None
    ctx.state_dtype = None if state is None else state.dtype
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, du, d_last, *_):
    *grads, d_state = _gradients(du, d_last, *ctx.saved_tensors, *ctx.rest)
    d_state = None if ctx.state_dtype is None else d_state.to(ctx.state_dtype)
    return *grads, None, None, d_state, *(None,) * 6


_differentiable.register_autograd(_backward, setup_context=_remember)
