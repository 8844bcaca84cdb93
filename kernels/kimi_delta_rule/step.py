"""kimi_delta_rule_step_: a few tokens of decoding, the memories kept in a pool and written in place."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqzoo.kernels.gpu import needs_gpu
from seqzoo.kernels.gpu.pool import check_pool, gathered, step_on_gpu
from seqzoo.kernels.kimi_delta_rule.gpu_call import kimi_delta_rule_step_triton
from seqzoo.kernels.kimi_delta_rule.op import BACKENDS, _check, kimi_delta_rule


def kimi_delta_rule_step_(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    pool: Float[Tensor, "slots H K V"],
    index: Int[Tensor, " B"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """`kimi_delta_rule` of 1 to 16 tokens, from memories in a pool that become the next ones in place.

    No gradients. Safe in a CUDA graph: the index is read on the device, and nothing else depends on numbers there.

    Args:
        q, k, v, g, beta, starts: as in `kimi_delta_rule`.
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
    _check(q, v, k, g, beta, None, starts)
    (B, _, H, K), V = q.shape, v.shape[3]
    inputs = dict(q=q, k=k, v=v, g=g, beta=beta)
    check_pool("kimi_delta_rule_step_", inputs, pool, (H, K, V), index)
    if not step_on_gpu(BACKENDS, v, K):
        return gathered(lambda state: kimi_delta_rule(*inputs.values(), state=state, starts=starts), B, pool, index)
    needs_gpu(v)
    run = _registered if torch.compiler.is_compiling() else kimi_delta_rule_step_triton
    return run(q, k, v, g, beta, pool, index, starts)


@torch.library.custom_op("seqzoo::kimi_delta_rule_step", mutates_args=("pool",))
def _registered(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, index: Tensor | None, starts: Tensor | None
) -> Tensor:
    return kimi_delta_rule_step_triton(q, k, v, g, beta, pool, index, starts)


@_registered.register_fake
def _(q, k, v, g, beta, pool, index, starts):
    return v.new_empty(v.shape)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernel in its shape classes; see `kernels/gpu/examples.py`."""
    for B, T, H, K, V, dtype, indexed, packed in (
        (64, 1, 32, 128, 128, torch.bfloat16, True, False),
        (64, 4, 32, 128, 128, torch.bfloat16, False, False),
        (64, 4, 32, 128, 128, torch.float32, True, True),
        (64, 2, 8, 64, 64, torch.bfloat16, True, False),
        (64, 2, 8, 256, 512, torch.bfloat16, True, False),
        (8, 2, 2, 1024, 1024, torch.float32, True, False),
    ):
        q, k, g = (make((B, T, H, K), torch.float32) for _ in range(3))  # as they come normalised
        v, beta = make((B, T, H, V), dtype), make((B, T, H), torch.float32)
        pool = make((2 * B, H, K, V), torch.float32)
        index = make((B,), torch.int64) if indexed else None
        starts = make((B, T), torch.bool) if packed else None
        run = lambda *x: lambda: kimi_delta_rule_step_triton(*x)
        yield f"step {K}x{V} {dtype}", run(q, k, v, g, beta, pool, index, starts)
