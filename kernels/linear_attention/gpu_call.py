"""The stages of linear attention on a GPU, each a start of one kernel, by the sizes of a call.

Names and shapes are the kernels': `gpu_forward`, `gpu_channel`, `gpu_chunks`, which import triton and are imported
where they are started.
"""

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.gpu import arch, launch, products, tuned
from seqzoo.kernels.gpu.operands import block
from seqzoo.kernels.gpu.tables import MULTIPROCESSORS

OP = "linear_attention"
C = 64  # tokens of a chunk, as in gpu_parts
NONE, HEAD, CHANNEL = 0, 1, 2  # kinds of decay, as in gpu_parts
FEWEST = 32  # chunks of a segment: fewer are not worth what it costs to find the memory they start with


class Call:
    """What all kernels of a call are told, and the sizes they go by."""

    def __init__(self, q: Tensor, v: Tensor, g: Tensor | None, starts: Tensor | None, segments: int | None) -> None:
        self.q, self.v, self.g, self.starts = q, v, g, starts
        (self.B, self.T, self.H, self.K), (self.G, self.V) = q.shape, v.shape[2:]
        self.N = -(-self.T // C)
        self.decay = CHANNEL if g is not None and g.ndim == 4 else NONE if g is None and starts is None else HEAD
        self.dot = products(v)
        self.scratch = torch.bfloat16 if str(self.dot["DOT"]) == "bf16" else torch.float32
        self.heads = dict(R=self.H // self.G, G=self.G, K=self.K)
        most = (
            max(1, min(MULTIPROCESSORS[arch(v.device)] // self.G, self.N // FEWEST)) if segments is None else segments
        )
        self.length = -(-self.N // min(most, self.N))  # chunks of a segment
        self.segments = -(-self.N // self.length)

    def tuned(self, kernel: str) -> dict[str, Any]:
        """Its configuration, blocks no wider than need be."""
        config = dict(tuned(OP, kernel, self.v.device, self.v.dtype, K=self.K, V=self.V, R=self.H // self.G))
        for name, width in dict(BK=self.K, BV=self.V).items():
            if name in config:
                config[name] = min(config[name], block(width))
        return config

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.v.new_empty(*shape, dtype=dtype)

    def memories(self) -> Tensor:
        """Room for one before or after each chunk."""
        return self.new(self.B, self.G, self.N, self.K, self.V, dtype=self.scratch)

    def prepared(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Faded queries and keys, scores, and what the memory keeps over each chunk, with one decay per channel."""
        from seqzoo.kernels.linear_attention import gpu_channel

        reads, writes = self.new(*self.q.shape, dtype=self.scratch), self.new(*k.shape, dtype=self.scratch)
        scores = self.new(self.B, self.N, self.H, C, C, dtype=self.scratch)
        keep = self.new(self.B, self.N, self.G, self.K)
        launch(
            gpu_channel.prepare, (self.B * self.H, self.N),
            self.q, k, self.g, self.starts, reads, writes, scores, keep, self.T, self.q.stride(1), k.stride(1),
            **self.heads, **self.dot, **self.tuned("prepare"),
        )  # fmt: skip
        return reads, writes, scores, keep

    def states(
        self, left: Tensor, right: Tensor, keep: Tensor | None, first: Tensor | None, reverse: bool,
        chunks: Tensor | None = None, last: Tensor | None = None, fades: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The memories alone."""
        from seqzoo.kernels.linear_attention import gpu_forward

        config = self.tuned("states")
        slices = -(-self.K // config["BK"]) * -(-self.V // config["BV"])
        launch(
            gpu_forward.states, (slices * self.B * self.G, self.segments),
            left, right, self.g, self.starts, keep, first, chunks, last, fades,
            self.T, self.length, self.segments, left.stride(1), right.stride(1),
            **self.heads | dict(R=left.shape[2] // self.G), V=self.V, DECAY=self.decay, REVERSE=reverse,
            **self.dot, **config,
        )  # fmt: skip

    def begun(
        self, left: Tensor, right: Tensor, keep: Tensor | None, first: Tensor | None, reverse: bool = False
    ) -> Tensor | None:
        """[B, G, segments, K, V], the memory that each segment starts with."""
        from seqzoo.kernels.linear_attention import gpu_forward

        if self.segments == 1:
            return first
        parts = self.new(self.B, self.G, self.segments, self.K, self.V)
        fades = None
        if self.decay != NONE:
            fades = self.new(self.B, self.G, self.segments, self.K if self.decay == CHANNEL else 1)
        self.states(left, right, keep, None, reverse, last=parts, fades=fades)
        config = self.tuned("combine")
        launch(
            gpu_forward.combine, (self.B * self.G, -(-self.K * self.V // config["BLOCK"])),
            parts, fades, first, self.segments, K=self.K, V=self.V, DECAY=self.decay, REVERSE=reverse, **config,
        )  # fmt: skip
        return parts

    def outputs(
        self, q: Tensor, k: Tensor, scores: Tensor | None, keep: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """o [B, T, H, V] and the last memory; in one pass, or where the table has no room for that (BV 0) in two."""
        from seqzoo.kernels.linear_attention import gpu_chunks, gpu_forward

        first, config = self.begun(k, self.v, keep, state), self.tuned("scan")
        o = self.new(self.B, self.T, self.H, self.V, dtype=self.v.dtype)
        last = self.new(self.B, self.G, self.K, self.V)
        steps = q.stride(1), k.stride(1), self.v.stride(1)
        if config["BV"]:
            launch(
                gpu_forward.scan, (-(-self.V // config["BV"]) * self.B * self.G, self.segments),
                q, k, self.v, self.g, self.starts, scores, keep, first, o, last,
                self.T, self.length, self.segments, *steps,
                **self.heads, V=self.V, DECAY=self.decay, BK=block(self.K), **self.dot, **config,
            )  # fmt: skip
            return o, last
        memories = self.memories()
        self.states(k, self.v, keep, first, False, memories, last)
        config = self.tuned("outputs")
        launch(
            gpu_chunks.outputs, (-(-self.V // config["BV"]) * self.B * self.H, self.N),
            q, k, self.v, self.g, self.starts, scores, memories, o, self.T, *steps,
            **self.heads, V=self.V, DECAY=self.decay, **self.dot, **config,
        )  # fmt: skip
        return o, last

    def value_gradients(self, q: Tensor, k: Tensor, scores: Tensor | None, d_o: Tensor, d_memories: Tensor) -> Tensor:
        """dv."""
        from seqzoo.kernels.linear_attention import gpu_chunks

        config, dv = self.tuned("value_gradients"), self.new(*self.v.shape, dtype=self.v.dtype)
        launch(
            gpu_chunks.value_gradients, (-(-self.V // config["BV"]) * self.B * self.G, self.N),
            q, k, self.g, self.starts, scores, d_o, d_memories, dv,
            self.T, q.stride(1), k.stride(1), d_o.stride(1),
            **self.heads, V=self.V, DECAY=self.decay, **self.dot, **config,
        )  # fmt: skip
        return dv

    def gradients(
        self, k: Tensor, d_o: Tensor, memories: Tensor, d_memories: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """dq, dk and dg."""
        from seqzoo.kernels.linear_attention import gpu_channel, gpu_chunks

        by_channel = self.decay == CHANNEL
        config = self.tuned("channel_gradients" if by_channel else "gradients")
        slices = -(-self.K // config["BK"])
        dq, dk = (self.new(*x.shape, dtype=x.dtype) for x in (self.q, k))
        dg = None
        if self.g is not None:  # of one decay per head, the sum over slices of K is left
            dg = self.new(*self.g.shape) if by_channel else self.new(slices, *self.g.shape)
        launch(
            gpu_channel.channel_gradients if by_channel else gpu_chunks.gradients, (slices * self.B * self.G, self.N),
            self.q, k, self.v, self.g, self.starts, d_o, memories, d_memories, dq, dk, dg,
            self.T, self.q.stride(1), k.stride(1), self.v.stride(1), d_o.stride(1),
            **self.heads, V=self.V, **({} if by_channel else dict(DECAY=self.decay)), **self.dot, **config,
        )  # fmt: skip
        return dq, dk, dg if dg is None or by_channel else dg[0] if slices == 1 else dg.sum(0)
