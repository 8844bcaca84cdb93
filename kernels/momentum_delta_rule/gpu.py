"""The momentum delta rule on a GPU, in Triton: `gpu_forward.py` and `gpu_backward.py`.

Forward is two launches: all chunks at once solve their systems, then one program per columns of the values carries both
memories through time in registers, and reads them. Of each chunk only its inverse, its scores and seven numbers per
token go through memory, not the memories. Backward does the first again, and the second for the memories at the start
of each chunk; then a pass against time, and all gradients chunk by chunk, in three parts that registers hold. Only
inputs are kept for it.

A sequence gets the same bits alone and in a batch, and so does a document that begins where a chunk does.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu, products, tuned

OP = "momentum_delta_rule"
WIDEST = 128  # K: a program holds columns of two memories, whole


def momentum_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, log_alpha: Tensor, log_mu: Tensor, beta: Tensor, eta: Tensor,
    state: Tensor | None, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as `momentum_delta_rule_reference`. q, k, v and p may be cut out of a wider tensor, and are not copied then.

    Raises:
        ValueError: keys wider than 128, a dtype of more than 32 bits, tensors that are not on a GPU, or no triton.
    """
    needs_gpu(v)
    dtype = q.dtype
    for x in (k, v, p):
        dtype = torch.promote_types(dtype, x.dtype)
    if q.shape[3] > WIDEST or dtype == torch.float64:
        raise ValueError(
            f"momentum_delta_rule: backend triton: expected K of at most {WIDEST} and at most float32, "
            f"got {q.shape[3]} and {dtype}"
        )
    wide = [_laid(x.to(dtype)) for x in (q, k, v, p)]
    narrow = [x.float().contiguous() for x in (log_alpha, log_mu, beta, eta)]
    state = None if state is None else state.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*wide, *narrow, state))
    ):
        o, last = _differentiable(*wide, *narrow, state, starts)
    else:
        o, last = forward(*wide, *narrow, state, starts)
    return o.to(v.dtype), last


def _laid(x: Tensor) -> Tensor:
    """x [B, T, H, W], its tokens at one distance and what belongs to a token at one place."""
    (B, T, H, W), strides = x.shape, x.stride()
    fits = strides[3] == 1 and (H == 1 or strides[2] == W) and (B == 1 or strides[0] == T * strides[1])
    return x if fits else x.contiguous()


class _Call:
    """What all launches of a call share."""

    def __init__(self, kernel: str, q, k, v, p, log_alpha, log_mu, beta, eta, starts) -> None:
        self.q, self.k, self.v, self.p, self.eta = q, k, v, p, eta
        logs = log_alpha, log_mu
        if starts is not None:  # -inf is a start, and nothing else is
            logs = [x.clamp(min=-1e30).masked_fill(starts[:, :, None], -torch.inf) for x in logs]
        self.gates = *logs, beta, eta
        (self.B, self.T, H, K), (HV, V) = q.shape, v.shape[2:]
        self.HV, self.K, self.V = HV, K, V
        self.C = tuned(OP, kernel, q.device, q.dtype, K=K)["C"]  # tokens of a chunk
        self.chunks = -(-self.T // self.C)
        self.sizes = dict(
            H=H, HP=p.shape[2], HV=HV, K=K, SQ=q.stride(1), SK=k.stride(1), SP=p.stride(1), C=self.C
        )  # fmt: skip
        self.products = products(q)
        self.exact = products(self.eta)["PRECISION"]  # of products of decays, which are fp32
        self.narrow = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32  # what products are taken in

    def config(self, kernel: str, **widths: int) -> dict[str, int]:
        """Of the tuned table; blocks no larger than what they cut."""
        config = tuned(OP, kernel, self.q.device, self.q.dtype, K=self.K, C=self.C)
        config = {name: value for name, value in config.items() if name != "C"}
        return config | {name: min(config[name], _power(n)) for name, n in widths.items()}

    def of_chunks(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(self.B, self.HV, self.chunks, *shape, dtype=dtype or self.narrow)

    def of_tokens(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(self.B, self.T, self.HV, *shape, dtype=dtype)

    def memories(self) -> Tensor:
        return self.q.new_empty(self.B, self.HV, 2, self.K, self.V, dtype=torch.float32)

    def prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        from seqzoo.kernels.momentum_delta_rule import gpu_forward

        made = (*(self.of_chunks(self.C, self.C) for _ in range(2)), self.of_chunks(7, self.C, dtype=torch.float32))
        launch(
            gpu_forward.prepare, (self.chunks, self.B * self.HV), self.q, self.k, self.p, *self.gates, *made, self.T,
            **self.sizes, STEPS=self.C.bit_length() - 1, **self.config("prepare", BK=self.K), **self.products,
            EXACT=self.exact,
        )  # fmt: skip
        return made

    def read(self, made: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """o and the last memories. Operands of 32 bits leave no registers to read with in the pass itself."""
        from seqzoo.kernels.momentum_delta_rule import gpu_forward

        o, last = self.of_tokens(self.V, dtype=self.v.dtype), self.memories()
        if self.narrow == torch.bfloat16:
            self._scan("scan", made, state, o, last, None, None)
            return o, last
        kept, written = self.keep(made, state, last)
        config = self.config("outputs", BK=self.K, BV=self.V)
        launch(
            gpu_forward.outputs, (self.chunks, self.B * self.HV, -(-self.V // config["BV"])), self.q, *made[1:], kept,
            written, o, self.T, H=self.sizes["H"], HV=self.HV, K=self.K, V=self.V, SQ=self.sizes["SQ"], C=self.C,
            **config, **self.products,
        )  # fmt: skip
        return o, last

    def keep(self, made: Sequence[Tensor], state: Tensor | None, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The memories at each chunk's start, and what was written."""
        kept, written = self.of_chunks(2, self.K, self.V), self.of_tokens(self.V, dtype=self.narrow)
        self._scan("keep", made, state, None, last, kept, written)
        return kept, written

    def _scan(self, row: str, made: Sequence[Tensor], state: Tensor | None, *results: Tensor | None) -> None:
        from seqzoo.kernels.momentum_delta_rule import gpu_forward

        config = self.config(row, BV=self.V)
        launch(
            gpu_forward.scan, (-(-self.V // config["BV"]), self.B * self.HV), self.q, self.k, self.v, self.p, self.eta,
            *made, state, *results, self.T, **self.sizes, V=self.V, SV=self.v.stride(1), BK=_power(self.K), **config,
            **self.products,
        )  # fmt: skip

    def back(self, made: Sequence[Tensor], d_o: Tensor, d_last: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the memories before the first chunk and after each, and of errors over eta."""
        from seqzoo.kernels.momentum_delta_rule import gpu_backward

        d_first, d_kept = self.memories(), self.of_chunks(2, self.K, self.V)
        errors, config = self.of_tokens(self.V, dtype=self.narrow), self.config("back", BV=self.V)
        launch(
            gpu_backward.back, (-(-self.V // config["BV"]), self.B * self.HV), self.q, self.k, self.p, d_o, self.eta,
            *made, d_last, d_first, d_kept, errors, self.T, **self.sizes, V=self.V, BK=_power(self.K), **config,
            **self.products,
        )  # fmt: skip
        return d_first, d_kept, errors

    def gradients(
        self, coefficients: Tensor, d_o: Tensor, kept: Tensor, d_kept: Tensor, written: Tensor, errors: Tensor
    ) -> list[Tensor]:
        """Of the time inputs, by value head."""
        from seqzoo.kernels.momentum_delta_rule import gpu_backward

        like = lambda x: self.of_tokens(self.K, dtype=x.dtype if x.shape[2] == self.HV else torch.float32)
        d_q, d_k, d_p, pairs = like(self.q), like(self.k), like(self.p), self.of_chunks(4, self.C, self.C)
        met, d_v = self.of_chunks(7, self.C, dtype=torch.float32), self.of_tokens(self.V, dtype=self.v.dtype)
        grid = self.chunks, self.B * self.HV
        launch(
            gpu_backward.pairs, grid, self.q, self.k, self.p, *self.gates, d_o, written, errors, pairs, self.T,
            **self.sizes, V=self.V, **self.config("pairs", BK=self.K, BV=self.V), **self.products, EXACT=self.exact,
        )  # fmt: skip
        launch(
            gpu_backward.gradients, grid, self.q, self.k, self.p, self.eta, coefficients, pairs, d_o, kept, d_kept,
            written, errors, d_q, d_k, d_p, met, self.T, **self.sizes, V=self.V,
            **self.config("gradients", BK=self.K, BV=self.V), **self.products,
        )  # fmt: skip
        d_gates = [self.of_tokens() for _ in range(4)]
        launch(
            gpu_backward.gates, (*grid, 2), self.v, *self.gates, errors, pairs, met, d_v, *d_gates, self.T, HV=self.HV,
            V=self.V, SV=self.v.stride(1), C=self.C, **self.config("gates", BV=self.V), EXACT=self.exact,
        )  # fmt: skip
        return [d_q, d_k, d_v, d_p, *d_gates]


def _power(n: int) -> int:
    """The next power of two, from 16 on, which products of matrices need."""
    return max(16, 1 << (n - 1).bit_length())


def forward(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op's tensors in order -> o and the last memories."""
    *time, state, starts = tensors
    call = _Call("scan", *time, starts)
    return call.read(call.prepare(), state)


def backward(d_o: Tensor, d_last: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the time inputs and of the first memories."""
    *time, state, starts = tensors
    call, d_o = _Call("back", *time, starts), d_o.contiguous()
    made = call.prepare()
    kept, written = call.keep(made, state)
    d_first, d_kept, errors = call.back(made, d_o, None if d_last is None else d_last.contiguous())
    grads = call.gradients(made[2], d_o, kept, d_kept, written, errors)
    for n in (0, 1, 3):  # heads that several values share
        if time[n].shape[2] < call.HV:
            grads[n] = grads[n].unflatten(2, (time[n].shape[2], -1)).sum(3).to(time[n].dtype)
    return *grads, d_first


@torch.library.custom_op("seqzoo::momentum_delta_rule_triton", mutates_args=())
def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, log_alpha: Tensor, log_mu: Tensor, beta: Tensor, eta: Tensor,
    state: Tensor | None, starts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(q, k, v, p, log_alpha, log_mu, beta, eta, state, starts)


def _memories_like(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(v.shape[0], v.shape[2], 2, q.shape[3], v.shape[3], dtype=torch.float32)


@_differentiable.register_fake
def _(q, k, v, *_):
    return v.new_empty(v.shape), _memories_like(q, v)


@torch.library.custom_op("seqzoo::momentum_delta_rule_triton_backward", mutates_args=())
def _gradients(
    d_o: Tensor, d_last: Tensor | None, q: Tensor, k: Tensor, v: Tensor, p: Tensor, log_alpha: Tensor, log_mu: Tensor,
    beta: Tensor, eta: Tensor, state: Tensor | None, starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(d_o, d_last, q, k, v, p, log_alpha, log_mu, beta, eta, state, starts)


@_gradients.register_fake
def _(d_o, d_last, q, k, v, *others):
    return *(x.new_empty(x.shape) for x in (q, k, v, *others[:5])), _memories_like(q, v)


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_last):
    tensors = ctx.saved_tensors
    d_o = tensors[2].new_zeros(tensors[2].shape) if d_o is None else d_o
    *grads, d_state = _gradients(d_o, d_last, *tensors)
    return *grads, None if tensors[8] is None else d_state, None


_differentiable.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable[[Sequence[int], torch.dtype], Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Widths at the limits of the table's rows."""
    for name, dtype, B, (H, HV), (K, V), packed in (
        ("128", torch.bfloat16, 1, (16, 16), (128, 128), False),
        ("128, grouped, packed", torch.bfloat16, 2, (4, 16), (128, 128), True),
        ("128, fp32", torch.float32, 1, (16, 16), (128, 128), False),
    ):
        T = 4096
        wide = [make((B, T, heads, width), dtype) for heads, width in ((H, K), (H, K), (HV, V), (H, K))]
        time = [*wide, *(make((B, T, HV), torch.float32) for _ in range(4))]
        for log in (4, 5):
            time[log] = -time[log].abs()
        state = make((B, HV, 2, K, V), torch.float32) if packed else None
        starts = make((B, T), torch.bool) if packed else None
        d_o = make((B, T, HV, V), dtype)
        yield name, lambda x=(*time, state, starts): forward(*x)
        yield f"{name}, backward", lambda x=(d_o, state, *time, state, starts): backward(*x)
