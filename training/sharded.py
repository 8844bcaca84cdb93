"""Tensors of which a process has a part: their whole, and the part of a whole."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def place_of(x: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this process's part in the whole."""
    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process has of it, where `like` is cut."""
    if not isinstance(like, DTensor):
        return whole
    shape, offset = place_of(like)
    return whole[tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))]


def local(x: Tensor) -> Tensor:
    """This process's part, which shares memory with it."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(part: Tensor, like: Tensor) -> Tensor:
    """From the parts of all processes, cut as `like` is."""
    if not isinstance(like, DTensor):
        return part
    made = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made.full_tensor()


@torch.no_grad()
def fill(unit: nn.Module, init: Callable[[nn.Module], None], *, leave_out: Collection[nn.Module] = ()) -> None:
    """Run `init` on every module of a unit, children first, on whole tensors on the CPU; then keep the parts.

    Args:
        unit: its parameters and buffers are on their device, of any values.
        init: sets a module's own tensors.
        leave_out: modules inside that are units of their own.
    """
    skipped = {id(module) for part in leave_out for module in part.modules()}
    modules = [module for module in unit.modules() if id(module) not in skipped]
    kept: list[tuple[dict, str, Tensor]] = []
    seen: dict[int, Tensor] = {}
    for module in modules:
        for owned in (module._parameters, module._buffers):
            for name, x in owned.items():
                if x is not None:
                    kept.append((owned, name, x))
                    if id(x) not in seen:
                        made = torch.empty(x.shape, dtype=x.dtype)
                        seen[id(x)] = nn.Parameter(made) if owned is module._parameters else made
                    owned[name] = seen[id(x)]
    try:
        for module in reversed(modules):  # `modules` has parents first
            init(module)
    finally:
        for owned, name, x in kept:
            local(x).copy_(part_of(owned[name], x))
            owned[name] = x
