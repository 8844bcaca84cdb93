"""strict_linear_attention_step_: a few tokens of decoding, the memories kept in a pool and written in place."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu
from seqzoo.kernels.gpu.pool import check_pool, gathered, registers, rows, step_on_gpu
from seqzoo.kernels.strict_linear_attention.op import BACKENDS, _check, strict_linear_attention

TILE = dict(BN=128, BD=16)  # of a memory, in a program's registers


def strict_linear_attention_step_(
    r: Float[Tensor, "B T H N"],
    v: Float[Tensor, "B T G D"],
    pool: Float[Tensor, "slots H N D"],
    index: Int[Tensor, " B"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    decay: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """`strict_linear_attention` of 1 to 16 tokens, from memories in a pool that become the next ones in place.

    No gradients. Safe in a CUDA graph: the index is read on the device, and nothing else depends on numbers there.

    Args:
        r, v, starts, decay: as in `strict_linear_attention`.
        pool: fp32; its slots may stand any distance apart, each is contiguous.
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
    _check(r, v, None, starts, decay)
    (B, _, H, N), D = r.shape, v.shape[3]
    check_pool("strict_linear_attention_step_", dict(r=r, v=v), pool, (H, N, D), index)
    if not step_on_gpu(BACKENDS, v, TILE["BN"]):
        run = lambda state: strict_linear_attention(r, v, state=state, starts=starts, decay=decay)
        return gathered(run, B, pool, index)
    needs_gpu(v)
    run = _registered if torch.compiler.is_compiling() else strict_linear_attention_step_triton
    return run(r, v, pool, index, starts, decay)


def strict_linear_attention_step_triton(
    r: Tensor, v: Tensor, pool: Tensor, index: Tensor | None, starts: Tensor | None, decay: Tensor | None
) -> Tensor:
    """The same on a GPU: a launch with a program per tile of each row's and head's memory, and one that adds them."""
    from seqzoo.kernels.strict_linear_attention.gpu_step import (
        strict_linear_attention_steps,
        strict_linear_attention_sum,
    )

    (B, T, H, N), (G, D) = r.shape, v.shape[2:]
    r, v = rows(r), rows(v)
    starts, decay = (None if x is None else x.contiguous() for x in (starts, decay))
    tiles, slices = -(-N // TILE["BN"]), -(-D // TILE["BD"])
    o = v.new_empty(B, T, H, D)
    parts = o if tiles == 1 else v.new_empty(B, T, H, tiles, D, dtype=torch.float32)
    launch(
        strict_linear_attention_steps,
        (B * H * tiles * slices,),
        *(r, v, decay, pool, index, starts, parts),
        *(T, pool.shape[0], pool.stride(0), *r.stride()[:2], *v.stride()[:2]),
        **dict(H=H, G=G, N=N, D=D, **TILE, num_warps=4, num_stages=1, **registers(96, v.device)),
    )
    if tiles > 1:
        cut = dict(BT=64, BD=TILE["BD"], num_warps=2, num_stages=1)
        launch(strict_linear_attention_sum, (B * T * H * slices,), parts, o, **dict(TILES=tiles, D=D, **cut))
    return o


@torch.library.custom_op("seqzoo::strict_linear_attention_step", mutates_args=("pool",))
def _registered(
    r: Tensor, v: Tensor, pool: Tensor, index: Tensor | None, starts: Tensor | None, decay: Tensor | None
) -> Tensor:
    return strict_linear_attention_step_triton(r, v, pool, index, starts, decay)


@_registered.register_fake
def _(r, v, pool, index, starts, decay):
    return v.new_empty(*r.shape[:3], v.shape[3])


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    for B, T, H, G, N, D, dtype, indexed, packed, fades in (
        (8, 2, 4, 1, 8192, 256, torch.bfloat16, True, False, False),
        (8, 4, 4, 1, 8192, 256, torch.float32, False, False, True),
        (8, 4, 4, 4, 4096, 192, torch.float32, True, True, False),
        (8, 2, 4, 1, 128, 64, torch.bfloat16, True, False, False),
    ):
        r, v, pool = make((B, T, H, N), dtype), make((B, T, G, D), dtype), make((2 * B, H, N, D), torch.float32)
        index = make((B,), torch.int64) if indexed else None
        starts = make((B, T), torch.bool) if packed else None
        decay = make((H,), torch.float32) if fades else None
        run = lambda *x: lambda: strict_linear_attention_step_triton(*x)
        yield f"step {N}x{D} {dtype}", run(r, v, pool, index, starts, decay)
