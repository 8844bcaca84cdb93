"""What the Triton kernels of linear attention share: tiles, and sums of log decays whose differences are exact.

Within a chunk the log decay from after token j to token i is G_i - G_j, G the running sum. In fp32 the difference of
two sums of hundreds has lost the digits that matter where few decays are strong and the rest weak. So G is kept as two
numbers: multiples of 2^-10, whose sums and differences fp32 holds exactly up to 2^14, and the rest, which is less than
2^-4 in all. To that end a log decay under -128, and -inf, is -128, whose exp in fp32 is 0, as is that of every sum with
it.
"""

import triton
import triton.language as tl

C: tl.constexpr = tl.constexpr(64)  # tokens of a chunk: 64 times -128 is what the sums above can take
LEVELS: tl.constexpr = tl.constexpr(6)
NONE: tl.constexpr = tl.constexpr(0)  # no decay
HEAD: tl.constexpr = tl.constexpr(1)  # one per key head
CHANNEL: tl.constexpr = tl.constexpr(2)  # one per key channel


@triton.jit
def tile(x, step, rows, columns, left, WIDTH: tl.constexpr):
    """[rows, columns] of a head from its chunk's first token on; 0 from the token `left` on, and beyond WIDTH."""
    inside = (rows < left)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x + rows[:, None] * step + columns[None, :], mask=inside, other=0.0)


@triton.jit
def put(x, step, rows, columns, left, WIDTH: tl.constexpr, value):
    """Store what `tile` would load."""
    inside = (rows < left)[:, None] & (columns < WIDTH)[None, :]
    tl.store(x + rows[:, None] * step + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def two(g):
    """A log decay as a multiple of 2^-10 and the rest."""
    g = tl.where(g < -128.0, -128.0, g)
    coarse = tl.floor(g * 1024.0) * 0.0009765625
    return coarse, g - coarse


@triton.jit
def fall(coarse, fine):
    """exp of a difference of two sums, which is 0 or less but for the rounding of the rest."""
    return tl.exp(tl.minimum(coarse + fine, 0.0))


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


@triton.jit
def channel_log(g, starts, row, group, left, tokens, keys, G: tl.constexpr, K: tl.constexpr):
    """g of a chunk [C, keys], -128 at a document's start."""
    x = tile(g + (row * G + group) * K, G * K, tokens, keys, left, K)
    if starts is not None:
        x = tl.where((tl.load(starts + row + tokens, mask=tokens < left, other=0) != 0)[:, None], -128.0, x)
    return x


@triton.jit
def halves(coarse, fine, tokens, level, WIDTH: tl.constexpr):
    """Decays [C, WIDTH] between each token and the end of the first half of its block of 2^(level + 1) tokens."""
    end = tl.broadcast_to((((tokens >> (level + 1)) << (level + 1)) + (1 << level) - 1)[:, None], [C, WIDTH])
    return tl.exp(-tl.abs((coarse - tl.gather(coarse, end, 0)) + (fine - tl.gather(fine, end, 0))))
