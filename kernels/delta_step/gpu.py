"""Gated DeltaNet's step on a GPU, in one launch: a program per row and key head, with its value heads after each other.

It is alone with its channels and its memories, so that both pools can be written in place.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from seqzoo.kernels.gpu import launch, tuned
from seqzoo.kernels.gpu.pool import registers


def delta_step_triton(
    qkv: Tensor,
    ba: Tensor,
    gate: Tensor,
    filters: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    conv_pool: Tensor,
    pool: Tensor,
    index: Tensor | None,
    starts: Tensor | None,
    eps: float,
    beta_scale: float,
) -> Tensor:
    """Same as `op.delta_step_`; the pools are written over."""
    from seqzoo.kernels.delta_step.gpu_step import delta_steps

    (B, T, C), (HV, V), K, W = qkv.shape, gate.shape[2:], pool.shape[2], filters.shape[1]
    H = (C - HV * V) // (2 * K)
    qkv, ba, gate = (x if x.stride(-1) == 1 else x.contiguous() for x in (qkv, ba, gate.flatten(2)))
    filters, a_log, dt_bias, weight = (x.contiguous() for x in (filters, a_log, dt_bias, weight))
    starts = None if starts is None else starts.contiguous()
    y = qkv.new_empty(B, T, HV, V)
    BK, BO, BW = (1 << (n - 1).bit_length() for n in (K, V, W))
    cut = tuned("delta_step", "step", qkv.device, qkv.dtype, K=K)
    cut = cut | dict(BV=min(cut["BV"], BO)) | registers(255, qkv.device)
    read = y if y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)  # before the norm
    launch(
        delta_steps,
        (B * H,),
        *(qkv, ba, gate, filters, a_log, dt_bias, weight, conv_pool, pool, index, starts, read, y),
        *(T, pool.shape[0], conv_pool.stride(0), pool.stride(0)),
        *(*qkv.stride()[:2], *ba.stride()[:2], *gate.stride()[:2], eps, beta_scale),
        **dict(H=H, HV=HV, K=K, V=V, W=W, BW=BW, BK=BK, BO=BO, **cut),
    )
    return y


@torch.library.custom_op("seqzoo::delta_step", mutates_args=("conv_pool", "pool"))
def registered(
    qkv: Tensor,
    ba: Tensor,
    gate: Tensor,
    filters: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    conv_pool: Tensor,
    pool: Tensor,
    index: Tensor | None,
    starts: Tensor | None,
    eps: float,
    beta_scale: float,
) -> Tensor:
    """`delta_step_triton` as torch.compile knows it."""
    pools = conv_pool, pool, index, starts
    return delta_step_triton(qkv, ba, gate, filters, a_log, dt_bias, weight, *pools, eps, beta_scale)


@registered.register_fake
def _(qkv, ba, gate, filters, a_log, dt_bias, weight, conv_pool, pool, index, starts, eps, beta_scale):
    return qkv.new_empty(gate.shape)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernel in its shape classes; see `kernels/gpu/examples.py`."""
    for B, T, H, HV, K, V, dtype, indexed, packed in (
        (64, 2, 16, 32, 128, 128, torch.bfloat16, True, False),
        (64, 4, 16, 32, 128, 128, torch.bfloat16, False, False),
        (64, 4, 16, 32, 128, 128, torch.float32, True, True),
        (64, 2, 8, 8, 64, 64, torch.bfloat16, True, False),
        (64, 2, 8, 8, 64, 64, torch.float32, True, True),
        (64, 2, 4, 4, 96, 192, torch.bfloat16, True, False),
        (64, 2, 4, 4, 256, 256, torch.bfloat16, True, False),
        (8, 2, 1, 1, 1024, 1024, torch.float32, True, False),
    ):
        C, W = 2 * H * K + HV * V, 4
        time = make((B, T, C), dtype), make((B, T, 2 * HV), dtype), make((B, T, HV, V), dtype)
        constant = make((C, W), dtype), *(make((n,), dtype) for n in (HV, HV, V))
        pools = make((2 * B, W - 1, C), dtype), make((2 * B, HV, K, V), torch.float32)
        index = make((B,), torch.int64) if indexed else None
        starts = make((B, T), torch.bool) if packed else None
        run = lambda *x: lambda: delta_step_triton(*x)
        yield f"step {K}x{V} {dtype}", run(*time, *constant, *pools, index, starts, 1e-6, 2.0)
