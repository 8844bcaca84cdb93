"""What the kernels of steps in place share."""

import triton
import triton.language as tl


@triton.jit
def slot_of(index, row, slots):
    """Of a row (int64): its slot in the pool, whether it has one, and what it reads if not: 0; NaN beyond the pool."""
    slot = row if index is None else tl.load(index + row).to(tl.int64)
    return slot, (slot >= 0) & (slot < slots), tl.where(slot < slots, 0.0, float("nan"))
