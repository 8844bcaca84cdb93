"""momentum_delta_rule_step_: a few tokens of decoding, the memories kept in a pool and written in place."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu
from seqzoo.kernels.gpu.pool import blocks, check_pool, gathered, rows, step_on_gpu
from seqzoo.kernels.momentum_delta_rule.op import BACKENDS, _check, momentum_delta_rule


def momentum_delta_rule_step_(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    p: Float[Tensor, "B T HP K"],
    log_alpha: Float[Tensor, "B T HV"],
    log_mu: Float[Tensor, "B T HV"],
    beta: Float[Tensor, "B T HV"],
    eta: Float[Tensor, "B T HV"],
    pool: Float[Tensor, "slots HV 2 K V"],
    index: Int[Tensor, " B"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T HV V"]:
    """`momentum_delta_rule` of 1 to 16 tokens, from memories in a pool that become the next ones in place.

    No gradients. Safe in a CUDA graph: the index is read on the device, and nothing else depends on numbers there.

    Args:
        q, k, v, p, log_alpha, log_mu, beta, eta, starts: as in `momentum_delta_rule`.
        pool: fp32, [S, M] of each slot; slots may stand any distance apart, each is contiguous.
        index: int32 or int64, the slot of each row; a negative one marks a row without, of which nothing is read or
            written. No slot may be named twice: that is not checked, and what it then keeps is not defined. None: row b
            has slot b.

    Returns:
        What was read, in v's dtype; zeros in rows without a slot. On a GPU it is NaN where the index is beyond the
        pool; elsewhere that raises IndexError.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token or more than 16, a gradient to be recorded, or a
            forced backend that cannot run this.
    """
    heads = dict(log_alpha=log_alpha, log_mu=log_mu, beta=beta, eta=eta)
    _check(q, v, p, k=k, **heads, state=None, starts=starts)
    B, K, (HV, V) = q.shape[0], q.shape[3], v.shape[2:]
    inputs = dict(q=q, k=k, v=v, p=p, **heads)
    check_pool("momentum_delta_rule_step_", inputs, pool, (HV, 2, K, V), index)
    if not step_on_gpu(BACKENDS, v, K):
        return gathered(lambda state: momentum_delta_rule(*inputs.values(), state=state, starts=starts), B, pool, index)
    needs_gpu(v)
    run = _registered if torch.compiler.is_compiling() else momentum_delta_rule_step_triton
    return run(*inputs.values(), pool, index, starts)


def momentum_delta_rule_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    beta: Tensor,
    eta: Tensor,
    pool: Tensor,
    index: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    """The same on a GPU, in one launch: a program per row, value head and slice of V."""
    from seqzoo.kernels.momentum_delta_rule.gpu_step import momentum_delta_rule_steps

    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    wide = [rows(x) for x in (q, k, v, p)]
    starts = None if starts is None else starts.contiguous()
    o, cut = v.new_empty(v.shape), blocks(K, V, v.device, states=2)
    launch(
        momentum_delta_rule_steps,
        (B * HV * -(-V // cut["BV"]),),
        *(*wide, *(x.contiguous() for x in (log_alpha, log_mu, beta, eta)), pool, index, starts, o),
        *(T, pool.shape[0], pool.stride(0), *(step for x in wide for step in x.stride()[:2])),
        **dict(H=H, HP=p.shape[2], HV=HV, K=K, V=V, **cut),
    )
    return o


@torch.library.custom_op("seqzoo::momentum_delta_rule_step", mutates_args=("pool",))
def _registered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    log_alpha: Tensor,
    log_mu: Tensor,
    beta: Tensor,
    eta: Tensor,
    pool: Tensor,
    index: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    return momentum_delta_rule_step_triton(q, k, v, p, log_alpha, log_mu, beta, eta, pool, index, starts)


@_registered.register_fake
def _(q, k, v, p, log_alpha, log_mu, beta, eta, pool, index, starts):
    return v.new_empty(v.shape)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernel in its shape classes; see `kernels/gpu/examples.py`."""
    for B, T, H, HV, K, V, dtype, indexed, packed in (
        (64, 2, 16, 32, 128, 128, torch.bfloat16, True, False),
        (64, 4, 16, 32, 128, 128, torch.bfloat16, False, False),
        (64, 4, 16, 32, 128, 128, torch.float32, True, True),
        (64, 2, 8, 8, 64, 64, torch.bfloat16, True, False),
        (64, 2, 4, 8, 96, 192, torch.bfloat16, True, False),
        (64, 2, 4, 8, 256, 512, torch.bfloat16, True, False),
        (8, 2, 2, 2, 1024, 1024, torch.float32, True, False),
    ):
        q, k, p = (make((B, T, H, K), torch.float32) for _ in range(3))
        v, heads = make((B, T, HV, V), dtype), [make((B, T, HV), torch.float32) for _ in range(4)]
        pool = make((2 * B, HV, 2, K, V), torch.float32)
        index = make((B,), torch.int64) if indexed else None
        starts = make((B, T), torch.bool) if packed else None
        run = lambda *x: lambda: momentum_delta_rule_step_triton(*x)
        yield f"step {K}x{V} {dtype}", run(q, k, v, p, *heads, pool, index, starts)
