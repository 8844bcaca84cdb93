"""The sizes of a call of the gated delta rule on a GPU, and how its kernels are started."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.gpu import arch, interpreted, launch, products, tuned
from seqzoo.kernels.gpu.operands import block
from seqzoo.kernels.gpu.tables import MULTIPROCESSORS

OP = "gated_delta_rule"
TOKENS = 32768  # that a device is taken to have at once: shorter sequences come in batches, and fill it by themselves
CHAINED = 128  # K of a move [K, K] in fp32 that shared memory can hold
SHORTEST = 16  # chunks a part has at least
parts: int | None = None  # in place of what `split` would say


class Call(NamedTuple):
    """Sizes of a call, and how its kernels are started."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    C: int
    parts: int
    rows: tuple[int, int, int]  # from a token to the next in q, k and v
    like: Tensor

    @property
    def chunks(self) -> int:
        return -(-self.T // self.C)

    @property
    def length(self) -> int:
        """Chunks of a part; the last may have fewer."""
        return -(-self.chunks // self.parts)

    def empty(self, *shape: int, small: bool = True) -> Tensor:
        """For what kernels hand each other: as operands where `small`, else in fp32."""
        half = small and self.like.dtype == torch.bfloat16 and not interpreted()
        return self.like.new_empty(shape, dtype=torch.bfloat16 if half else torch.float32)

    def per_token(self, *width: int, small: bool = True) -> Tensor:
        """By memory and token, in whole chunks."""
        return self.empty(self.B, self.HV, self.chunks * self.C, *width, small=small)

    def config(self, kernel: str) -> dict[str, Any]:
        """From the table."""
        return tuned(OP, kernel, self.like.device, self.like.dtype, K=self.K, V=self.V)

    def slices(self, config: dict[str, Any], width: int | None = None) -> int:
        """Into which V, or `width`, is cut."""
        return -(-(width or self.V) // config["BV"])

    def start(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """A kernel over the tokens."""
        sizes = dict(H=self.H, HV=self.HV, K=self.K, V=self.V, C=self.C, BK=block(self.K))
        sizes |= dict(zip(("Q_ROW", "K_ROW", "V_ROW"), self.rows, strict=True)) | products(self.like)
        sizes["LEVELS"] = self.C.bit_length() - 1
        wanted = {name: sizes[name] for name in kernel.arg_names if name in sizes}
        launch(kernel, (programs,), *arguments, **wanted | constants)


def call_of(q: Tensor, k: Tensor, v: Tensor) -> Call:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    C = tuned(OP, "chunk", v.device, v.dtype, K=K, V=V)["C"]
    rows = tuple(x.stride(1) if x.shape[1] > 1 else x.stride(0) for x in (q, k, v))
    return Call(B, T, H, HV, K, V, C, split(T, HV, K, V, C, arch(v.device)), rows, v)


def split(T: int, HV: int, K: int, V: int, C: int, arch: str) -> int:
    """Into how many parts the serial kernels cut a sequence: 1, or 3 and more."""
    chunks = -(-T // C)
    if K > CHAINED:
        return 1
    wanted = parts
    if wanted is None:
        programs = max(1, TOKENS // T) * HV * -(-V // 64)
        wanted = min(2 * MULTIPROCESSORS[arch] // programs, chunks // SHORTEST)  # two programs run on each at once
        wanted = wanted if wanted >= 3 else 1
    length = -(-chunks // min(wanted, chunks))
    return -(-chunks // length)  # no part is empty


def rows_of(x: Tensor) -> Tensor:
    """A token's heads adjacent, tokens at one distance through the batch; a view into a wider tensor may stay one."""
    B, T, H, W = x.shape
    fits = x.stride(3) == 1 and (H == 1 or x.stride(2) == W) and (B == 1 or T == 1 or x.stride(0) == T * x.stride(1))
    return x if fits else x.contiguous()
