"""Small Triton kernels that the tests of the tools for kernels run, count and compile."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def scale(x, y, T, BLOCK: tl.constexpr):
    """y = 2 x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < T), mask=at < T)


@triton.jit
def product(a, b, c, N: tl.constexpr, DOT: tl.constexpr):
    """c = a b for one N x N block."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None]
    left, right = tl.load(a + at).to(DOT), tl.load(b + at).to(DOT)
    tl.store(c + at, tl.dot(left, right, out_dtype=tl.float32))
