"""The rule's inputs on a GPU, in Triton, forward and backward, a launch each.

For backward the inputs alone are kept. v is never copied, its gradient once. Bits depend, but for the gradients of
a_log and dt_bias, on no other token; these are summed over blocks of tokens in a fixed order.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from seqzoo.kernels.delta_inputs.reference import DeltaInputs
from seqzoo.kernels.gpu import launch, needs_gpu, tuned
from seqzoo.kernels.native.rows import rows

MOST = 512  # channels of a key


def delta_inputs_triton(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, num_key_heads: int, key_width: int, beta_scale: float
) -> DeltaInputs:
    """Same as `delta_inputs_reference`.

    Raises:
        ValueError: no GPU, a dtype that it has no kernels for, or keys wider than 512.
    """
    needs_gpu(qkv)
    inputs = qkv, ba, a_log, dt_bias
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return DeltaInputs(*_DeltaInputs.apply(*inputs, num_key_heads, key_width, beta_scale))
    run = _registered if torch.compiler.is_compiling() else forward
    q, k, g, beta = run(*inputs, num_key_heads, key_width, beta_scale)
    return DeltaInputs(q, k, _values(qkv, a_log, num_key_heads, key_width), g, beta)


def _values(qkv: Tensor, a_log: Tensor, H: int, K: int) -> Tensor:
    (B, T, C), (HV,) = qkv.shape, a_log.shape
    return qkv[..., 2 * H * K :].view(B, T, HV, (C - 2 * H * K) // HV)


def _config(kernel: str, qkv: Tensor, HV: int, H: int, K: int) -> tuple[dict, int]:
    """The kernel's configuration, and how many blocks of heads there are."""
    power = lambda n: 1 << (n - 1).bit_length()
    config = tuned("delta_inputs", kernel, qkv.device, qkv.dtype, K=K)
    BR = config["BR"]
    config |= dict(H=H, HV=HV, K=K, SCALE=K**-0.5, BK=power(K), BT=power(-(-BR // H)), BH=power(HV))
    return config, -(-qkv.shape[0] * qkv.shape[1] * H // BR)


def forward(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, H: int, K: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, g, beta."""
    from seqzoo.kernels.delta_inputs.gpu_kernels import delta_inputs_forward

    (B, T, _), (HV,) = qkv.shape, a_log.shape
    qkv, ba, a_log, dt_bias = rows(qkv), rows(ba), a_log.contiguous(), dt_bias.contiguous()
    q, k, g, beta = _made(qkv, HV, H, K)
    if not B * T:
        return q, k, g, beta
    config, blocks = _config("forward", qkv, HV, H, K)
    steps = *qkv.stride()[:2], *ba.stride()[:2]
    launch(delta_inputs_forward, (blocks, 3), qkv, ba, a_log, dt_bias, q, k, g, beta, scale, B * T, T, *steps, **config)
    return q, k, g, beta


def _made(qkv: Tensor, HV: int, H: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, _ = qkv.shape
    shapes = (B, T, H, K), (B, T, H, K), (B, T, HV), (B, T, HV)
    return tuple(qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)


def backward(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, grads: list[Tensor], H: int, K: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs; `grads`: of q, k, v, g, beta."""
    from seqzoo.kernels.delta_inputs.gpu_kernels import delta_inputs_backward

    (B, T, _), (HV,), V = qkv.shape, a_log.shape, grads[2].shape[-1]
    dqkv, dba = qkv.new_empty(qkv.shape), ba.new_empty(ba.shape)
    if not B * T:
        return dqkv, dba, torch.zeros_like(a_log), torch.zeros_like(dt_bias)
    inputs, given = (rows(qkv), rows(ba), a_log.contiguous(), dt_bias.contiguous()), [t.contiguous() for t in grads]
    config, blocks = _config("backward", qkv, HV, H, K)
    config |= dict(V=V, C=qkv.shape[-1], BV=1 << (V - 1).bit_length())
    dheads = qkv.new_empty((blocks, 2, HV), dtype=torch.float32)
    steps = *inputs[0].stride()[:2], *inputs[1].stride()[:2]
    launch(delta_inputs_backward, (blocks, 4), *inputs, *given, dqkv, dba, dheads, scale, B * T, T, *steps, **config)
    da_log, ddt_bias = dheads.sum(0).unbind()
    return dqkv, dba, da_log.to(a_log.dtype, copy=True), ddt_bias.to(dt_bias.dtype, copy=True)


@torch.library.custom_op("seqzoo::delta_inputs_triton", mutates_args=())
def _registered(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, H: int, K: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(qkv, ba, a_log, dt_bias, H, K, scale)


@_registered.register_fake
def _(qkv, ba, a_log, dt_bias, H, K, scale):
    return _made(qkv, a_log.shape[0], H, K)


@torch.library.custom_op("seqzoo::delta_inputs_triton_backward", mutates_args=())
def _gradients(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, grads: list[Tensor], H: int, K: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(qkv, ba, a_log, dt_bias, grads, H, K, scale)


@_gradients.register_fake
def _(qkv, ba, a_log, dt_bias, grads, H, K, scale):
    return tuple(x.new_empty(x.shape) for x in (qkv, ba, a_log, dt_bias))


class _DeltaInputs(torch.autograd.Function):
    """Around the registered ops, which may not return a view, as v is."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, H: int, K: int, scale: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv, ba, a_log, dt_bias)
        ctx.sizes = H, K, scale
        q, k, g, beta = _registered(qkv, ba, a_log, dt_bias, H, K, scale)
        return q, k, _values(qkv, a_log, H, K), g, beta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(*ctx.saved_tensors, list(grads), *ctx.sizes), None, None, None


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    half, full = torch.bfloat16, torch.float32
    for B, T, H, HV, K, V, dtype in (
        (2, 4096, 16, 32, 128, 128, half),
        (2, 4096, 16, 32, 128, 128, full),
        (2, 4096, 8, 8, 64, 128, half),
        (2, 4096, 4, 8, 256, 512, half),
        (2, 1024, 2, 2, 512, 512, half),
    ):
        inputs = (
            make((B, T, 2 * H * K + HV * V), dtype),
            make((B, T, 2 * HV), dtype),
            make((HV,), full),
            make((HV,), full),
        )
        grads = [make((B, T, H, K), full), make((B, T, H, K), full), make((B, T, HV, V), dtype)]
        grads += [make((B, T, HV), full), make((B, T, HV), full)]
        name = f"{H} and {HV} heads of {K} and {V}, {dtype}"
        yield f"forward {name}", lambda x=(*inputs, H, K, 2.0): forward(*x)
        yield f"backward {name}", lambda x=(*inputs, grads, H, K, 2.0): backward(*x)
