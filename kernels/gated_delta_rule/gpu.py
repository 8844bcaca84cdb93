"""The gated delta rule in Triton, on a GPU (or interpreted): forward and backward by hand.

What moves, in bytes per token and value head, where K = V = 128 in bfloat16 and key heads are as many:

    forward   prepare     q k in, A P out, every chunk for itself                                512 +  256
              forward     q k v A P in, o out; the memory stays in registers                    1024 +  256
    backward  prepare     q k in, P out; of the forward A is kept, 128 bytes, nothing else       512 +  128
              both ways   k v A in, the memory before each chunk and Z out, with time            640 +  768
                          q k d_o A P in, its gradient after each and E out, against time       1024 +  768
              gradients   all these in, d_q d_k d_v out, every chunk for itself                 2560 +  768

The memory before each chunk is as large as q and k together (2 K V / C bytes a token), so backward writes it and its
gradient once each, and forward never. With grouped value heads q and k are read once for a group by prepare, and d_q
and d_k are made by value head and summed by a last small kernel. What is read again, by the other slice of V and by the
phases of gradients, comes from the cache. The serial kernels are bound by the time of a chunk, about three products
that wait for each other; what they can be given early (A, P, e, f) others compute. They run HV * V / BV programs a
sequence, backward twice that. Where that fills less than the chip they also split the sequence: each part first
runs from an empty memory and from the identity (`_ends`), `_chain` puts the parts' true beginnings together, and all
parts run at once. This takes 2.2 times the products, so it is done only where it gains, by T and the number of heads
and never by the size of the batch: a sequence has the same bits alone and in a batch. A document that starts where a
chunk does has the same bits packed and alone, if neither is split.

bfloat16 is multiplied as such, with sums, decays, the memory, its chaining and the inverse's doubling in fp32 (tf32
products); the memory, A, P, Z and E are rounded to bfloat16 as operands. float32 and float16 are multiplied as tf32.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from seqzoo.kernels.gated_delta_rule.gpu_call import Call, call_of, rows_of
from seqzoo.kernels.gpu import needs_gpu, products, takes
from seqzoo.kernels.gpu.operands import block

WIDEST = 256  # K and V


def able(q: Tensor, v: Tensor) -> bool:
    """Whether it is to be chosen for these, where nothing is forced."""
    return takes(v) and max(q.shape[3], v.shape[3]) <= WIDEST


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `gated_delta_rule_reference`.

    Raises:
        ValueError: float64, tensors that are not on a GPU, or K or V above 256.
    """
    needs_gpu(v)
    if max(q.shape[3], v.shape[3]) > WIDEST:
        raise ValueError(f"backend triton: expected K and V of at most {WIDEST}, got {q.shape[3]} and {v.shape[3]}")
    dtype = v.dtype
    kind = dtype if q.dtype == k.dtype == dtype else torch.float32
    inputs = [x.to(kind) for x in (q, k, v)]
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, state))
    o, last, *_ = _op(*inputs, g.float(), beta.float(), None if state is None else state.float(), starts, learns)
    return o.to(dtype), last


def _prepare(
    call: Call, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, starts: Tensor | None, A: Tensor | None
) -> tuple[Tensor, ...]:
    """P, e, f and beta by memory and token; A, where it is given, is filled."""
    from seqzoo.kernels.gated_delta_rule import gpu_prepare

    P, gates = call.per_token(call.C), [call.per_token(small=False) for _ in range(3)]
    call.start(
        gpu_prepare._prepare,
        call.B * call.H * call.chunks,
        *(q, k, g, beta, starts, A, P, *gates, call.T, call.chunks),
        INVERSE=A is not None,
        WIDE=products(g)["PRECISION"],
        **call.config("prepare"),
    )
    return P, *gates


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last memory, and for backward A; where the sequence is split also what `_ends` and `_chain` made of it."""
    from seqzoo.kernels.gated_delta_rule import gpu_forward

    q, k, v, g, beta = rows_of(q), rows_of(k), rows_of(v), g.contiguous(), beta.contiguous()
    state, starts = (None if x is None else x.contiguous() for x in (state, starts))
    call = call_of(q, k, v)
    memories, n = (call.B, call.HV), call.B * call.HV
    sizes = call.T, call.chunks, call.length, call.parts
    A = call.per_token(call.C)
    P, *gates = _prepare(call, q, k, g, beta, starts, A)
    config = call.config("forward")
    ends, firsts, strides = call.empty(0), call.empty(0), dict(S_K=call.V, S_V=1)
    if call.parts > 1:
        chain = call.config("chain")
        ends = call.empty(*memories, call.parts - 1, call.V + call.K, call.K, small=False)
        firsts = call.empty(*memories, call.parts, call.V, call.K, small=False)
        slices = call.slices(config) + call.slices(config, call.K)
        call.start(gpu_forward._ends, n * (call.parts - 1) * slices, k, v, A, *gates, state, ends, *sizes, **config)
        call.start(
            gpu_forward._chain,
            n * call.slices(chain),
            *(ends, state, firsts, call.parts),
            **chain | dict(PRECISION=products(g)["PRECISION"]),
        )
        state, strides = firsts, dict(S_K=1, S_V=call.K)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    last = call.empty(*memories, call.K, call.V, small=False)
    call.start(
        gpu_forward._forward,
        n * call.parts * call.slices(config),
        *(q, k, v, A, P, *gates, state, o, last, *sizes),
        **strides | config,
    )
    return o, last, A, ends, firsts


def backward(
    d_o: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    A: Tensor,
    ends: Tensor,
    firsts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the first memory, from what `forward` was given and kept."""
    from seqzoo.kernels.gated_delta_rule import gpu_gradients, gpu_reverse

    q, k, v, g, beta, d_o, d_last = (
        rows_of(q),
        rows_of(k),
        rows_of(v),
        *(x.contiguous() for x in (g, beta, d_o, d_last)),
    )
    state, starts = (None if x is None else x.contiguous() for x in (state, starts))
    call = call_of(q, k, v)
    memories, n = (call.B, call.HV), call.B * call.HV
    sizes = call.T, call.chunks, call.length, call.parts
    P, *gates = _prepare(call, q, k, g, beta, starts, None)
    config = call.config("both_ways")
    first, after, strides = state, d_last, dict(S_K=call.V, S_V=1)
    if call.parts > 1:
        chain = call.config("chain")
        d_ends = call.empty(*memories, call.parts - 1, call.V, call.K, small=False)
        first, after, strides = firsts, torch.empty_like(firsts), dict(S_K=1, S_V=call.K)
        call.start(
            gpu_reverse._reverse_ends,
            n * (call.parts - 1) * call.slices(config),
            *(q, k, d_o, A, P, *gates, d_last, d_ends, *sizes),
            **config,
        )
        call.start(
            gpu_reverse._reverse_chain,
            n * call.slices(chain),
            *(ends, d_ends, d_last, after, call.parts),
            **chain | dict(PRECISION=products(g)["PRECISION"]),
        )
    states, d_states = (call.empty(*memories, call.chunks, call.V, call.K) for _ in range(2))
    Z, E = (call.per_token(call.V) for _ in range(2))
    d_state = call.empty(*memories, call.K, call.V, small=False)
    call.start(
        gpu_reverse._both_ways,
        2 * n * call.parts * call.slices(config),
        *(q, k, v, d_o, A, P, *gates, first, after, states, Z, d_states, E, d_state, *sizes),
        **strides | config,
    )
    d_q, d_k, d_v, d_g, d_beta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta))
    grouped = call.HV > call.H
    config = call.config("gradients")
    config["BK"] = min(config["BK"], block(call.K))
    by_head = [x.new_empty(*v.shape[:3], call.K) if grouped else x for x in (d_q, d_k)]
    call.start(
        gpu_gradients._gradients,
        n * call.chunks,
        *(q, k, v, g, beta, starts, d_o, states, Z, d_states, E, *by_head, d_v, d_g, d_beta, call.T, call.chunks),
        **config,
    )
    if grouped:
        blocks = -(-d_q.numel() // 1024)
        call.start(gpu_gradients._sum_groups, blocks, *by_head, d_q, d_k, d_q.numel(), BLOCK=1024, num_warps=4)
    return d_q, d_k, d_v, d_g, d_beta, d_state


@torch.library.custom_op("seqzoo::gated_delta_rule_triton", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, last, *kept = forward(q, k, v, g, beta, state, starts)
    return o, last, *(kept if keep else (last.new_empty(0) for _ in kept))


@_op.register_fake
def _(q, k, v, g, beta, state, starts, keep):
    call = call_of(q, k, v)
    memories = call.B, call.HV
    o, last = torch.empty(v.shape, dtype=v.dtype, device=v.device), call.empty(*memories, call.K, call.V, small=False)
    if not keep:
        return o, last, *(last.new_empty(0) for _ in range(3))
    if call.parts == 1:
        return o, last, call.per_token(call.C), call.empty(0), call.empty(0)
    ends = call.empty(*memories, call.parts - 1, call.V + call.K, call.K, small=False)
    firsts = call.empty(*memories, call.parts, call.V, call.K, small=False)
    return o, last, call.per_token(call.C), ends, firsts


@torch.library.custom_op("seqzoo::gated_delta_rule_triton_backward", mutates_args=())
def _op_backward(
    d_o: Tensor,
    d_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    A: Tensor,
    ends: Tensor,
    firsts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(d_o, d_last, q, k, v, g, beta, state, starts, A, ends, firsts)


@_op_backward.register_fake
def _(d_o, d_last, q, k, v, g, beta, state, starts, A, ends, firsts):
    return (*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta, d_last)),)


def _remember(ctx, inputs, output):
    *inputs, _ = inputs
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, d_o, d_last, *_):
    saved = ctx.saved_tensors  # once: under checkpointing what is saved can be had once
    *grads, d_state = _op_backward(d_o, d_last, *saved)
    return *grads, None if saved[5] is None else d_state, None, None


_op.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable[[Sequence[int], torch.dtype], Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start every kernel in every shape class."""

    def call(T: int, H: int, HV: int, K: int, V: int, dtype: torch.dtype, state: bool, starts: bool, learns: bool):
        q, k, v = make((1, T, H, K), dtype), make((1, T, H, K), dtype), make((1, T, HV, V), dtype)
        g, beta = (make((1, T, HV), torch.float32) for _ in range(2))
        first = make((1, HV, K, V), torch.float32) if state else None
        marks = make((1, T), torch.bool) if starts else None

        def run() -> object:
            o, last, *kept = forward(q, k, v, g, beta, first, marks)
            return backward(o, last, q, k, v, g, beta, first, marks, *kept) if learns else (o, last)

        return run

    for width in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{width} wide, {str(dtype).removeprefix('torch.')}"
            yield name, call(4096, 16, 32, width, width, dtype, False, False, True)
    yield "split, packed, from a state", call(32768, 2, 8, 128, 128, torch.bfloat16, True, True, True)
