"""The norms on a GPU, in Triton, forward and backward.

For backward the inputs alone are kept. Bits depend, but for the weight's gradient, on no other row; that gradient is
summed in shares of the rows whose number depends on the shape alone.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu, tuned
from seqzoo.kernels.rms_norm.cpp import _rows

MOST = 8192  # channels


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Same as `rms_norm_reference`.

    Raises:
        ValueError: no GPU, a dtype that it has no kernels for, or rows of more than 8192 channels.
    """
    return _norm(x, None, weight, eps, offset)


def gated_rms_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as `gated_rms_norm_reference`, with the same errors as `rms_norm_triton`."""
    return _norm(x, gate, weight, eps, 0.0)


def _norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: float) -> Tensor:
    needs_gpu(x)
    inputs = (x, weight) if gate is None else (x, gate, weight)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _differentiable(x, gate, weight, eps, offset)
    return forward(x, gate, weight, eps, offset)


def _steps(x: Tensor | None) -> tuple[Tensor | None, tuple[int | None, ...]]:
    """x, and where its rows stand: how many share an outer step, that step (None where one will do), the inner step."""
    if x is None:
        return None, (1, None, 0)
    x, (length, outer, inner) = _rows(x)
    return x, (length, None if length * x.shape[-1] >= x.numel() else outer, inner)


def _config(kernel: str, x: Tensor, weight: Tensor) -> dict:
    import triton.language as tl

    W = x.shape[-1]
    between = str(torch.promote_types(x.dtype, weight.dtype)).removeprefix("torch.")
    config = tuned("rms_norm", kernel, x.device, x.dtype, W=W)
    return config | dict(W=W, BW=1 << (W - 1).bit_length(), BETWEEN=getattr(tl, between))


def forward(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: float) -> Tensor:
    """y."""
    from seqzoo.kernels.rms_norm.gpu_kernels import rms_norm_forward

    y = x.new_empty(x.shape)
    if not (n := x.numel() // x.shape[-1]):
        return y
    (x, x_steps), (gate, gate_steps), config = _steps(x), _steps(gate), _config("forward", x, weight)
    given = x, gate, weight.contiguous(), y, n, float(eps), float(offset)
    launch(rms_norm_forward, (-(-n // config["BR"]),), *given, *x_steps, *gate_steps, **config)
    return y


def backward(
    x: Tensor, gate: Tensor | None, weight: Tensor, dy: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgate, which is empty where there is no gate, and dweight."""
    from seqzoo.kernels.rms_norm.gpu_kernels import rms_norm_backward

    dx, dgate = x.new_empty(x.shape), x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    (W,), n = weight.shape, x.numel() // x.shape[-1]
    if not n:
        return dx, dgate, torch.zeros_like(weight)
    (x, x_steps), (gate, gate_steps), config = _steps(x), _steps(gate), _config("backward", x, weight)
    blocks = -(-n // config["BR"])
    share = -(-blocks // min(1024, (1 << 20) // W))  # of blocks; dweights are at most 4 MiB, and 128 rows
    programs = -(-blocks // share)
    dweights = x.new_empty((programs, W), dtype=torch.float32)
    given = x, gate, weight.contiguous(), dy.contiguous(), dx, None if gate is None else dgate, dweights
    numbers = n, share * config["BR"], float(eps), float(offset)
    launch(rms_norm_backward, (programs,), *given, *numbers, *x_steps, *gate_steps, **config)
    return dx, dgate, dweights.sum(0).to(weight.dtype)


@torch.library.custom_op("seqzoo::rms_norm_triton", mutates_args=())
def _differentiable(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, offset: float) -> Tensor:
    return forward(x, gate, weight, eps, offset)


@_differentiable.register_fake
def _(x, gate, weight, eps, offset):
    return x.new_empty(x.shape)


@torch.library.custom_op("seqzoo::rms_norm_triton_backward", mutates_args=())
def _gradients(
    x: Tensor, gate: Tensor | None, weight: Tensor, dy: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(x, gate, weight, dy, eps, offset)


@_gradients.register_fake
def _(x, gate, weight, dy, eps, offset):
    dgate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), dgate, weight.new_empty(weight.shape)


def _remember(ctx, inputs, output):
    *tensors, eps, offset = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = eps, offset


def _backward(ctx, dy):
    x, gate, weight = ctx.saved_tensors  # once: under checkpointing what is saved can be had once
    dx, dgate, dweight = _gradients(x, gate, weight, dy, *ctx.numbers)
    return dx, None if gate is None else dgate, dweight, None, None


_differentiable.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    half, full = torch.bfloat16, torch.float32
    for rows, W, beside, dtype, gated in (
        (65536, 64, 0, half, False),
        (131072, 128, 128, half, False),  # heads beside others
        (131072, 128, 0, half, True),
        (65536, 256, 0, full, True),
        (8192, 2048, 0, half, False),
        (8192, 4096, 0, half, False),
        (8192, 4096, 0, full, False),
        (4096, 8192, 0, half, False),
    ):
        x = make((rows // 16, 16 * W + beside), dtype)[:, : 16 * W].unflatten(1, (16, W))
        gate = make(x.shape, dtype) if gated else None
        weight, dy = make((W,), dtype), make(x.shape, dtype)
        name = f"{'gated ' if gated else ''}{W} channels, {dtype}{', strides' if beside else ''}"
        yield f"forward {name}", lambda x=(x, gate, weight): forward(*x, 1e-6, 1.0)
        yield f"backward {name}", lambda x=(x, gate, weight, dy): backward(*x, 1e-6, 1.0)
