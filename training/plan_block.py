"""What a block keeps for its backward pass and what it exchanges: measured, by running it on tensors that hold nothing.

The very modules of the model run forward and backward, at the true length, on torch's fake tensors: they have shapes
and dtypes, and no memory. Ops take the backends that a GPU takes, and say what these keep (`dispatch.shapes_alone`);
exchanges are written down instead of done. Two runs, with one row and with two, give what there is anyway (weights in a
lower precision, memories) and what each row adds.

Exact: what autograd saves of a row that is one document, by those backends (on a CPU others run, which keep a few per
cent more or less). Of several documents, the marks of their beginnings come to it. An estimate: `peak`, which does not
see what a kernel allocates for itself, nor holes in an allocator.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.kernels.across import Sent, imagined
from seqzoo.kernels.dispatch import shapes_alone
from seqzoo.kernels.expert_mlp.exchange import imagined_owners
from seqzoo.kernels.gpu.launch import instead, usable
from seqzoo.layers.span import Span


class Bytes(NamedTuple):
    """Of any number of rows."""

    fixed: int
    per_row: int

    def of(self, rows: int) -> int:
        return self.fixed + rows * self.per_row


class Measured(NamedTuple):
    """Of one module, forward and backward; its own parameters and their gradients are left out."""

    given: Bytes  # what it is called with
    saved: Bytes  # what autograd keeps, each storage once
    peak: Bytes  # the most there is at a time, besides what it is called with
    held: Bytes  # what is there between forward and backward
    cached: int  # weights in a lower precision, which autocast keeps until all of the model's forward pass is done
    forward: dict[tuple[str, str], Bytes]  # over whom (sequence, experts) and how -> what is exchanged
    backward: dict[tuple[str, str], Bytes]
    counts: int  # numbers that it counts over its tokens


class Where(NamedTuple):
    """How many tokens a module sees, and among whom.

    Attributes:
        length: tokens of a row, on one process.
        sequence: processes over which rows are cut.
        owners: processes that have some of the experts each; 1 has all.
        lower: autocast to bfloat16.
        sinks: tokens beside the sequence.
    """

    length: int
    sequence: int
    owners: int
    lower: bool
    sinks: int


Run = Callable[[nn.Module, Tensor, Span], tuple[list[Tensor], int]]  # -> outputs, and how many numbers are counts


def block_run(block: nn.Module, x: Tensor, span: Span) -> tuple[list[Tensor], int]:
    """A block of the stack, and the sinks' own stream through it, which no rank has a part of."""
    y, _, stats = block(x, span)
    outputs = [y, *stats.values()]
    if span.sinks is not None:
        with imagined(1):
            outputs.append(block(span.sinks[None], Span.of_sinks(span.sinks[None]))[0])
    return outputs, sum(y.numel() for y in stats.values())


def measure(module: nn.Module, run: Run, width: int, where: Where) -> Measured:
    """Of a module on the meta device, whose input is [rows, length, width].

    Raises:
        ValueError: triton is not installed, whose kernels' shapes are asked for, or a part that refuses the shapes.
    """
    if not usable():
        raise ValueError("plan: expected the package triton, whose kernels' memory is counted; it is not installed")
    try:
        one, two = (_measure(module, run, width, where, rows) for rows in (1, 2))
    except RuntimeError as error:  # what torch cannot say the shapes of
        raise ValueError(f"plan: expected a part that runs on shapes alone, got: {error}") from error
    line = lambda a, b: Bytes(2 * a - b, b - a)
    lines = lambda a, b: {key: line(a.get(key, 0), b.get(key, 0)) for key in b}
    sizes = (line(getattr(one, name), getattr(two, name)) for name in ("given", "saved", "peak", "held"))
    return Measured(*sizes, one.cached, lines(one.forward, two.forward), lines(one.backward, two.backward), one.counts)


class _Once(NamedTuple):
    given: int
    saved: int
    peak: int
    held: int
    cached: int
    forward: Counter
    backward: Counter
    counts: int


def _measure(module: nn.Module, run: Run, width: int, where: Where, rows: int) -> _Once:
    precision = lambda: torch.autocast("cpu", torch.bfloat16) if where.lower else nullcontext()
    module = copy.deepcopy(module)
    with FakeTensorMode(), shapes_alone(), instead(lambda _: None):
        fake_tensors(module, where.owners)
        own = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
        x = torch.empty(rows, where.length, width, requires_grad=True)
        positions, sinks = torch.empty(rows, where.length, dtype=torch.int64), None
        if where.sinks:
            sinks = torch.empty(where.sinks, width, requires_grad=True)
        span = Span(positions, sinks=sinks)
        with imagined(where.sequence) as split, imagined_owners(where.owners) as owners:
            cached = 0
            if where.lower:
                with Live() as live, precision(), saved_tensors_hooks(lambda t: None, lambda t: t):
                    run(module, x, span)
                    cached = live.now
            storages: dict[int, torch.UntypedStorage] = {}

            def pack(t: Tensor) -> Tensor:
                storage = t.untyped_storage()
                if storage._cdata not in own:
                    storages[storage._cdata] = storage
                return t.detach()  # an output that its own node kept would never go

            split.clear(), owners.clear()
            with Live() as live:
                with precision(), saved_tensors_hooks(pack, lambda t: t):
                    outputs, counts = run(module, x, span)
                saved = sum(storage.nbytes() for storage in storages.values())
                storages.clear()
                held, forward = live.now, _sums(split, owners)
                split.clear(), owners.clear()
                outputs = [y for y in outputs if y.requires_grad]
                grads = [torch.empty_like(y) for y in outputs]
                torch.autograd.backward(outputs, grads)
            backward = _sums(split, owners)
    return _Once(x.nbytes, saved, live.peak, held, cached, forward, backward, counts)


def _sums(split: list[Sent], owners: list[Sent]) -> Counter:
    found: Counter = Counter()
    for group, exchanges in (("sequence", split), ("experts", owners)):
        for what, size in exchanges:
            found[group, what] += size
    return found


def fake_tensors(module: nn.Module, owners: int = 1) -> None:
    """Its tensors become such of the mode that is on; of stacks of experts, an owner's part. What is tied stays so."""
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with what it stands for, or its id would be another's
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if id(p) in made:
                setattr(part, name, made[id(p)][1])
                continue
            shape = list(p.shape)
            if owners > 1 and name in getattr(part, "BY_EXPERT", ()):
                shape[0] //= owners
            fake = nn.Parameter(torch.empty(shape, dtype=p.dtype), requires_grad=p.requires_grad)
            if fake.requires_grad:
                fake.register_post_accumulate_grad_hook(_drop)
            made[id(p)] = p, fake
            setattr(part, name, fake)
        for name, x in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


def _drop(p: Tensor) -> None:
    p.grad = None


class Live(TorchDispatchMode):
    """How many bytes of storages have been made inside, and are there still."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
