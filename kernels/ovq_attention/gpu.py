"""OVQ attention on a GPU: the chunked form, whose chunks are all read at once, by Triton, when the memories are known.

What is merged into which slot is found in torch, in float32, as on any device. Of training is kept: queries, tokens and
each chunk's memory, in the dtype that they are multiplied in; no scores. Sums are always in one order.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu, products, takes, tuned
from seqzoo.kernels.ovq_attention.chunked import ovq_attention_chunked
from seqzoo.kernels.ovq_attention.layout import Layout, sent
from seqzoo.kernels.ovq_attention.read import InTurn
from seqzoo.kernels.ovq_attention.rule import OVQRule, OVQState

WIDE = 256  # heads at most
MANY = 2**27  # numbers in memories that, without gradients, are not kept waiting
LONG = 4096  # [tokens] chunks whose first slots are chosen in one program


def runs(q: Tensor, v: Tensor) -> bool:
    """Whether this backend is to be chosen for q and v."""
    return takes(q) and takes(v) and max(q.shape[-1], v.shape[-1]) <= WIDE


def ovq_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    rule: OVQRule,
    state: OVQState | None = None,
    starts: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, OVQState | None]:
    """Same as `ovq_attention_reference`.

    Raises:
        ValueError: no GPU, a dtype that it has no kernels for, or heads wider than 256.
    """
    needs_gpu(q)
    needs_gpu(v)
    if max(q.shape[-1], v.shape[-1]) > WIDE:
        widths = f"{q.shape[-1]} and {v.shape[-1]}"
        raise ValueError(f"ovq_attention: backend triton: expected heads at most {WIDE} wide, got {widths}")
    return ovq_attention_chunked(q, k, v, scale, rule, state, starts, valid, read=Together)


class Together:
    """In place of `InTurn`: gathers memories, and reads when all are there; without gradients, when many are."""

    def __init__(self, q: Tensor, tokens: Tensor, scale: Tensor, plan: Layout, rule: OVQRule) -> None:
        self.plan, self.rule, self.tokens = plan, rule, tokens
        self.q, self.scale = plan.queries.rows(q), plan.queries.rows(scale[:, None].expand(*q.shape[:3], 1))[:, 0]
        self.learns = torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.scale, self.tokens))
        self.outputs: list[Tensor] = []
        self.memories: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.read = 0, 0, 0  # steps, rows of q, rows of tokens

    def add(self, memory: Tensor, counts: Tensor) -> None:
        self.learns |= torch.is_grad_enabled() and memory.requires_grad  # where a state came in that does
        self.memories.append(memory)
        self.counts.append(counts)
        if not self.learns and sum(x.numel() for x in self.memories) > MANY:
            self._read_so_far()

    def rows(self) -> Tensor:
        if self.memories:
            self._read_so_far()
        return self.outputs[0] if len(self.outputs) == 1 else torch.cat(self.outputs)

    def _read_so_far(self) -> None:
        """The steps that are not read yet. No bit depends on how many they are."""
        here, (step, q, token) = len(self.memories), self.read
        plan = Layout(
            self.plan.documents,
            self.plan.steps[step : step + here],
            *(x._replace(sizes=x.sizes[step : step + here]) for x in (self.plan.queries, self.plan.tokens)),
        )
        sizes = [x.shape[2] for x in self.memories]
        table = sent(jobs(plan, sizes, self.rule), self.q.device)
        (_, G, widest), (_, H, _) = plan.tokens.sizes[0], plan.queries.sizes[0]  # no later chunk has more tokens
        longest = max(L for *_, L in self.plan.queries.sizes)
        flags = [G, H // G, longest, max(*sizes, widest), int(self.rule.log_count), int(self.rule.norm_correction)]
        self.read = (
            step + here,
            *(first + sum(a * b * c for a, b, c in x.sizes) for first, x in ((q, plan.queries), (token, plan.tokens))),
        )
        queries, tokens = slice(q, self.read[1]), slice(token, self.read[2])
        rows = self.q[queries], self.scale[queries], self.tokens[tokens]
        self.outputs.append(_read(*rows, self.memories, self.counts, table, flags, self.learns)[0])
        self.memories, self.counts = [], []

    @staticmethod
    def farthest(likeness: Tensor, new: int) -> Tensor:
        """As `InTurn.farthest`."""
        if likeness.shape[-1] > LONG:
            return InTurn.farthest(likeness, new)
        return _farthest(likeness, new)


@torch.library.custom_op("seqzoo::ovq_assign_farthest", mutates_args=())
def _farthest(likeness: Tensor, new: int) -> Tensor:
    return farthest(likeness, new)


@_farthest.register_fake
def _(likeness, new):
    return likeness.new_empty(likeness.shape[:3], dtype=torch.int64)


def farthest(likeness: Tensor, new: int) -> Tensor:
    """The slot [A, G, C] of each token."""
    from triton import next_power_of_2

    from seqzoo.kernels.ovq_attention.gpu_assign import assign_farthest

    C = likeness.shape[-1]
    config = tuned("ovq_attention", "farthest", likeness.device, likeness.dtype, C=C)
    slot = likeness.new_empty(likeness.shape[:3], dtype=torch.int64)
    tensors = likeness.contiguous(), slot
    launch(assign_farthest, (likeness.shape[:2].numel(),), *tensors, C, new, BC=next_power_of_2(C), **config)
    return slot


def jobs(plan: Layout, sizes: Sequence[int], rule: OVQRule) -> list[tuple[int, ...]]:
    """Of each document at each step what gpu_forward.py says; sizes: of each step, slots that are there."""
    table, q, slot, token = [], 0, 0, 0
    for step, (_, H, L), (_, G, C), M in zip(plan.steps, plan.queries.sizes, plan.tokens.sizes, sizes, strict=True):
        for offset, merged in zip(step.offset, step.merged, strict=True):
            table.append((q, L, slot, rule.used(merged), M, token, C, offset))
            q, slot, token = q + H * L, slot + G * M, token + G * C
    return table


def _shape(q: Tensor, tokens: Tensor, flags: Sequence[int]) -> dict:
    """The constants of all three kernels."""
    from triton import next_power_of_2

    K, V = q.shape[1], tokens.shape[1] - q.shape[1]
    G, heads, _, _, log_count, norms = flags
    blocks = dict(BK=max(16, next_power_of_2(K)), BV=max(16, next_power_of_2(V)))
    return dict(G=G, HEADS=heads, K=K, V=V, LOG_COUNT=bool(log_count), NORMS=bool(norms), **blocks, **products(q))


def _config(kernel: str, q: Tensor, tokens: Tensor, flags: Sequence[int]) -> dict[str, int]:
    widths = dict(K=q.shape[1], V=tokens.shape[1] - q.shape[1], T=flags[2], norms=flags[5])
    return tuned("ovq_attention", kernel, q.device, q.dtype, **widths)


# Below, flags are: G, query heads of each, the longest L, the most keys of one kind, log_count, norm_correction.


def read(
    q: Tensor, scale: Tensor, memory: Tensor, counts: Tensor, tokens: Tensor, table: Tensor, flags: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """q [n, K], scale [n] fp32, memory [m, K + V], counts [m] fp32, tokens [l, K + V], table [jobs, 8] ->
    o [n, V], logsum [n] fp32."""
    from seqzoo.kernels.ovq_attention.gpu_forward import joint_read

    G, heads, longest = flags[:3]
    o, logsum = q.new_empty(len(q), tokens.shape[1] - q.shape[1]), torch.empty_like(scale)
    config = _config("read", q, tokens, flags)
    strips = -(-heads * longest // config["BM"])
    tensors = (q, scale, memory, counts, tokens, table, o, logsum)
    launch(joint_read, (len(table) * G * strips,), *tensors, strips, **_shape(q, tokens, flags), **config)
    return o, logsum


def read_backward(
    d_o: Tensor, q: Tensor, scale: Tensor, memory: Tensor, counts: Tensor, tokens: Tensor, table: Tensor, o: Tensor,
    logsum: Tensor, flags: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d_q, d_scale, d_memory and d_tokens, the last three fp32."""
    from seqzoo.kernels.ovq_attention.gpu_backward import joint_read_keys, joint_read_queries

    (G, heads, longest, widest, *_), shape = flags, _shape(q, tokens, flags)
    d_q, d_scale, inner = torch.empty_like(q), torch.empty_like(scale), torch.empty_like(scale)
    d_memory, d_tokens = (torch.empty_like(x, dtype=torch.float32) for x in (memory, tokens))
    config = _config("queries", q, tokens, flags)
    strips = -(-heads * longest // config["BM"])
    read = (q, scale, memory, counts, tokens, table)
    outputs = o, logsum, d_o, d_q, d_scale, inner
    launch(joint_read_queries, (len(table) * G * strips,), *read, *outputs, strips, **shape, **config)
    config = _config("keys", q, tokens, flags)
    strips = -(-widest // config["BN"])
    for d_keys, slots in ((d_memory, True), (d_tokens, False)):
        if len(d_keys):
            arguments = (*read, logsum, inner, d_o, d_keys, strips)
            launch(joint_read_keys, (len(table) * G * strips,), *arguments, SLOTS=slots, **shape, **config)
    return d_q, d_scale, d_memory, d_tokens


@torch.library.custom_op("seqzoo::ovq_joint_read", mutates_args=())
def _read(
    q: Tensor, scale: Tensor, tokens: Tensor, memories: Sequence[Tensor], counts: Sequence[Tensor], table: Tensor,
    flags: Sequence[int], keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o; and where `keep` logsum, memory, counts and tokens as they are multiplied, for backward."""
    low = tokens.to(q.dtype, copy=True)
    memory = q.new_empty(sum(x.shape[:3].numel() for x in memories), tokens.shape[1])
    for part, x in zip(memory.split([x.shape[:3].numel() for x in memories]), memories, strict=True):
        part.view(x.shape).copy_(x)
    count = torch.cat([x.flatten() for x in counts]).float()
    o, logsum = read(q, scale, memory, count, low, table, flags)
    return (
        (o, logsum, memory, count, low)
        if keep
        else (o, *(o.new_empty(0, dtype=x.dtype) for x in (logsum, memory, count, low)))
    )


@_read.register_fake
def _(q, scale, tokens, memories, counts, table, flags, keep):
    m, W = sum(x.shape[:3].numel() for x in memories), tokens.shape[1]
    o = q.new_empty(q.shape[0], W - q.shape[1])
    if not keep:
        return o, scale.new_empty(0), q.new_empty(0), scale.new_empty(0), q.new_empty(0)
    return o, scale.new_empty(scale.shape), q.new_empty(m, W), scale.new_empty(m), q.new_empty(tokens.shape)


@torch.library.custom_op("seqzoo::ovq_joint_read_backward", mutates_args=())
def _gradients(
    d_o: Tensor, q: Tensor, scale: Tensor, memory: Tensor, counts: Tensor, tokens: Tensor, table: Tensor, o: Tensor,
    logsum: Tensor, flags: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return read_backward(d_o.contiguous(), q, scale, memory, counts, tokens, table, o, logsum, flags)


@_gradients.register_fake
def _(d_o, q, scale, memory, counts, tokens, table, o, logsum, flags):
    return q.new_empty(q.shape), scale.new_empty(scale.shape), *(scale.new_empty(x.shape) for x in (memory, tokens))


def _remember(ctx, inputs, output):
    q, scale, _, memories, _, table, ctx.flags, _ = inputs
    o, logsum, memory, counts, tokens = output
    ctx.shapes = [x.shape for x in memories]
    ctx.save_for_backward(q, scale, memory, counts, tokens, table, o, logsum)
    ctx.mark_non_differentiable(logsum, memory, counts, tokens)


def _backward(ctx, d_o, *_):
    d_q, d_scale, d_memory, d_tokens = _gradients(d_o, *ctx.saved_tensors, ctx.flags)
    parts = d_memory.split([x[:3].numel() for x in ctx.shapes])
    d_memories = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
    return d_q, d_scale, d_tokens, d_memories, [None] * len(ctx.shapes), None, None, None


_read.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start the kernels in their shape classes; see `kernels/gpu/examples.py`."""
    half, full = torch.bfloat16, torch.float32
    for C in (128, 1024, 4096):
        likeness = make((2, 2, C, C), full)
        yield f"farthest of {C}", lambda x=likeness: farthest(x, 100)
    for K, V, L, dtype, norms in (
        *((d, d, 128, dtype, 0) for d in (64, 128, 256) for dtype in (half, full)),
        *((d, d, 128, half, 1) for d in (128, 256)),
        *((128, 128, 1, dtype, 0) for dtype in (half, full)),
    ):
        G, heads, C, M, n = 2, 4, 128, 1024, 1 if L == 1 else 32
        q, scale = make((n * G * heads * L, K), dtype), make((n * G * heads * L,), full)
        memory, counts = make((n * G * M, K + V), dtype), make((n * G * M,), full)
        tokens, table = make((n * G * C, K + V), dtype), make((n, 8), torch.int64)
        flags = [G, heads, L, M, 1, norms]
        name = f"{L} tokens, {K} and {V} wide, {dtype}{', norms' if norms else ''}"
        inputs = q, scale, memory, counts, tokens, table
        yield f"read {name}", lambda x=(*inputs, flags): read(*x)
        if L > 1:
            o = make((len(q), V), dtype)
            yield f"backward {name}", lambda x=(o, *inputs, o, scale, flags): read_backward(*x)
