"""Strict linear attention on a GPU, in Triton: `gpu_kernels.py`, forward and backward.

The memory of a head is N x D, N thousands of neurons, far more than a program can hold, so it is cut twice. In time,
into segments of about twice D tokens, whose memories go through slow memory once each way, in the dtype in which
products are taken: N / 2 numbers per token, where r itself is N. Over neurons and D, into tiles, each carried through
all segments by one program, in registers. All else is parallel over blocks of tokens. Had instead each tile of neurons
read its own part of the outputs, N / tile parts of D sums per token would have to be written and added: with tiles of
64 neurons and D = 256, eight times the bytes of r. Scores of a segment are summed over neurons once, whatever D is.

A sequence gets the same bits alone and in a batch, and so does a document that begins where a segment does.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from seqzoo.kernels.gpu import launch, needs_gpu, products, tuned

OP = "strict_linear_attention"


def strict_linear_attention_triton(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None = None, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `strict_linear_attention_reference`. r may be a transposed view, heads before time, and is not copied.

    Raises:
        ValueError: a dtype of more than 32 bits, tensors that are not on a GPU, or no triton.
    """
    needs_gpu(r)
    needs_gpu(v)
    dtype = torch.promote_types(r.dtype, v.dtype)
    r, values = _laid(r.to(dtype)), v.to(dtype).contiguous()
    decay = None if decay is None else decay.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, v, state))
    if learns or torch.compiler.is_compiling():
        a, last, *_ = _differentiable(r, values, state, starts, decay, learns)
    else:
        a, last, *_ = forward(r, values, state, starts, decay)
    return a.to(v.dtype), last


def _laid(r: Tensor) -> Tensor:
    """With one of the layouts that kernels know: [B, T, H, N], or that as a view of [B, H, T, N]."""
    return r if r.is_contiguous() or r.transpose(1, 2).is_contiguous() else r.contiguous()


def _segment(D: int) -> int:
    """Tokens of a segment. A power of two, and of two blocks at least."""
    return min(max(64, 2 * _power(D)), 1024)


def _power(n: int) -> int:
    """The next power of two, from 16 on, which products of matrices need."""
    return max(16, 1 << (n - 1).bit_length())


def _kept(r: Tensor, D: int) -> Tensor:
    """Room for a memory per segment, as products take it: float16 is too narrow for sums."""
    (B, T, H, N), dtype = r.shape, torch.bfloat16 if r.dtype == torch.bfloat16 else torch.float32
    return r.new_empty(B, H, -(-T // _segment(D)), N, D, dtype=dtype)


def _scored(r: Tensor, D: int) -> Tensor:
    """Room for a segment's scores of each token."""
    B, T, H, _ = r.shape
    return r.new_empty(B, H, T, _segment(D), dtype=torch.bfloat16 if r.dtype == torch.bfloat16 else torch.float32)


class _Call:
    """What all launches of a call share."""

    def __init__(self, r: Tensor, v: Tensor, starts: Tensor | None, decay: Tensor | None) -> None:
        self.r, self.v, self.decay = r, v, decay
        (self.B, self.T, self.H, self.N), (self.G, self.D) = r.shape, v.shape[2:]
        self.L, self.products = _segment(self.D), products(r)
        self.heads_first = not r.is_contiguous()
        self.documents = None if starts is None else starts.cumsum(1, dtype=torch.int32)

    def _config(self, kernel: str, **most: int) -> dict[str, int]:
        """Of the tuned table, its blocks no larger than what they cut."""
        config = tuned(OP, kernel, self.r.device, self.r.dtype, D=self.D)
        return config | {name: min(config[name], _power(n)) for name, n in most.items()}

    def scores(self, x: Tensor, y: Tensor, heads_first: bool, symmetric: bool) -> Tensor:
        from seqzoo.kernels.strict_linear_attention import gpu_kernels

        W = x.shape[3]
        out, config = _scored(self.r, self.D), self._config("scores", BT=self.L, BK=W)
        grid = (self.L // config["BT"]) ** 2, -(-self.T // self.L), self.B * self.H
        launch(
            gpu_kernels.scores, grid, x, y, out, self.documents, self.decay, self.T, H=self.H, G=y.shape[2], W=W,
            L=self.L, HEADS_FIRST=heads_first, SYMMETRIC=symmetric, **config, **self.products,
        )  # fmt: skip
        return out

    def states(self, x: Tensor, first: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        from seqzoo.kernels.strict_linear_attention import gpu_kernels

        kept, last = _kept(self.r, self.D), self.r.new_empty(self.B, self.H, self.N, self.D, dtype=torch.float32)
        config = self._config("states", BN=self.N, BD=self.D, BT=self.L)
        grid = -(-self.D // config["BD"]), -(-self.N // config["BN"]), self.B * self.H
        first = None if first is None else first.contiguous()
        launch(
            gpu_kernels.states, grid, self.r, x, first, kept, last, self.documents, self.decay, self.T, H=self.H,
            G=x.shape[2], N=self.N, D=self.D, L=self.L, HEADS_FIRST=self.heads_first, REVERSE=reverse, **config,
            **self.products,
        )  # fmt: skip
        return kept, last

    def read(self, kept: Tensor, p: Tensor, x: Tensor, fresh: bool, reverse: bool, dtype: torch.dtype) -> Tensor:
        from seqzoo.kernels.strict_linear_attention import gpu_kernels

        out = x.new_empty(self.B, self.T, self.H, self.D, dtype=dtype)
        config = self._config("read", BT=self.L, BD=self.D)
        block = self._config("scores", BT=self.L)["BT"]
        config["BT"] = min(config["BT"], block)  # whose blocks beyond the diagonal are not there to be read
        config["BK"] = min(config["BK"], block)
        grid = -(-self.T // config["BT"]), -(-self.D // config["BD"]), self.B * self.H
        launch(
            gpu_kernels.read, grid, self.r, kept, p, x, out, self.documents, self.decay, self.T, H=self.H,
            G=x.shape[2], N=self.N, D=self.D, L=self.L, HEADS_FIRST=self.heads_first, FRESH=fresh, REVERSE=reverse,
            **config, **self.products,
        )  # fmt: skip
        return out

    def pull(self, d_a: Tensor, kept: Tensor, d_kept: Tensor, q: Tensor, fresh: bool, unused: bool) -> Tensor:
        from seqzoo.kernels.strict_linear_attention import gpu_kernels

        out, config = torch.empty_like(self.r), self._config("pull", BT=self.L, BN=self.N)
        config["BK"] = min(config["BK"], self._config("scores", BT=self.L)["BT"])
        grid = -(-self.T // config["BT"]), -(-self.N // config["BN"]), self.B * self.H
        launch(
            gpu_kernels.pull, grid, self.r, self.v, d_a, kept, d_kept, q, out, self.documents, self.decay, self.T,
            H=self.H, G=self.G, N=self.N, D=self.D, L=self.L, HEADS_FIRST=self.heads_first, FRESH=fresh,
            UNUSED=unused, **config, **self.products,
        )  # fmt: skip
        return out


def forward(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, the last memory, and for backward the memories at the segments' starts and the scores."""
    call = _Call(r, v, starts, decay)
    kept, last = call.states(v, state, False)
    p = call.scores(r, r, call.heads_first, False)
    return call.read(kept, p, v, state is None, False, v.dtype), last, kept, p


def backward(
    d_a: Tensor, d_last: Tensor | None, r: Tensor, v: Tensor, starts: Tensor | None, decay: Tensor | None,
    kept: Tensor, p: Tensor, has_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r, v and the first memory."""
    call, fresh, unused = _Call(r, v, starts, decay), not has_state, d_last is None
    d_a = d_a.contiguous()
    d_kept, d_state = call.states(d_a, d_last, True)
    q = call.scores(d_a, v, False, True)
    d_r = call.pull(d_a, kept, d_kept, q, fresh, unused)
    if call.G == call.H:
        return d_r, call.read(d_kept, p, d_a, unused, True, v.dtype), d_state
    each = call.read(d_kept, p, d_a, unused, True, torch.float32)
    return d_r, each.unflatten(2, (call.G, -1)).sum(3).to(v.dtype), d_state


@torch.library.custom_op("seqzoo::strict_linear_attention_triton", mutates_args=())
def _differentiable(
    r: Tensor, v: Tensor, state: Tensor | None, starts: Tensor | None, decay: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, the last memory, and where `keep` what backward needs."""
    a, last, kept, p = forward(r, v, state, starts, decay)
    return (a, last, kept, p) if keep else (a, last, kept.new_empty(0), p.new_empty(0))


@_differentiable.register_fake
def _(r, v, state, starts, decay, keep):
    (B, T, H, N), D = r.shape, v.shape[3]
    a, last = v.new_empty(B, T, H, D), v.new_empty(B, H, N, D, dtype=torch.float32)
    kept, p = _kept(r, D), _scored(r, D)
    return (a, last, kept, p) if keep else (a, last, kept.new_empty(0), p.new_empty(0))


@torch.library.custom_op("seqzoo::strict_linear_attention_triton_backward", mutates_args=())
def _gradients(
    d_a: Tensor, d_last: Tensor | None, r: Tensor, v: Tensor, starts: Tensor | None, decay: Tensor | None,
    kept: Tensor, p: Tensor, has_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(d_a, d_last, r, v, starts, decay, kept, p, has_state)


@_gradients.register_fake
def _(d_a, d_last, r, v, *_):
    (B, _, H, N), D = r.shape, v.shape[3]
    return torch.empty_like(r), v.new_empty(v.shape), v.new_empty(B, H, N, D, dtype=torch.float32)


def _remember(ctx, inputs, output):
    r, v, state, starts, decay, _ = inputs
    ctx.save_for_backward(r, v, starts, decay, *output[2:])
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, d_a, d_last, *_):
    r, v, *rest = ctx.saved_tensors
    d_a = v.new_zeros(*r.shape[:3], v.shape[3]) if d_a is None else d_a
    d_r, d_v, d_state = _gradients(d_a, d_last, r, v, *rest, ctx.state_dtype is not None)
    return d_r, d_v, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None, None


_differentiable.register_autograd(_backward, setup_context=_remember)


def examples(make: Callable[[Sequence[int], torch.dtype], Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
    """BDH as released has N = 8192 of each of 4 heads and D = 256."""
    for name, dtype, (B, T, H, G, N, D), heads_first, packed in (
        ("released", torch.bfloat16, (1, 4096, 4, 1, 8192, 256), True, False),
        ("released, packed and fading", torch.bfloat16, (1, 4096, 4, 1, 8192, 256), True, True),
        ("released, fp32", torch.float32, (1, 4096, 4, 1, 8192, 256), True, False),
        ("nano", torch.bfloat16, (2, 4096, 4, 1, 576, 96), False, False),
    ):
        r = make((B, H, T, N), dtype).transpose(1, 2) if heads_first else make((B, T, H, N), dtype)
        v, d_a = make((B, T, G, D), dtype), make((B, T, H, D), dtype)
        state = make((B, H, N, D), torch.float32) if packed else None
        marks = (make((B, T), torch.bool), make((H,), torch.float32)) if packed else (None, None)
        kept, p = make(_kept(r, D).shape, _kept(r, D).dtype), make(_scored(r, D).shape, _scored(r, D).dtype)
        yield name, lambda x=(r, v, state, *marks): forward(*x)
        yield f"{name}, backward", lambda x=(d_a, state, r, v, *marks, kept, p, packed): backward(*x)
