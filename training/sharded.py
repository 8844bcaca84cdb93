"""Tensors of which a process has a part: their whole, the part of a whole, and a norm over all parts.

A part is of what PyTorch's fully_shard has cut (a DTensor), and before that, perhaps, of what its heads have left to
this process (a `Split`).
"""

import math
import zlib
from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.training.split import Split, split_of, splits_of


def place_of(x: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this process's part in what was cut."""
    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)


def cuts_of(x: Tensor) -> int:
    """Into how many parts fully_shard has cut it."""
    return x.device_mesh.size(x.device_mesh.ndim - 1) if isinstance(x, DTensor) else 1


def cut_dim(shape: tuple[int, ...], parts: int) -> int:
    """In which dimension fully_shard is to cut: the first, but for a stack of matrices that are too few to be dealt."""
    return int(len(shape) == 3 and shape[0] % parts != 0 and shape[1] % parts == 0)


def is_whole_here(p: Tensor) -> bool:
    """Whether the process has whole matrices of it: of a stack that is cut between them, or of what is not cut."""
    return not isinstance(p, DTensor) or p.ndim == 3 and p.placements[-1].dim == 0


def shape_of(x: Tensor, split: Split | None) -> tuple[int, ...]:
    """Of the whole."""
    return tuple(x.shape) if split is None else split.whole_shape(x.shape)


def part_of(whole: Tensor, like: Tensor, split: Split | None = None) -> Tensor:
    """What this process has of it, where `like` is cut."""
    whole = whole if split is None else split.take(whole)
    if not isinstance(like, DTensor):
        return whole
    shape, offset = place_of(like)
    return whole[tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))]


def local(x: Tensor) -> Tensor:
    """This process's part, which shares memory with it."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(part: Tensor, like: Tensor, split: Split | None = None) -> Tensor:
    """From the parts of all processes, cut as `like` is."""
    if isinstance(like, DTensor):
        part = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()
    return part if split is None else split.give(part)


def blocks_of(model: SeqZooForCausalLM) -> list[nn.Module]:
    """The blocks whose weights are cut one after the other: the stack's, and then multi-token prediction's."""
    return [*model.stack.blocks, *(() if model.mtp is None else model.mtp.stack.blocks)]


def first_weights(model: SeqZooForCausalLM, device: torch.device, seed: int) -> None:
    """The weights of a new model that is on the meta device and cut: the same on any number of processes.

    A unit (a block, or what is the model's own) is drawn whole, from a generator that its name and the seed say, and
    each process keeps its parts: none ever holds more than one unit whole.
    """
    model.to_empty(device=device)
    blocks = blocks_of(model)
    with torch.random.fork_rng(devices=[]):
        for name, unit in [*((f"block {i}", block) for i, block in enumerate(blocks)), ("model", model)]:
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            fill(unit, model._init_weights, leave_out=() if unit is not model else blocks)
    model.tie_weights()


@torch.no_grad()
def fill(unit: nn.Module, init: Callable[[nn.Module], None], *, leave_out: Collection[nn.Module] = ()) -> None:
    """Run `init` on every module of a unit, children first, on whole tensors on the CPU; then keep the parts.

    Args:
        unit: its parameters and buffers are on their device, of any values.
        init: sets a module's own tensors.
        leave_out: modules inside that are units of their own.
    """
    skipped, splits = {id(module) for part in leave_out for module in part.modules()}, splits_of(unit)
    modules = {name: module for name, module in unit.named_modules() if id(module) not in skipped}
    kept: list[tuple[dict, str, Tensor, Split | None]] = []
    seen: dict[int, Tensor] = {}
    for prefix, module in modules.items():
        for owned in (module._parameters, module._buffers):
            for name, x in owned.items():
                if x is not None:
                    split = splits.get(f"{prefix}.{name}" if prefix else name)
                    kept.append((owned, name, x, split))
                    if id(x) not in seen:
                        made = torch.empty(shape_of(x, split), dtype=x.dtype)
                        seen[id(x)] = nn.Parameter(made) if owned is module._parameters else made
                    owned[name] = seen[id(x)]
    try:
        for module in reversed(modules.values()):  # `modules` has parents first
            init(module)
    finally:
        for owned, name, x, split in kept:
            local(x).copy_(part_of(owned[name], x, split))
            owned[name] = x


@torch.no_grad()
def clip_norm(params: list[Tensor], limit: float | None) -> Tensor:
    """Clip the gradients to a norm over all processes; None does not -> the norm before.

    Args:
        params: cut over processes in any ways, or whole; one without a gradient is passed over.
        limit: of the norm.
    """
    limit, cut = math.inf if limit is None else limit, any(isinstance(p, DTensor) for p in params)
    params = [p for p in params if p.grad is not None]
    if not cut:
        return torch.nn.utils.clip_grad_norm_(params, limit)
    grads, world = [local(p.grad) for p in params], dist.get_world_size()
    squares = torch.stack(torch._foreach_norm(grads)).double().square()
    splits = [split_of(p) for p in params]
    parts = [cuts_of(p) * (1 if split is None else split.over.size) for p, split in zip(params, splits, strict=True)]
    total = squares @ squares.new_tensor([n / world for n in parts])  # of each part world / n processes have a copy
    dist.all_reduce(total)
    norm = total.sqrt()
    if limit < math.inf:
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0).to(grads[0].dtype))
    return norm
