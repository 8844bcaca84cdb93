"""What the Triton kernels of linear attention share beside `kernels/gpu/tiles.py`."""

import triton
import triton.language as tl

from seqzoo.kernels.gpu.tiles import two

C: tl.constexpr = tl.constexpr(64)  # tokens of a chunk, the most that sums of log decays can take
LEVELS: tl.constexpr = tl.constexpr(6)
NONE: tl.constexpr = tl.constexpr(0)  # no decay
HEAD: tl.constexpr = tl.constexpr(1)  # one per key head
CHANNEL: tl.constexpr = tl.constexpr(2)  # one per key channel


@triton.jit
def head_decays(g, starts, row, group, left, tokens, G: tl.constexpr):
    """Of a chunk with one decay per head, sums as two numbers: up to each token, and of all."""
    coarse, fine = two(head_log(g, starts, row, group, left, tokens, G))
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def head_log(g, starts, row, group, left, tokens, G: tl.constexpr):
    """g of a chunk [C], -128 at a document's start; without g it is 0 elsewhere."""
    x = tl.zeros([C], tl.float32)
    if g is not None:
        x = tl.load(g + (row + tokens) * G + group, mask=tokens < left, other=0.0)
    if starts is not None:
        x = tl.where(tl.load(starts + row + tokens, mask=tokens < left, other=0) != 0, -128.0, x)
    return x
