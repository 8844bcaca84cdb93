"""The stages of the Kimi delta rule on a GPU, each a start of one kernel, by the sizes of a call.

Names and shapes are the kernels': `gpu_prepare`, `gpu_forward`, `gpu_reverse`, `gpu_gradients`, which import triton and
are imported where they are started.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.gpu import interpreted, launch, products, tuned
from seqzoo.kernels.gpu.operands import block
from seqzoo.kernels.gpu.pool import blocks, rows

OP = "kimi_delta_rule"


class Chunks(NamedTuple):
    """What `gpu_prepare.prepare` makes of the inputs."""

    A: Tensor
    P: Tensor
    reads: Tensor
    writes: Tensor
    erases: Tensor
    values: Tensor
    keep: Tensor


class Call:
    """The inputs, and what all kernels of a call are told."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, starts: Tensor | None) -> None:
        self.q, self.k, self.v, self.g, self.beta, self.starts = q, k, v, g, beta, starts
        (self.B, self.T, self.H, self.K), self.V = q.shape, v.shape[3]
        self.C = self.tuned("chunk")["C"]
        self.N = -(-self.T // self.C)
        self.dot = products(v)
        self.sizes = dict(H=self.H, K=self.K, V=self.V, C=self.C, LEVELS=self.C.bit_length() - 1)
        self.half = v.dtype == torch.bfloat16 and not interpreted()

    def tuned(self, kernel: str) -> dict[str, Any]:
        """Its configuration, blocks no wider than need be."""
        config = dict(tuned(OP, kernel, self.v.device, self.v.dtype, K=self.K, V=self.V))
        for name, width in dict(BK=self.K, BV=self.V).items():
            if name in config:
                config[name] = min(config[name], block(width))
        return config

    def empty(self, *shape: int, small: bool = True) -> Tensor:
        """For what kernels hand each other: as operands where `small`, else in fp32."""
        return self.v.new_empty(shape, dtype=torch.bfloat16 if small and self.half else torch.float32)

    def chunked(self, *shape: int, small: bool = True) -> Tensor:
        """By memory and chunk."""
        return self.empty(self.B, self.H, self.N, *shape, small=small)

    def start(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """A kernel over the tokens, told of the sizes what it asks for."""
        wanted = {name: size for name, size in self.sizes.items() if name in kernel.arg_names}
        launch(kernel, (programs,), *arguments, **wanted, **self.dot, **constants)

    def prepared(self, A: Tensor | None = None) -> Chunks:
        """All that needs no memory; A is made where it is not given."""
        from seqzoo.kernels.kimi_delta_rule import gpu_prepare

        C, K, V = self.C, self.K, self.V
        made = Chunks(
            self.chunked(C, C) if A is None else A, self.chunked(C, C), *(self.chunked(C, K) for _ in range(3)),
            self.chunked(C, V), self.chunked(K, small=False),
        )  # fmt: skip
        self.start(
            gpu_prepare.prepare, self.B * self.H * self.N,
            self.q, self.k, self.v, self.g, self.beta, self.starts, *made, self.T, self.N,
            *(x.stride(1) for x in (self.q, self.k, self.v)),
            INVERSE=A is None, WIDE=products(self.g)["PRECISION"], **self.tuned("prepare"),
        )  # fmt: skip
        return made

    def outputs(self, chunks: Chunks, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """o [B, T, H, V] and the last memory [B, H, K, V]."""
        from seqzoo.kernels.kimi_delta_rule import gpu_forward

        config = self.tuned("forward")
        o = self.v.new_empty(self.v.shape)
        last = self.empty(self.B, self.H, self.K, self.V, small=False)
        self.start(
            gpu_forward.forward, -(-self.V // config["BV"]) * self.B * self.H,
            chunks.reads, chunks.writes, chunks.erases, chunks.values, chunks.P, chunks.keep, state, o, last,
            self.T, self.N, BK=block(self.K), **config,
        )  # fmt: skip
        return o, last

    def memories(
        self, chunks: Chunks, d_o: Tensor, d_last: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The memories before all chunks, Z, the gradients of the memories after them, U, and that of the first."""
        from seqzoo.kernels.kimi_delta_rule import gpu_reverse

        config = self.tuned("both_ways")
        states, d_states = (self.chunked(self.V, self.K) for _ in range(2))
        Z, U = (self.chunked(self.C, self.V) for _ in range(2))
        d_state = self.empty(self.B, self.H, self.K, self.V, small=False)
        self.start(
            gpu_reverse.both_ways, 2 * -(-self.V // config["BV"]) * self.B * self.H,
            d_o, chunks.reads, chunks.writes, chunks.erases, chunks.values, chunks.P, chunks.keep, state, d_last,
            states, Z, d_states, U, d_state, self.T, self.N, BK=block(self.K), **config,
        )  # fmt: skip
        return states, Z, d_states, U, d_state

    def gradients(
        self, A: Tensor, d_o: Tensor, states: Tensor, Z: Tensor, d_states: Tensor, U: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of q, k, v, g and beta."""
        from seqzoo.kernels.kimi_delta_rule import gpu_gradients

        config, programs = self.tuned("gradients"), self.B * self.H * self.N
        slices = -(-self.K // config["BK"])
        E, W, d_P = torch.empty_like(U), self.chunked(self.C, self.C), self.chunked(self.C, self.C)
        dq, dk, dv, dg = (x.new_empty(x.shape) for x in (self.q, self.k, self.v, self.g))
        d_beta = self.empty(1 + slices, self.B, self.T, self.H, small=False)
        self.start(
            gpu_gradients.squares, programs,
            self.v, self.beta, d_o, A, Z, U, E, W, d_P, dv, d_beta, self.T, self.N, self.v.stride(1),
            **self.tuned("squares"),
        )  # fmt: skip
        self.start(
            gpu_gradients.gradients, slices * programs,
            self.q, self.k, self.g, self.beta, self.starts, d_o, states, Z, d_states, E, W, d_P,
            dq, dk, dg, d_beta[1:], self.T, self.N, self.q.stride(1), self.k.stride(1), **config,
        )  # fmt: skip
        return dq, dk, dv, dg, d_beta.sum(0)


def kimi_delta_rule_step_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor, index: Tensor | None, starts: Tensor | None
) -> Tensor:
    """`step.kimi_delta_rule_step_` in one launch: a program per row, head and slice of V."""
    from seqzoo.kernels.kimi_delta_rule.gpu_step import kimi_delta_rule_steps

    (B, T, H, K), V = q.shape, v.shape[3]
    q, k, v = rows(q), rows(k), rows(v)
    starts = None if starts is None else starts.contiguous()
    o, cut = v.new_empty(v.shape), blocks(K, V, v.device)
    launch(
        kimi_delta_rule_steps, (B * H * -(-V // cut["BV"]),),
        q, k, v, g.contiguous(), beta.contiguous(), pool, index, starts, o,
        T, pool.shape[0], pool.stride(0), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], H=H, K=K, V=V, **cut,
    )  # fmt: skip
    return o
