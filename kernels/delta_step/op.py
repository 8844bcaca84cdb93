"""delta_step_: the public op, in place. Everything above this folder calls this and nothing else in it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqzoo.kernels.checks import check_tensors
from seqzoo.kernels.delta_step import gpu
from seqzoo.kernels.delta_step.reference import delta_step_reference
from seqzoo.kernels.gpu import needs_gpu
from seqzoo.kernels.gpu.pool import MOST, check_pool, gathered, step_on_gpu

PARTS = ("reference", "torch", "cpp", "fla")  # backends that one of the parts has; forced, the definition runs


def delta_step_(
    qkv: Float[Tensor, "B T C"],
    ba: Float[Tensor, "B T HV2"],
    gate: Float[Tensor, "B T HV V"],
    filters: Float[Tensor, "C W"],
    a_log: Float[Tensor, " HV"],
    dt_bias: Float[Tensor, " HV"],
    weight: Float[Tensor, " V"],
    conv_pool: Float[Tensor, "slots W1 C"],
    pool: Float[Tensor, "slots HV K V"],
    index: Int[Tensor, " B"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    *,
    eps: float,
    beta_scale: float = 1.0,
) -> Float[Tensor, "B T HV V"]:
    """1 to 16 tokens of Gated DeltaNet between its projections, states in pools. Definition: `reference.py`.

    No gradients. Safe in a CUDA graph: the index is read on the device, and nothing else depends on numbers there.

    Args:
        qkv: queries, keys and values side by side, C = 2 H K + HV V, before the convolution.
        ba: before their nonlinearities, the step sizes and then the decays of the HV value heads.
        gate: of the output, before its silu.
        filters: of the convolution, one per channel, the last tap is for the token itself.
        a_log, dt_bias: as in `delta_inputs`.
        weight, eps: as in `gated_rms_norm`.
        beta_scale: the largest step size, 1 or 2.
        conv_pool: each slot the W-1 inputs before the first token, in any floating dtype; the next ones are written
            over them.
        pool: fp32, each slot the memories before the first token, which become the next ones. Slots of both pools may
            stand any distance apart, each is contiguous.
        index: int32 or int64, the slot of each row in both pools; a negative one marks a row without, of which nothing
            is read or written. No slot may be named twice: that is not checked, and what it then keeps is not defined.
            None: row b has slot b.
        starts: True at the first token of each packed document, before which its filter sees zeros and its memories
            are empty; a row continues its slot up to its first start. None is no start at all.

    Returns:
        y, in qkv's dtype; zeros in rows without a slot. On a GPU it is NaN where the index is beyond the pools;
        elsewhere that raises IndexError.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token or more than 16, a gradient to be recorded, or a
            forced backend that cannot run this.
    """
    constant = dict(filters=filters, a_log=a_log, dt_bias=dt_bias, weight=weight)
    if beta_scale not in (1, 2):
        raise ValueError(f"delta_step_: beta_scale: expected 1 or 2, got {beta_scale!r}")
    _check(qkv, ba, gate, **constant, conv_pool=conv_pool, pool=pool, index=index, starts=starts)
    time, constant = (qkv, ba, gate), constant.values()
    if not step_on_gpu(PARTS, qkv, pool.shape[2]):
        run = lambda past, state: delta_step_reference(*time, *constant, past, state, starts, eps, beta_scale)
        with torch.autocast(qkv.device.type, enabled=False):
            return gathered(run, qkv.shape[0], conv_pool, index, pool)
    needs_gpu(qkv)
    run = gpu.registered if torch.compiler.is_compiling() else gpu.delta_step_triton
    return run(*time, *constant, conv_pool, pool, index, starts, eps, beta_scale)


def delta_step_is_one(qkv: Tensor, key_width: int) -> bool:
    """Whether `delta_step_` is one launch here, in place of its parts' four: on a GPU, few tokens, no gradients.

    Args:
        qkv: [B, T, C], as for `delta_step_`.
        key_width: K.
    """
    return not torch.is_grad_enabled() and qkv.shape[1] <= MOST and step_on_gpu(PARTS, qkv, key_width)


def _check(
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
) -> None:
    if qkv.ndim != 3 or gate.ndim != 4 or 0 in qkv.shape or 0 in gate.shape:
        raise ValueError(
            "delta_step_: qkv and gate: expected [B, T, C] and [B, T, HV, V], every size >= 1, "
            f"got {tuple(qkv.shape)} and {tuple(gate.shape)}"
        )
    (B, T, C), (HV, V) = qkv.shape, gate.shape[2:]
    if filters.ndim != 2 or not filters.shape[1]:
        raise ValueError(f"delta_step_: filters: expected [{C}, W], W >= 1, got {tuple(filters.shape)}")
    if pool.ndim != 4 or not pool.shape[2]:
        raise ValueError(f"delta_step_: pool: expected [slots, {HV}, K, {V}], K >= 1, got {tuple(pool.shape)}")
    K = pool.shape[2]
    heads, rest = divmod(C - HV * V, 2 * K)
    if rest or heads < 1 or HV % heads:
        raise ValueError(
            f"delta_step_: qkv: expected {HV} * {V} channels for values and 2 * {K} for each of a number of key heads "
            f"that divides {HV}, got {C}"
        )
    time = dict(qkv=(qkv, qkv.shape), ba=(ba, (B, T, 2 * HV)), gate=(gate, (B, T, HV, V)), starts=(starts, (B, T)))
    constant = dict(filters=(filters, (C, filters.shape[1])), a_log=(a_log, (HV,)), dt_bias=(dt_bias, (HV,)))
    expected = time | constant | dict(weight=(weight, (V,)))
    check_tensors("delta_step_", expected, like="qkv")
    inputs = {name: x for name, (x, _) in expected.items() if x is not None}
    window = filters.shape[1] - 1, C
    check_pool("delta_step_", inputs, conv_pool, window, index, name="conv_pool", dtype=None)
    check_pool("delta_step_", inputs, pool, (HV, K, V), index)
    if len(conv_pool) != len(pool):
        raise ValueError(f"delta_step_: conv_pool: expected pool's {len(pool)} slots, got {len(conv_pool)}")
