"""Tensor parallelism: of each part that is a sum over heads (`layers/heads.py`), a process has some of the heads.

Outside such parts, the processes of a `tensor` group have a stretch of the tokens each. A part's call gathers the
tokens of all, reads them with the heads that are here, and each process gets its stretch of the sum: as many bytes as
to add up the whole sum everywhere, and nothing is computed or kept twice. Parts that are no such sums go on with their
stretch, as where the sequence is split (`kernels/across.py`).

Source: Shoeybi et al. 2019, arXiv 1909.08053; with stretches between the parts, Korthikanti et al. 2022, arXiv
2205.05198.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqzoo.kernels.across import joined, ranks, summed, summed_stretch
from seqzoo.kernels.exchanges import Ranks as Over
from seqzoo.kernels.linear import linear
from seqzoo.layers.linear import Linear
from seqzoo.layers.registry import Spec, build
from seqzoo.layers.span import Span
from seqzoo.training.sharded import local
from seqzoo.training.split import Split, split_of


class Tensors:
    """The processes of a `tensor` group.

    Args:
        over: the group.
        line: all processes that have stretches of the same sequences, in their order.
        inside: entered around a part's call, where tokens are split over those of them that have the same heads.
    """

    def __init__(
        self, over: Over, line: "dist.ProcessGroup | None", inside: Callable[[], AbstractContextManager]
    ) -> None:
        self.over, self.line, self.inside = over, line, inside
        self.known: tuple[Span, Span] | None = None  # the last span, and that of all of the group's tokens

    def deal(self, model: nn.Module, *, leave_out: tuple[str, ...] = ()) -> None:
        """Every part that is a sum over heads, for one of those that are here.

        Args:
            model: on any device, the meta device too.
            leave_out: attributes that say a part is not to be dealt.

        Raises:
            ValueError: heads that cannot be dealt evenly; the message names the number to change.
        """
        dealt: list[str] = []
        for name, part in list(model.named_modules()):
            inside = any(name.startswith(f"{other}.") for other in dealt)
            wanted = not inside and hasattr(part, "heads") and not any(hasattr(part, x) for x in leave_out)
            if wanted and part.heads() is not None:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, self.some_heads(part))
                dealt.append(name)

    def some_heads(self, whole: nn.Module) -> nn.Module:
        """The part with the heads that are here. Raises ValueError: as `deal`."""
        family, spec, width = whole.built_from
        with torch.device("meta"):
            part = build(family, self._divided(spec, whole), width).train(whole.training)
        if hasattr(whole, "first_head"):
            part.first_head, part.all_heads = whole.all_heads // self.over.size * self.over.rank, whole.all_heads
        part.splits, sections = {}, whole.heads().sections
        for name, x in whole.named_parameters():
            owner, _, own = name.rpartition(".")
            shape = part.get_parameter(name).shape
            differ = [dim for dim in range(x.ndim) if x.shape[dim] != shape[dim]]
            mine = x.detach().clone()
            if differ:
                part.splits[name] = Split(differ[0], tuple(sections.get(name, [x.shape[differ[0]]])), self.over)
                mine = part.splits[name].take(x.detach())
            setattr(part.get_submodule(owner), own, nn.Parameter(mine, requires_grad=x.requires_grad))
        for name, x in whole.named_buffers():
            owner, _, own = name.rpartition(".")
            part.get_submodule(owner)._buffers[own] = x
        for name, module in part.named_modules():
            split = part.splits.get(f"{name}.weight")
            if isinstance(module, Linear) and split is not None and split.dim == 1 and module.bias is not None:
                module.forward = _Once(module, first=self.over.rank == 0)
        part.forward = _Call(part.forward, self)
        return part

    def _divided(self, spec: Spec, part: nn.Module) -> Spec:
        divided = {}
        for name in part.heads().arguments:
            value, n = spec.get(name, 0), self.over.size
            if value % n:
                raise ValueError(
                    f"{spec['kind']}.{name}: expected a multiple of parallel.tensor={n}, got {value}; change either"
                )
            divided[name] = value // n
        return spec | divided

    def span_of_all(self, span: Span) -> Span:
        """Of the tokens of all processes of the group."""
        if self.known is None or self.known[0].positions is not span.positions:
            if span.valid is not None:
                raise ValueError("parallel.tensor: expected rows without padding, got some with it")
            if self.over.sent is not None:  # of nobody who is there
                return span._replace(positions=span.positions.repeat(1, self.over.size))
            starts = torch.zeros_like(span.positions) if span.starts is None else span.starts.long()
            facts = joined(torch.stack([span.positions, starts], -1), self.over)
            starts = facts[..., 1].bool()
            self.known = span, span._replace(positions=facts[..., 0], starts=starts if bool(starts.any()) else None)
        return self.known[1]._replace(sinks=span.sinks)


class _Call:
    """A part's forward on a stretch of the tokens; where there are no stretches, on all that there are."""

    def __init__(self, forward, group: Tensors) -> None:
        self.forward, self.group = forward, group

    def __call__(self, x: Tensor, span: Span | None = None, *rest):
        group, split = self.group, ranks()
        if split is None or split.group is not group.line:
            y, more = self.forward(x, span, *rest)
            return summed(y, group.over), more
        x, span = joined(x, group.over), None if span is None else group.span_of_all(span)
        with group.inside():
            y, more = self.forward(x, span, *rest)
        return summed_stretch(y, group.over), more


class _Once:
    """The forward of a matrix over heads whose bias only the first process adds."""

    def __init__(self, module: Linear, *, first: bool) -> None:
        self.module, self.share = module, float(first)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.module.weight, self.module.bias * self.share)


@torch.no_grad()
def share_gradients(params: list[Tensor], group: "dist.ProcessGroup") -> None:
    """Of parameters that are not cut over the group, whose gradients hold the group's size times what was found here:
    the sum over the group, but for those whose heads are here alone."""
    grads = [local(p.grad) for p in params]
    shared = [x for x, p in zip(grads, params, strict=True) if split_of(p) is None]
    if shared:
        flat = torch.cat([x.flatten() for x in shared])
        dist.all_reduce(flat, group=group)
        for x, found in zip(shared, flat.split([x.numel() for x in shared]), strict=True):
            x.copy_(found.view_as(x))
    if grads:
        torch._foreach_div_(grads, dist.get_world_size(group))
