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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.kernels.across import imagined
from seqzoo.kernels.dispatch import shapes_alone
from seqzoo.kernels.exchanges import Ranks, Sent
from seqzoo.kernels.expert_mlp.exchange import imagined_owners
from seqzoo.kernels.gpu.launch import instead, usable
from seqzoo.layers.span import Span
from seqzoo.training.tensor import Tensors


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
    forward: dict[tuple[str, str], Bytes]  # over whom (line, sequence, tensor, experts), how -> what is exchanged
    again: dict[tuple[str, str], Bytes]  # of forward, up to the last tensor that is kept: computed again, it ends there
    backward: dict[tuple[str, str], Bytes]
    counts: int  # numbers that it counts over its tokens


class Where(NamedTuple):
    """How many tokens a module sees, and among whom.

    Attributes:
        length: tokens of a row, on one process.
        sequence, tensor: processes over which rows are cut, and heads dealt.
        owners: processes that have some of the experts each; 1 has all.
        lower: autocast to bfloat16.
        sinks: tokens beside the sequence.
        is_last: of the stack, after which nobody asks for the sinks.
    """

    length: int
    sequence: int
    tensor: int
    owners: int
    lower: bool
    sinks: int
    is_last: bool = False


Calls = Iterator[tuple[list[Tensor], int]]  # of each call outputs, and how many numbers are counts


def block_calls(block: nn.Module, x: Tensor, span: Span, *, is_last: bool) -> Calls:
    """A block of the stack, and the sinks' own stream through it, which no rank has a part of."""
    y, _, stats = block(x, span)
    yield [y, *stats.values()], sum(y.numel() for y in stats.values())
    if span.sinks is not None and not is_last:
        with imagined(1):
            y = block(span.sinks[None], Span.of_sinks(span.sinks[None]))[0]
        yield [y], 0


def measure(module: nn.Module, calls: Callable[..., Calls], width: int, where: Where) -> Measured:
    """Of a module on the meta device, whose input is [rows, length, width].

    Raises:
        ValueError: triton is not installed, whose kernels' shapes are asked for, or a part that refuses the shapes.
    """
    if not usable():
        raise ValueError("plan: expected the package triton, whose kernels' memory is counted; it is not installed")
    try:
        one, two = (_measure(module, calls, width, where, rows) for rows in (1, 2))
    except RuntimeError as error:  # what torch cannot say the shapes of
        raise ValueError(f"plan: expected a part that runs on shapes alone, got: {error}") from error
    line = lambda a, b: Bytes(2 * a - b, b - a)
    lines = lambda a, b: {key: line(a.get(key, 0), b.get(key, 0)) for key in b}
    sizes = (line(getattr(one, name), getattr(two, name)) for name in ("given", "saved", "peak", "held"))
    sent = (lines(getattr(one, name), getattr(two, name)) for name in ("forward", "again", "backward"))
    return Measured(*sizes, one.cached, *sent, one.counts)


class _Once(NamedTuple):
    given: int
    saved: int
    peak: int
    held: int
    cached: int
    forward: Counter
    again: Counter
    backward: Counter
    counts: int


def _measure(module: nn.Module, calls: Callable[..., Calls], width: int, where: Where, rows: int) -> _Once:
    precision = lambda: torch.autocast("cpu", torch.bfloat16) if where.lower else nullcontext()
    module, inside, tensor = copy.deepcopy(module), [], []
    some_heads(module, where, inside, tensor)
    with FakeTensorMode(), shapes_alone(), instead(lambda _: None):
        fake_tensors(module, where.owners)
        own = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
        x = torch.empty(rows, where.length, width, requires_grad=True)
        positions, sinks = torch.empty(rows, where.length, dtype=torch.int64), None
        if where.sinks:
            sinks = torch.empty(where.sinks, width, requires_grad=True)
        span = Span(positions, sinks=sinks)
        with imagined(where.sequence * where.tensor) as line, imagined_owners(where.owners) as owners:
            sent, cached = dict(line=line, sequence=inside, tensor=tensor, experts=owners), 0
            if where.lower:
                with Live() as live, precision(), saved_tensors_hooks(lambda t: None, lambda t: t):
                    list(calls(module, x, span))
                    cached = live.now
            storages: dict[int, torch.UntypedStorage] = {}

            def pack(t: Tensor) -> Tensor:
                storage = t.untyped_storage()
                nonlocal last
                last = _sums(sent)
                if storage._cdata not in own:
                    storages[storage._cdata] = storage
                return t.detach()  # an output that its own node kept would never go

            last, again, before = Counter(), Counter(), Counter()
            outputs, counts = [], 0
            _clear(sent)
            with Live() as live:
                with precision(), saved_tensors_hooks(pack, lambda t: t):
                    for made, counted in calls(module, x, span):
                        outputs, counts, again = outputs + made, counts + counted, again + (last - before)
                        last = before = _sums(sent)
                saved = sum(storage.nbytes() for storage in storages.values())
                storages.clear()
                held, forward = live.now, _sums(sent)
                _clear(sent)
                outputs = [y for y in outputs if y.requires_grad]
                grads = [torch.empty_like(y) for y in outputs]
                torch.autograd.backward(outputs, grads)
            backward = _sums(sent)
    return _Once(x.nbytes, saved, live.peak, held, cached, forward, again, backward, counts)


def _sums(sent: dict[str, list[Sent]]) -> Counter:
    found: Counter = Counter()
    for group, exchanges in sent.items():
        for what, size in exchanges:
            found[group, what] += size
    return found


def _clear(sent: dict[str, list[Sent]]) -> None:
    for exchanges in sent.values():
        exchanges.clear()


def some_heads(module: nn.Module, where: Where, inside: list[Sent], tensor: list[Sent]) -> None:
    """The parts of a module on the meta device, with the heads of one of those that are not there.

    Raises:
        ValueError: heads that cannot be dealt.
    """
    if where.tensor > 1:
        over = Ranks(None, where.tensor - 1, where.tensor, tensor)
        group = Tensors(over, None, lambda: imagined(where.sequence, inside))
        group.deal(module, leave_out=("BY_EXPERT",) if where.owners > 1 else ())


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
