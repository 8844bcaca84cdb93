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
    """Whether this backend takes x: its device and dtype, and a compiler that works."""
    return x.device.type == "cpu" and x.dtype in SUFFIX and usable(NAME, SOURCE)


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


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gates = x.new_empty(chosen.numel(), gate_up.shape[1])
        ctx.save_for_backward(x, chosen, weight, gate_up, down, gates)
        return _forward(x, chosen, weight, gate_up, down, gates)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, chosen, weight, gate_up, down, gates = ctx.saved_tensors
        dy = dy.contiguous()  # held by a name: the kernel gets its address only
        dx = torch.zeros(x.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight)
        experts = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dgate_up, ddown = (torch.empty_like(gate_up), torch.empty_like(down)) if experts else (None, None)
        _functions(x.dtype)[1](
            _sizes(chosen, gate_up, down),
            *(t.data_ptr() for t in (x, chosen, weight, gate_up, down, gates, dy)),
            *(None if t is None else t.data_ptr() for t in (dx, dweight, dgate_up, ddown)),
        )
        return None if dx is None else dx.to(x.dtype), None, dweight, dgate_up, ddown


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
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, gate_up, down)):
        return _ExpertMLP.apply(x, chosen, weight, gate_up, down)
    return _forward(x, chosen, weight, gate_up, down, None)
