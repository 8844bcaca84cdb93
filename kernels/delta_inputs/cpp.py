"""The rule's inputs in C++ on a CPU, float32 and bfloat16, forward and backward: see `delta_inputs.cpp`.

For backward the inputs alone are kept. Bits do not depend on the number of threads.
"""

from pathlib import Path

import torch
from torch import Tensor

from seqzoo.kernels.delta_inputs.reference import DeltaInputs
from seqzoo.kernels.native.rows import RowOp, address, rows

NATIVE = RowOp("delta_inputs", Path(__file__).with_name("delta_inputs.cpp"), "14qd12P")


def delta_inputs_cpp(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, num_key_heads: int, key_width: int, beta_scale: float
) -> DeltaInputs:
    """Same as `delta_inputs_reference`.

    Raises:
        ValueError: another dtype or device.
        BuildError: no compiler that works.
    """
    run = _DeltaInputs.apply if NATIVE.learns(qkv, ba, a_log, dt_bias) else _forward
    return DeltaInputs(*run(qkv, ba, a_log, dt_bias, num_key_heads, key_width, beta_scale))


def _run(
    way: str, qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, H: int, K: int, scale: float, *results: Tensor
) -> None:
    """`results`: q, k, g, beta or their gradients, and for backward dv, dqkv, dba, dheads."""
    (B, T, C), HV = qkv.shape, a_log.shape[0]
    inputs = rows(qkv), rows(ba), a_log.contiguous(), dt_bias.contiguous()
    kinds = [t.dtype == torch.bfloat16 for t in inputs]
    pointers = [address(t) for t in (*inputs, *results)]
    pointers += [0] * (12 - len(pointers))
    steps = *inputs[0].stride()[:2], *inputs[1].stride()[:2]
    NATIVE.run(way, B, T, H, HV, K, (C - 2 * H * K) // HV, *kinds, *steps, scale, *pointers)


def _forward(
    qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, H: int, K: int, scale: float
) -> tuple[Tensor, ...]:
    (B, T, C), HV, qkv = qkv.shape, a_log.shape[0], rows(qkv)
    q, g = torch.empty((B, T, H, K), dtype=torch.float32), torch.empty((B, T, HV), dtype=torch.float32)
    k, beta = torch.empty_like(q), torch.empty_like(g)
    _run("forward", qkv, ba, a_log, dt_bias, H, K, scale, q, k, g, beta)
    V, at = (C - 2 * H * K) // HV, qkv.storage_offset() + 2 * H * K
    return q, k, qkv.as_strided((B, T, HV, V), (*qkv.stride()[:2], V, 1), at), g, beta


class _DeltaInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, H: int, K: int, scale: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv, ba, a_log, dt_bias)
        ctx.sizes = H, K, scale
        return _forward(qkv, ba, a_log, dt_bias, H, K, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dbeta: Tensor) -> tuple[Tensor | None, ...]:
        qkv, ba, a_log, dt_bias = ctx.saved_tensors
        given = [t.contiguous() for t in (dq, dk, dg, dbeta, dv)]
        dqkv, dba = torch.empty(qkv.shape, dtype=qkv.dtype), torch.empty(ba.shape, dtype=ba.dtype)
        dheads = torch.empty((2, a_log.shape[0]), dtype=torch.float32)
        _run("backward", qkv, ba, a_log, dt_bias, *ctx.sizes, *given, dqkv, dba, dheads)
        da_log, ddt_bias = dheads
        return dqkv, dba, da_log.to(a_log.dtype), ddt_bias.to(dt_bias.dtype), None, None, None
