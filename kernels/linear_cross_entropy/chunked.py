"""A few tokens at a time: their logits, at once what the loss asks of hidden and weight, and on to the next few.

The logits of a chunk are all that is ever there, [rows, V], in fp32, and written over by their own gradient softmax - 1
at the label. So the three products of a whole cross-entropy are done once each, all of them in the forward pass; the
backward pass only scales. Between the two a gradient as large as the weight is held instead of the logits of all.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqzoo.kernels.linear_cross_entropy.reference import IGNORED

LOGITS = 2**27  # of a chunk, 512 MiB: with fewer its passes over the weight show, see bench_cross_entropy

Grads = list[Tensor | None]  # of hidden and weight


def linear_cross_entropy_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int | None = None) -> Tensor:
    """Same as `linear_cross_entropy_reference`; its backward pass can be run once. `rows`: of a chunk."""
    rows = max(1, LOGITS // weight.shape[0]) if rows is None else rows
    learns = torch.is_grad_enabled()
    wanted = learns and hidden.requires_grad, learns and weight.requires_grad
    if not any(wanted):
        return _run(hidden, weight, labels, rows, wanted)[0]
    return _Chunked.apply(hidden, weight, labels, rows, wanted)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, wanted: tuple[bool, bool]) -> Tensor:
        nats, ctx.grads = _run(hidden, weight, labels, rows, wanted)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # used up: no second tensor of the weight's size
        if grads is None:
            raise ValueError("linear_cross_entropy: expected one backward pass, got a second; it scales what it holds")
        return *(None if grad is None else grad.mul_(d) for grad in grads), None, None, None


def _run(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, wanted: tuple[bool, bool]) -> tuple[Tensor, Grads]:
    """The nats, and those gradients of them that are wanted, in their tensors' dtypes."""
    device = hidden.device.type
    dtype, wide = _product_dtype(hidden), torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        (N, _), matrix = hidden.shape, weight.to(dtype)
        nats = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if wanted[1] else None
        room = hidden.new_empty(min(rows, N), weight.shape[0], dtype=wide)
        for at in range(0, N, rows):
            x, label = hidden[at : at + rows].to(dtype), labels[at : at + rows]
            z = _product(x, matrix.mT, room[: len(x)])
            nats += _nats(z, label, gradient=any(wanted))
            if d_hidden is not None:
                d_hidden[at : at + rows] = z.to(dtype) @ matrix
            if d_weight is not None:
                _add_product(d_weight, z.to(dtype).mT, x)
    return nats, [d_hidden, None if d_weight is None else d_weight.to(weight.dtype)]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What a matrix product here computes in, as torch's own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _product(x: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    return torch.mm(x, matrix, out=out) if x.dtype == out.dtype else out.copy_(x @ matrix)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _nats(z: Tensor, label: Tensor, *, gradient: bool) -> Tensor:
    """Of logits z [n, V], which are used up; `gradient`: that of the nats takes their place."""
    counts, place = label != IGNORED, label.clamp(min=0)[:, None]
    top, told = z.amax(1, keepdim=True), z.gather(1, place)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    nats = (total.log() + top - told)[:, 0].masked_fill(~counts, 0).sum()
    if gradient:
        z.div_(total)
        z.scatter_(1, place, z.gather(1, place) - 1).masked_fill_(~counts[:, None], 0)
    return nats
