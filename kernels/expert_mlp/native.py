"""The experts' MLPs in C++ for CPUs, float32 and bfloat16, forward and backward: see `expert_mlp.cpp`."""

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.native import library, usable

NAME, SOURCE = "expert_mlp", Path(__file__).with_name("expert_mlp.cpp")
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
FORWARD_POINTERS, BACKWARD_POINTERS = 7, 11


def runs(x: Tensor) -> bool:
    """Whether this backend takes x: its device and dtype, and a compiler that works.

    torch.compile needs a compiler itself, and cannot trace the search for one.
    """
    return x.device.type == "cpu" and x.dtype in SUFFIX and (torch.compiler.is_compiling() or usable(NAME, SOURCE))


@cache
def _functions(dtype: torch.dtype) -> tuple[ctypes._CFuncPtr, ctypes._CFuncPtr]:
    built = library(NAME, [SOURCE])
    forward, backward = (getattr(built, f"{NAME}_{way}_{SUFFIX[dtype]}") for way in ("forward", "backward"))
    forward.argtypes = [ctypes.POINTER(ctypes.c_long), *[ctypes.c_void_p] * FORWARD_POINTERS]
    backward.argtypes = [ctypes.POINTER(ctypes.c_long), *[ctypes.c_void_p] * BACKWARD_POINTERS]
    return forward, backward


def _sizes(chosen: Tensor, gate_up: Tensor, down: Tensor) -> ctypes.Array:
    return (ctypes.c_long * 5)(*chosen.shape, *down.shape)  # N, k, E, D, I


def _forward(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor | None) -> Tensor:
    """Contiguous operands, weight in fp32; `gates` [N k, 2I] is filled with what the backward pass needs."""
    y = torch.zeros(x.shape, dtype=torch.float32)
    failed = _functions(x.dtype)[0](
        _sizes(chosen, gate_up, down),
        x.data_ptr(),
        chosen.data_ptr(),
        weight.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        None if gates is None else gates.data_ptr(),
        y.data_ptr(),
    )
    if failed:
        experts = gate_up.shape[0]
        raise ValueError(f"expert_mlp: chosen: expected 0 to {experts - 1}, got {chosen.min()} to {chosen.max()}")
    return y.to(x.dtype)


@torch.library.custom_op("seqzoo::expert_mlp_cpp", mutates_args=())
def _differentiable(
    x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """y, and where `keep` the gates, for backward."""
    gates = x.new_empty((chosen.numel(), gate_up.shape[1]) if keep else 0)
    return _forward(x, chosen, weight, gate_up, down, gates if keep else None), gates


@_differentiable.register_fake
def _(x, chosen, weight, gate_up, down, keep):
    return x.new_empty(x.shape), x.new_empty((chosen.shape[0] * chosen.shape[1], gate_up.shape[1]) if keep else 0)


@torch.library.custom_op("seqzoo::expert_mlp_cpp_backward", mutates_args=())
def _gradients(
    dy: Tensor, x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, gates: Tensor,
    inputs: bool, experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx where the inputs are to learn, dweight, and the matrices' where the experts are; else nothing there."""
    dy = dy.contiguous()  # held by a name: the kernel gets its address only
    dx, dweight = torch.zeros(x.shape if inputs else 0, dtype=torch.float32), torch.empty_like(weight)
    matrices = [t.new_empty(t.shape if experts else 0) for t in (gate_up, down)]
    _functions(x.dtype)[1](
        _sizes(chosen, gate_up, down),
        *(t.data_ptr() for t in (x, chosen, weight, gate_up, down, gates, dy)),
        *(t.data_ptr() if wanted else None for t, wanted in ((dx, inputs), (dweight, True))),
        *(t.data_ptr() if experts else None for t in matrices),
    )
    return dx.to(x.dtype), dweight, *matrices


@_gradients.register_fake
def _(dy, x, chosen, weight, gate_up, down, gates, inputs, experts):
    matrices = [t.new_empty(t.shape if experts else 0) for t in (gate_up, down)]
    return x.new_empty(x.shape if inputs else 0), weight.new_empty(weight.shape), *matrices


def _remember(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    inputs, experts = ctx.needs_input_grad[0], ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    dx, dweight, *matrices = _gradients(dy, *ctx.saved_tensors, inputs, experts)
    return dx if inputs else None, None, dweight, *(matrices if experts else (None, None)), None


_differentiable.register_autograd(_backward, setup_context=_remember)


def expert_mlp_native(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Same as `expert_mlp_reference`; hidden values and gates are rounded to x's dtype between the products.

    Raises:
        ValueError: inputs that this backend does not take.
        BuildError: no compiler, or one that refuses the source.
    """
    if x.device.type != "cpu" or x.dtype not in SUFFIX:
        raise ValueError(f"expert_mlp: backend cpp: expected float32 or bfloat16 on a CPU, got {x.dtype} on {x.device}")
    D, I = down.shape[1:]
    if x.element_size() == 2 and (D % 2 or I % 2):  # the kernel reads pairs: complete them with zeros
        halves = F.pad(gate_up.unflatten(1, (2, I)), (0, D % 2, 0, I % 2))
        args = F.pad(x, (0, D % 2)), chosen, weight, halves.flatten(1, 2), F.pad(down, (0, I % 2, 0, D % 2))
        return expert_mlp_native(*args)[:, :D]
    x, chosen, weight, gate_up, down = (t.contiguous() for t in (x, chosen, weight.float(), gate_up, down))
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, gate_up, down))
    if learns or torch.compiler.is_compiling():
        return _differentiable(x, chosen, weight, gate_up, down, learns)[0]
    return _forward(x, chosen, weight, gate_up, down, None)
