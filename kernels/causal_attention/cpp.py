"""Causal attention in C++ on a CPU: `attention.cpp`, compiled on first use, forward and backward.

float32 and bfloat16, scores and sums in float32. Two runs give the same bits, outputs the same alone and in a batch.
"""

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.native import build

NAME, SOURCE = "causal_attention", Path(__file__).with_name("attention.cpp")
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Call(ctypes.Structure):
    """Arguments of the native functions: the fields of columns.h's Call, in order."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "H", "G", "T", "S", "K", "V", "window", "sinks", "threads")),
        *((name, c_int64 * 3) for name in ("q_step", "k_step", "v_step", "d_o_step")),
        *((name, c_void_p) for name in ("q", "k", "v", "query_document", "key_document", "o", "logsum")),
        *((name, c_void_p) for name in ("d_o", "dq", "dk", "dv", "room")),
    ]


def usable(q: Tensor) -> bool:
    """Whether this backend takes q: its device and dtype, and a compiler that works; logs once where that lacks.

    torch.compile needs a compiler itself, and cannot trace the search for one.
    """
    return (
        q.device.type == "cpu" and q.dtype in SUFFIX and (torch.compiler.is_compiling() or build.usable(NAME, SOURCE))
    )


@cache
def _functions(dtype: torch.dtype, way: str) -> tuple[ctypes._CFuncPtr, ctypes._CFuncPtr]:
    """How much room the function needs, and the function."""
    library = build.library(NAME, [SOURCE])
    room, run = (getattr(library, f"{NAME}{way}{what}_{SUFFIX[dtype]}") for what in ("_room", ""))
    room.argtypes = run.argtypes = [ctypes.POINTER(Call)]
    room.restype, run.restype = c_int64, None
    return room, run


def causal_attention_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """Same as `causal_attention_reference`.

    Raises:
        ValueError: another dtype or device.
        BuildError: no compiler that works.
    """
    if q.device.type != "cpu" or q.dtype not in SUFFIX:
        raise ValueError(
            f"causal_attention: backend cpp: expected float32 or bfloat16 on a CPU, got {q.dtype} on {q.device}"
        )
    q, k, v = (_rows(x) for x in (q, k, v))
    documents = (None, None) if key_document is None else (query_document.contiguous(), key_document.contiguous())
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if learns or torch.compiler.is_compiling():
        return _differentiable(q, k, v, window or 0, sinks, *documents, learns)[0]
    return _forward(q, k, v, window or 0, sinks, *documents, None)


def _rows(x: Tensor) -> Tensor:
    """The elements of a head adjacent; other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor, like: tuple[int, ...]) -> Tensor:
    """Uninitialised [B, heads, T, width], of which a token's heads lie side by side."""
    B, H, T, width = like
    return x.new_empty(B, T, H, width).transpose(1, 2)


def _call(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, query: Tensor | None, key: Tensor | None) -> Call:
    (B, H, T, K), (G, S), V = q.shape, k.shape[1:3], v.shape[3]
    return Call(
        *(B, H, G, T, S, K, V, window, sinks, torch.get_num_threads()),
        *(x.stride()[:3] for x in (q, k, v)),
        (0, 0, 0),
        *(None if x is None else x.data_ptr() for x in (q, k, v, query, key)),
    )


def _run(way: str, call: Call, dtype: torch.dtype) -> None:
    room, run = _functions(dtype, way)
    scratch = torch.empty(room(call))
    call.room = scratch.data_ptr()
    run(call)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    query: Tensor | None,
    key: Tensor | None,
    logsum: Tensor | None,
) -> Tensor:
    """o; `logsum` is filled with what the backward pass needs."""
    call, o = _call(q, k, v, window, sinks, query, key), _heads(q, (*q.shape[:3], v.shape[3]))
    call.o, call.logsum = o.data_ptr(), None if logsum is None else logsum.data_ptr()
    _run("", call, q.dtype)
    return o


@torch.library.custom_op("seqzoo::causal_attention_cpp", mutates_args=())
def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, query: Tensor | None, key: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """o, and where `keep` the logarithms of each query's sum, for backward."""
    logsum = q.new_empty(q.shape[:3] if keep else 0, dtype=torch.float32)
    return _forward(q, k, v, window, sinks, query, key, logsum if keep else None), logsum


@_differentiable.register_fake
def _(q, k, v, window, sinks, query, key, keep):
    return _heads(q, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3] if keep else 0, dtype=torch.float32)


@torch.library.custom_op("seqzoo::causal_attention_cpp_backward", mutates_args=())
def _gradients(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logsum: Tensor,
    window: int,
    sinks: int,
    query: Tensor | None,
    key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    d_o = _rows(d_o)
    call, grads = _call(q, k, v, window, sinks, query, key), [_heads(x, x.shape) for x in (q, k, v)]
    call.o, call.logsum, call.d_o, call.d_o_step = o.data_ptr(), logsum.data_ptr(), d_o.data_ptr(), d_o.stride()[:3]
    call.dq, call.dk, call.dv = (x.data_ptr() for x in grads)
    _run("_backward", call, q.dtype)
    return tuple(grads)


@_gradients.register_fake
def _(d_o, q, k, v, o, logsum, window, sinks, query, key):
    return tuple(_heads(x, x.shape) for x in (q, k, v))


def _remember(ctx, inputs, output):
    q, k, v, ctx.window, ctx.sinks, query, key, _ = inputs
    ctx.save_for_backward(q, k, v, *output, query, key)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_o, _):
    q, k, v, o, logsum, query, key = ctx.saved_tensors
    return *_gradients(d_o, q, k, v, o, logsum, ctx.window, ctx.sinks, query, key), *(None,) * 5


_differentiable.register_autograd(_backward, setup_context=_remember)
