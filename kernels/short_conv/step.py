"""short_conv_step_: a few tokens of decoding, the last inputs kept in a pool and written in place."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqzoo.kernels.checks import KINDS, check_tensors
from seqzoo.kernels.dispatch import choose
from seqzoo.kernels.gpu import needs_gpu
from seqzoo.kernels.gpu.pool import gathered
from seqzoo.kernels.short_conv.gpu import start
from seqzoo.kernels.short_conv.op import BACKENDS, able, short_conv

MOST = 16  # tokens: one segment of the kernel


def short_conv_step_(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    pool: Float[Tensor, "slots W1 C"],
    index: Int[Tensor, " B"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T C"]:
    """`short_conv` of 1 to 16 tokens, from past inputs in a pool that become the next ones in place.

    No gradients. Safe in a CUDA graph: the index is read on the device, and nothing else depends on numbers there.

    Args:
        x, weight, starts: as in `short_conv`.
        pool: each slot the last W-1 inputs of a sequence, in any floating dtype and with any strides but the last.
        index: int32 or int64, the slot of each row; a negative one marks a row without, of which nothing is read or
            written. No slot may be named twice: that is not checked, and what it then keeps is not defined. None: row b
            has slot b.

    Returns:
        y, in x's dtype; zeros in rows without a slot. On a GPU it is NaN where the index is beyond the pool; elsewhere
        that raises IndexError.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no token or more than 16, a gradient to be recorded, or a
            forced backend that cannot run this.
    """
    _check(x, weight, pool, index, starts)
    name = choose({"triton", *BACKENDS}, tokens=x.shape[1], device=x.device, able=lambda name: able(name, x, weight))
    if name != "triton":
        return gathered(lambda past: short_conv(x, weight, past, starts), x.shape[0], pool, index)
    needs_gpu(x)
    run = _registered if torch.compiler.is_compiling() else short_conv_step_triton
    return run(x, weight, pool, index, starts)


def short_conv_step_triton(
    x: Tensor, weight: Tensor, pool: Tensor, index: Tensor | None, starts: Tensor | None
) -> Tensor:
    """The same on a GPU, in one launch."""
    return start(x, weight, pool, starts, index, pool)


@torch.library.custom_op("seqzoo::short_conv_step", mutates_args=("pool",))
def _registered(x: Tensor, weight: Tensor, pool: Tensor, index: Tensor | None, starts: Tensor | None) -> Tensor:
    return short_conv_step_triton(x, weight, pool, index, starts)


@_registered.register_fake
def _(x, weight, pool, index, starts):
    return x.new_empty(x.shape)


def _check(x: Tensor, weight: Tensor, pool: Tensor, index: Tensor | None, starts: Tensor | None) -> None:
    (B, T, C), W = x.shape, weight.shape[1]
    if not (B and C and 0 < T <= MOST):
        raise ValueError(f"short_conv_step_: x: expected [B, T, C], T of 1 to {MOST}, got {tuple(x.shape)}")
    if pool.ndim != 3 or not pool.shape[0]:
        raise ValueError(f"short_conv_step_: pool: expected [slots, {W - 1}, {C}], got {tuple(pool.shape)}")
    kind = index.dtype if index is not None and index.dtype in (torch.int32, torch.int64) else torch.int64
    check_tensors(
        "short_conv_step_",
        dict(
            x=(x, x.shape), weight=(weight, (C, W)), pool=(pool, (pool.shape[0], W - 1, C)), index=(index, (B,)),
            starts=(starts, (B, T)),
        ),
        like="x",
        kinds=KINDS | {"index": kind},
    )  # fmt: skip
    if index is None and pool.shape[0] < B:
        raise ValueError(f"short_conv_step_: pool: expected a slot for each of {B} rows, got {pool.shape[0]}")
    if pool.stride(2) != 1 and C > 1:
        raise ValueError(f"short_conv_step_: pool: expected channels side by side, got strides {pool.stride()}")
    if torch.is_grad_enabled():
        for name, given in dict(x=x, weight=weight, pool=pool).items():
            if given.requires_grad:
                raise ValueError(
                    f"short_conv_step_: {name}: expected no gradient to be recorded: a step overwrites its pool"
                )


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernel in its shape classes; see `kernels/gpu/examples.py`."""
    for T, dtype in ((1, torch.bfloat16), (5, torch.bfloat16), (1, torch.float32)):
        x, weight, pool = make((64, T, 8192), dtype), make((8192, 4), dtype), make((128, 3, 8192), dtype)
        given = x, weight, pool, make((64,), torch.int64), None
        yield f"step of {T} tokens, {dtype}", lambda given=given: short_conv_step_triton(*given)
