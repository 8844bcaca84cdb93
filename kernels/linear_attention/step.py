"""linear_attention_step_: a few tokens of decoding, the memories kept in a pool and written in place."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu
from seqzoo.kernels.gpu.pool import blocks, check_pool, gathered, rows, step_on_gpu
from seqzoo.kernels.linear_attention.op import BACKENDS, _check, linear_attention


def linear_attention_step_(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    g: Float[Tensor, "B T G"] | Float[Tensor, "B T G K"] | None,
    pool: Float[Tensor, "slots G K V"],
    index: Int[Tensor, " B"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """`linear_attention` of 1 to 16 tokens, from memories in a pool that become the next ones in place.

    No gradients. Safe in a CUDA graph: the index is read on the device, and nothing else depends on numbers there.

    Args:
        q, k, v, g, starts: as in `linear_attention`.
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
    _check(q, k, v, g, None, starts)
    B, K, (G, V) = q.shape[0], q.shape[3], v.shape[2:]
    inputs = dict(q=q, k=k, v=v) | ({} if g is None else dict(g=g))
    check_pool("linear_attention_step_", inputs, pool, (G, K, V), index)
    if not step_on_gpu(BACKENDS, v, K):
        return gathered(lambda state: linear_attention(q, k, v, g, state=state, starts=starts), B, pool, index)
    needs_gpu(v)
    run = _registered if torch.compiler.is_compiling() else linear_attention_step_triton
    return run(q, k, v, g, pool, index, starts)


def linear_attention_step_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, index: Tensor | None, starts: Tensor | None
) -> Tensor:
    """The same on a GPU, in one launch: a program per row, memory and slice of V."""
    from seqzoo.kernels.linear_attention.gpu_step import linear_attention_steps

    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    q, k, v = rows(q), rows(k), rows(v)
    g, starts = (None if x is None else x.contiguous() for x in (g, starts))
    o, cut = v.new_empty(B, T, H, V), blocks(K, V, v.device)
    launch(
        linear_attention_steps,
        (B * G * -(-V // cut["BV"]),),
        *(q, k, v, g, pool, index, starts, o),
        *(T, pool.shape[0], pool.stride(0), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        **dict(H=H, G=G, K=K, V=V, PER_CHANNEL=g is not None and g.ndim == 4, **cut),
    )
    return o


@torch.library.custom_op("seqzoo::linear_attention_step", mutates_args=("pool",))
def _registered(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, pool: Tensor, index: Tensor | None, starts: Tensor | None
) -> Tensor:
    return linear_attention_step_triton(q, k, v, g, pool, index, starts)


@_registered.register_fake
def _(q, k, v, g, pool, index, starts):
    return v.new_empty(*q.shape[:3], v.shape[3])


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernel in its shape classes; see `kernels/gpu/examples.py`."""
    for B, T, H, G, K, V, decay, dtype, indexed, packed in (
        (64, 2, 16, 16, 128, 128, "head", torch.bfloat16, True, False),
        (64, 2, 32, 4, 128, 128, "channel", torch.bfloat16, True, False),
        (64, 4, 32, 4, 128, 128, "channel", torch.float32, True, True),
        (64, 4, 16, 16, 128, 128, "none", torch.bfloat16, False, False),
        (64, 2, 8, 8, 64, 64, "head", torch.bfloat16, True, False),
        (64, 2, 8, 8, 96, 192, "channel", torch.bfloat16, True, False),
        (64, 2, 4, 4, 256, 512, "channel", torch.bfloat16, True, False),
        (8, 2, 2, 2, 1024, 1024, "channel", torch.float32, True, False),
    ):
        q, k, v = make((B, T, H, K), dtype), make((B, T, G, K), dtype), make((B, T, G, V), dtype)
        g = None if decay == "none" else make((B, T, G) if decay == "head" else (B, T, G, K), torch.float32)
        pool = make((2 * B, G, K, V), torch.float32)
        index = make((B,), torch.int64) if indexed else None
        starts = make((B, T), torch.bool) if packed else None
        run = lambda *x: lambda: linear_attention_step_triton(*x)
        yield f"step {K}x{V} {decay} {dtype}", run(q, k, v, g, pool, index, starts)
