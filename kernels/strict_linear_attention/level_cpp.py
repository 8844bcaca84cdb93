"""A level of BDH in C++ on a CPU: `level.cpp`, compiled on first use; float32, forward and backward.

A sequence gets the same bits alone and in a batch. Gradients of the weights are sums over the batch, whose order
depends on the number of threads, and on nothing else.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import calls
from seqzoo.kernels.native.rows import address

NATIVE = calls.Calls("bdh_level", Path(__file__).with_name("level.cpp"), "segments")
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
    return NATIVE.usable()


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
    learns = calls.learns(v, *weights, state)
    if learns or torch.compiler.is_compiling():
        u, state, active, _, _ = _differentiable(
            v.contiguous(), *weights, *turns, state, marks[0], decay, marks[1], dropout, norm_eps, learns
        )
        return u, state, active, None
    memory = calls.memory(state, (v.shape[0], *encoder.shape), copy=False)
    call = _call(v.contiguous(), *weights, *turns, marks[0], decay, marks[1], dropout, norm_eps)
    u, active = _forward(call, v, memory, state is not None, None, None)
    return u, memory, active, None


def _call(v, encoder, gate, decoder, cos, sin, starts, decay, passed, dropout, norm_eps) -> Call:
    call = Call(*v.shape[:2], *encoder.shape, torch.get_num_threads(), cos.shape[0])
    call.norm_eps, call.pass_scale = norm_eps, 1.0 / (1.0 - dropout)
    call.held = (v, encoder, gate, decoder, cos, sin, starts, decay, passed)  # as long as the addresses are used
    names = ("v", "encoder", "gate", "decoder", "cos", "sin", "starts", "decay", "passed")
    for name, x in zip(names, call.held, strict=True):
        setattr(call, name, address(x))
    return call


def _forward(
    call: Call, v: Tensor, memory: Tensor, has_state: bool, a: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """u and how many are active; `memory` is written over. a, kept: room for what backward needs."""
    (B, T, D), H = v.shape, call.H
    u, each, active = v.new_empty(B, T, D), v.new_empty(B, H, T, D), v.new_empty(B, H, 2, dtype=torch.float64)
    call.has_state, call.wants_state, call.state = has_state, True, memory.data_ptr()
    call.u, call.active = each.data_ptr(), active.data_ptr()
    call.a, call.kept = address(a), address(kept)
    way = "steps" if a is None and T <= FEW and not call.passed else "forward"
    NATIVE.run(way, call, u.data_ptr())
    return u, active.sum((0, 1)).float()


@torch.library.custom_op("seqzoo::bdh_level_cpp", mutates_args=())
def _differentiable(
    v: Tensor, encoder: Tensor, gate: Tensor, decoder: Tensor, cos: Tensor, sin: Tensor, state: Tensor | None,
    starts: Tensor | None, decay: Tensor | None, passed: Tensor | None, dropout: float, norm_eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """u, the last memory, how many are active, and where `keep` what was read and the memories for backward."""
    memory = calls.memory(state, (v.shape[0], *encoder.shape), copy=True)
    call = _call(v, encoder, gate, decoder, cos, sin, starts, decay, passed, dropout, norm_eps)
    a, kept = _read(v, encoder, keep), calls.kept(memory, NATIVE.run("segments", call) if keep else 0)
    u, active = _forward(call, v, memory, state is not None, *((a, kept) if keep else (None, None)))
    return u, memory, active, a, kept


def _read(v: Tensor, encoder: Tensor, keep: bool) -> Tensor:
    """Room for what every head reads at each token, where it is kept."""
    return v.new_empty((v.shape[0], encoder.shape[0], *v.shape[1:]) if keep else 0)


@_differentiable.register_fake
def _(v, encoder, gate, decoder, cos, sin, state, starts, decay, passed, dropout, norm_eps, keep):
    memory = calls.memory(None, (v.shape[0], *encoder.shape), copy=True)
    return v.new_empty(v.shape), memory, v.new_empty(2), _read(v, encoder, keep), calls.kept_fake(memory, keep)


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
    NATIVE.run("backward", call, d_v.data_ptr())
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
