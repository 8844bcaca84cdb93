"""What Triton kernels of chunked recurrences share: tiles, log decays whose differences are exact, and an inverse.

Within a chunk the log decay from after token j to token i is G_i - G_j, G the running sum. In fp32 the difference of
two sums of hundreds has lost the digits that matter where few decays are strong and the rest weak. So G is kept as two
numbers: multiples of 2^-10, whose sums and differences fp32 holds exactly up to 2^14, and the rest, which is less than
2^-4 in all. To that end a log decay under -128, and -inf, is -128, whose exp in fp32 is 0, as is that of every sum with
it. Of chunks of up to 64 tokens.

With one decay per key channel, what token i sees of token j <= i, sum_c q_ic exp(G_ic - G_jc) k_jc, is put together
from halves: of two tokens, the later in the second half of a block of 2, 4 .. C tokens and the earlier in its first,
the decay is that from the earlier to the first half's end times that from there to the later. A token has one such
decay for each size of block: each size is one product of matrices, of which the pairs count whose numbers differ first
in that bit, and no exponent is positive. See also `kernels/chunks.py`.
"""

import triton
import triton.language as tl


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
def channel_log(g, starts, row, group, left, tokens, keys, G: tl.constexpr, K: tl.constexpr):
    """g of a chunk [C, keys], -128 at a document's start."""
    x = tile(g + (row * G + group) * K, G * K, tokens, keys, left, K)
    if starts is not None:
        x = tl.where((tl.load(starts + row + tokens, mask=tokens < left, other=0) != 0)[:, None], -128.0, x)
    return x


@triton.jit
def halves(coarse, fine, tokens, level, WIDTH: tl.constexpr):
    """Decays [C, WIDTH] between each token and the end of the first half of its block of 2^(level + 1) tokens."""
    end = (((tokens >> (level + 1)) << (level + 1)) + (1 << level) - 1)[:, None]
    end = tl.broadcast_to(end, [tokens.shape[0], WIDTH])
    return tl.exp(-tl.abs((coarse - tl.gather(coarse, end, 0)) + (fine - tl.gather(fine, end, 0))))


@triton.jit
def inverse(N, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + N)^-1 - I of N [C, C] strictly lower triangular, C = 2^LEVELS, 16 or more.

    By doubling: [[a, 0], [b, c]]^-1 = [[a^-1, 0], [-c^-1 b a^-1, c^-1]], as exact as substitution row by row, which
    cannot be done on the matrix units. The series (I - N)(I + N^2)(I + N^4)... can, but where keys repeat its powers
    grow to thousands and cancel. Up to 16 all blocks on the diagonal go together, as a batch.
    """
    n: tl.constexpr = C // 16
    i, a, c = tl.arange(0, n), tl.arange(0, 16), tl.arange(0, C)
    same = i[:, None, None, None] == i[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(N, (n, 16, n, 16)), 0.0), axis=2)
    X = tl.where((a[:, None] == a[None, :] + 1) & (a[:, None] % 2 == 1), -blocks, 0.0)
    X = tl.where(a[:, None] == a[None, :], 1.0, X)
    for level in tl.static_range(1, 4):
        row, column = a[:, None] >> level, a[None, :] >> level
        corner = tl.where((row % 2 == 1) & (column == row - 1), blocks, 0.0)
        X -= tl.dot(tl.dot(X, corner, input_precision=PRECISION), X, input_precision=PRECISION)
    X = tl.reshape(tl.where(same, tl.reshape(X, (n, 16, 1, 16)), 0.0), (C, C))
    for level in tl.static_range(4, LEVELS):
        row, column = c[:, None] >> level, c[None, :] >> level
        corner = tl.where((row % 2 == 1) & (column == row - 1), N, 0.0)
        X -= tl.dot(tl.dot(X, corner, input_precision=PRECISION), X, input_precision=PRECISION)
    return tl.where(c[:, None] > c[None, :], X, 0.0)
