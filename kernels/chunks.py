"""What the chunked forms of recurrences share: time cut into chunks, and decays between two tokens of one.

With decays g per token and D_ij = exp(g_{j+1} + .. + g_i) for j <= i, no sum of g is ever a difference of two others:
so nothing is lost of small ones, and g = -inf, which is what a document's start is made of, forgets all. For this D is
put together from halves: where i is in the second half of a block and j in its first, the sum is one over i's half up
to i, plus one over j's half after j; a block of one token needs none. With a decay per channel the two factors go to
the two sides of the product, so that it is products of matrices, no exponent is positive, and no tensor is [C, C, K].
Source: the zoo's own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def to_chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, G, ...] -> [n, B G, C, ...], padded with zeros at the end."""
    pad = -x.shape[1] % C
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, C)).movedim((1, 3), (0, 2)).flatten(1, 2)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, N, .., M, X] @ b [n, N, .., X, Y], the batch flat: bmm spares matmul's bookkeeping."""
    batch = a.shape[:-2]
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, batch)


def sums(g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of g [n, N, C, X] in blocks of h = 1, 2, 4 .. C tokens: sums from a block's first token to each of its own, and
    over those after each, both [n, N, C / h, h, X]; the last pair without the block."""
    until, after = g[..., None, :], torch.zeros_like(g)[..., None, :]
    while until.shape[2] > 1:
        yield until, after
        (a, b), (c, d) = (x.unflatten(2, (-1, 2)).unbind(3) for x in (until, after))
        until = torch.cat([a, b + a[..., -1:, :]], dim=-2)
        after = torch.cat([c + b[..., -1:, :], d], dim=-2)
    yield until[:, :, 0], after[:, :, 0]


def joined(first: Tensor, second: Tensor, between: Tensor, above: Tensor) -> Tensor:
    """The blocks on the diagonal of two halves, and those below and above it -> one block."""
    return torch.cat([torch.cat([first, above], -1), torch.cat([between, second], -1)], -2)


def scores_by_channel(q: Tensor, k: Tensor, halves: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[n, N, R, C, C] with one decay per key channel."""
    R = q.shape[2]
    scores = (q * k[:, :, None]).sum(-1).transpose(2, 3)[..., None, None]  # [n, N, C / h, R, h, h]
    for until, after in halves:
        h = until.shape[3]
        first, second = scores.unflatten(2, (-1, 2)).unbind(3)
        faded = k.unflatten(2, (-1, 2, h))[:, :, :, 0] * after[:, :, ::2].exp()  # [n, N, C / 2h, h, K]
        asked = q.unflatten(3, (-1, 2, h))[:, :, :, :, 1].transpose(2, 3) * until[:, :, 1::2].exp()[:, :, :, None]
        between = product(asked.flatten(3, 4), faded.mT).unflatten(3, (R, h))
        scores = joined(first, second, between, torch.zeros_like(between))
    return scores[:, :, 0]
