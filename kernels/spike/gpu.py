"""Spikes on a GPU, in Triton: to the bit the definition, with and without the gradient through the threshold."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu, tuned
from seqzoo.kernels.spike.reference import HIGHEST, LOWEST


def spike_triton(x: Tensor, k: float, through_threshold: bool) -> Tensor:
    """Same as `spike_reference`.

    Raises:
        ValueError: no GPU, or a dtype that it has no kernels for.
    """
    needs_gpu(x)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() and x.requires_grad:
        return _differentiable(x, k, through_threshold)
    return forward(x, k)


def _config(kernel: str, x: Tensor, k: float) -> dict:
    W = x.shape[-1]
    config = tuned("spike", kernel, x.device, x.dtype, W=W)
    config["BW"] = min(config["BW"], 1 << (W - 1).bit_length())
    return config | dict(W=W, DIVISOR=float(k * W), LOWEST=LOWEST, HIGHEST=HIGHEST)


def forward(x: Tensor, k: float) -> Tensor:
    """y."""
    from seqzoo.kernels.spike.gpu_kernels import spike_forward

    y = x.new_empty(x.shape)
    if n := x.numel() // x.shape[-1]:
        config = _config("forward", x, k)
        launch(spike_forward, (-(-n // config["BR"]),), x.contiguous(), y, n, **config)
    return y


def backward(x: Tensor, dy: Tensor, k: float) -> Tensor:
    """dx, through the threshold."""
    from seqzoo.kernels.spike.gpu_kernels import spike_backward

    dx = x.new_empty(x.shape)
    if n := x.numel() // x.shape[-1]:
        config = _config("backward", x, k)
        launch(spike_backward, (-(-n // config["BR"]),), x.contiguous(), dy.contiguous(), dx, n, **config)
    return dx


@torch.library.custom_op("seqzoo::spike_triton", mutates_args=())
def _differentiable(x: Tensor, k: float, through_threshold: bool) -> Tensor:
    return forward(x, k)


@_differentiable.register_fake
def _(x, k, through_threshold):
    return x.new_empty(x.shape)


@torch.library.custom_op("seqzoo::spike_triton_backward", mutates_args=())
def _gradient(x: Tensor, dy: Tensor, k: float) -> Tensor:
    return backward(x, dy, k)


@_gradient.register_fake
def _(x, dy, k):
    return x.new_empty(x.shape)


def _remember(ctx, inputs, output):
    x, ctx.k, through_threshold = inputs
    ctx.save_for_backward(*([x] if through_threshold else []))


def _backward(ctx, dy):
    saved = ctx.saved_tensors  # once: under checkpointing what is saved can be had once
    return _gradient(*saved, dy, ctx.k) if saved else dy, None, None


_differentiable.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    half, full = torch.bfloat16, torch.float32
    for rows, W, dtype in (
        (65536, 128, half),
        (32768, 512, half),
        (16384, 2048, half),
        (8192, 4096, half),
        (8192, 4096, full),
        (4096, 18944, half),
    ):
        x, dy = make((rows, W), dtype), make((rows, W), dtype)
        yield f"forward {W} channels, {dtype}", lambda x=x: forward(x, 3.0)
        yield f"backward {W} channels, {dtype}", lambda x=x, dy=dy: backward(x, dy, 3.0)
