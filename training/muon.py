"""Muon: momentum, made orthogonal. Equal shapes go through one batched iteration.

    m <- lerp(m, grad, 1 - momentum)          u = lerp(grad, m, momentum)  (Nesterov)  or  u = m
    X = u / |u|;  X <- a X + (b A + c A A) X,  A = X X^T                    (Newton-Schulz, some steps)
    p <- (1 - lr decay) p - lr ratio(shape) X

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; ratio "match_rms_adamw": arXiv 2502.16982.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from seqzoo.training.sharded import cuts_of, is_whole_here, local, part_of, shape_of, whole
from seqzoo.training.split import split_of

NS_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the polynomial a, b, c: steepest at zero
RATIOS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
LARGEST = 2**31  # bytes of matrices that are made orthogonal at a time


class Muon(torch.optim.Muon):
    """torch.optim.Muon for matrices [out, in] and for stacks of them [E, out, in], as experts have.

    torch's takes one matrix after the other. Here all matrices of one shape are one batched product, which for small
    models is most of the optimizer's time saved. Matrices that are cut over processes are put together, each process
    makes some of them orthogonal, and all exchange the results; stacks, cut between matrices, need no exchange.

    Args:
        params: matrices and stacks of matrices, or groups of them.
        lr: learning rate.
        weight_decay: per unit of lr, decoupled.
        momentum, nesterov: of the gradient.
        eps: the least norm to divide by.
        ns_steps: Newton-Schulz steps.
        adjust_lr_fn: a name in RATIOS, how a matrix's shape scales its step.
        ns_dtype: the iteration's precision, a name in NS_DTYPES; torch's is bfloat16. auto is that too, but float32 on
            a CPU that has no instructions for bfloat16, where a product in it takes fifteen times as long.

    Raises:
        ValueError: a parameter that is no matrix or stack, a name that is none of the known, a negative number.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        ns_dtype: str = "bfloat16",
    ) -> None:
        numbers = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps, ns_steps=ns_steps)
        for name, number in numbers.items():
            if not number >= 0:
                raise ValueError(f"Muon {name}: expected at least 0, got {number}")
        for name, value, known in (("adjust_lr_fn", adjust_lr_fn, RATIOS), ("ns_dtype", ns_dtype, NS_DTYPES)):
            if value not in known:
                raise ValueError(f"Muon {name}: expected one of {list(known)}, got {value!r}")
        defaults = dict(numbers, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn, ns_dtype=ns_dtype)
        Optimizer.__init__(self, params, defaults)  # not the parent's, which refuses stacks
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim not in (2, 3):
                raise ValueError(f"Muon params: expected [out, in] or [E, out, in], got {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads, mine = [local(p.grad) for p in params], [local(p) for p in params]  # of a cut parameter, the part here
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        torch._foreach_mul_(mine, 1 - group["lr"] * group["weight_decay"])
        for places in _together(params):
            rows, columns = _shape(params[places[0]])[-2:]
            some = [_matrices(updates[i], params[i]) for i in places]
            dtype = _dtype(group["ns_dtype"], some[0].device)
            run = lambda x, dtype=dtype: orthogonal(x, group["ns_steps"], group["eps"], dtype)
            directions = _dealt(torch.cat(some), params[places[0]], run).to(some[0].dtype)
            pieces = directions.split([len(x) for x in some])
            pieces = [_part(piece, params[i]).view_as(mine[i]) for piece, i in zip(pieces, places, strict=True)]
            step = group["lr"] * RATIOS[group["adjust_lr_fn"]](rows, columns)
            torch._foreach_add_([mine[i] for i in places], pieces, alpha=-step)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.float32 if emulated else torch.bfloat16
    return NS_DTYPES[name]


def orthogonal(matrices: Tensor, steps: int, eps: float, dtype: torch.dtype) -> Tensor:
    """[N, out, in] -> the same shape in `dtype`, with singular values near 1."""
    a, b, c = NS_COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _together(params: list[Tensor]) -> list[list[int]]:
    """Those of one shape, as many at a time as fit LARGEST. Whole matrices that a process has are no one's to deal."""
    places = defaultdict(list)
    for i, p in enumerate(params):
        places[_shape(p)[-2:], p.dtype, p.device, cuts_of(p), isinstance(p, DTensor) and is_whole_here(p)].append(i)
    size = lambda p: (math.prod(_shape(p)) // (cuts_of(p) if is_whole_here(p) else 1)) * p.element_size()
    return [[some[i] for i in batch] for some in places.values() for batch in batches([size(params[i]) for i in some])]


def batches(sizes: list[int]) -> list[list[int]]:
    """Places beside each other, of LARGEST bytes together at most, or one."""
    found: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = LARGEST
        found[-1].append(i)
        room -= size
    return found


def _shape(p: Tensor) -> tuple[int, ...]:
    """Of the whole."""
    return shape_of(p, split_of(p))


def _matrices(update: Tensor, p: Tensor) -> Tensor:
    """The matrices [n, out, in] of which an update has a part: itself, or of a matrix cut over processes all of it."""
    split = split_of(p)
    if is_whole_here(p) and isinstance(p, DTensor):
        return update if split is None else split.give(update)
    x = whole(update, p, split)
    return x if x.ndim == 3 else x[None]


def _part(piece: Tensor, p: Tensor) -> Tensor:
    """The part here of what `_matrices` gave."""
    split = split_of(p)
    if is_whole_here(p) and isinstance(p, DTensor):
        return piece if split is None else split.take(piece)
    return part_of(piece if p.ndim == 3 else piece[0], p, split)


def _dealt(stack: Tensor, p: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` over matrices; where each of several processes has all of them, each takes some, and they exchange them."""
    if is_whole_here(p):
        return run(stack)
    group = p.device_mesh.get_group(p.device_mesh.ndim - 1)
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return run(stack)
    each = -(-len(stack) // ranks)
    padded = torch.cat([stack, stack.new_zeros(each * ranks - len(stack), *stack.shape[1:])])
    done = run(padded.split(each)[dist.get_rank(group)]).contiguous()
    parts = [torch.empty_like(done) for _ in range(ranks)]
    dist.all_gather(parts, done, group=group)
    return torch.cat(parts)[: len(stack)]
