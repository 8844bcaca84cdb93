"""States in a pool: what the ops' steps in place share.

A server keeps the states of all its sequences in one tensor [slots, ...]; a step reads and writes those of its rows by
index. No decision depends on numbers on the device, so that a step can be part of a CUDA graph.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from seqzoo.kernels.checks import KINDS, check_tensors
from seqzoo.kernels.dispatch import FAST, choose, forced
from seqzoo.kernels.gpu.launch import usable
from seqzoo.kernels.gpu.tables import arch

MOST = 16  # tokens of a step; of more, the op itself is faster
WIDEST = 1024  # rows of a state that a program keeps whole


def check_pool(
    op: str,
    inputs: Mapping[str, Tensor],
    pool: Tensor,
    state: Sequence[int],
    index: Tensor | None,
    *,
    name: str = "pool",
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """What every step checks beside the op's own inputs.

    Args:
        op: the step's name, for messages.
        inputs: the op's, by name, already checked; the first is [B, T, ...].
        pool, index: the step's own.
        state: shape of one state.
        name, dtype: of the pool; None is any floating dtype.

    Raises:
        ValueError: the first that does not fit.
    """
    like = next(iter(inputs))
    B, T = inputs[like].shape[:2]
    if T > MOST:
        raise ValueError(f"{op}: {like}: expected at most {MOST} tokens, got {T}")
    if pool.ndim != 1 + len(state) or not pool.shape[0]:
        raise ValueError(f"{op}: {name}: expected [slots, {', '.join(map(str, state))}], got {tuple(pool.shape)}")
    kind = index.dtype if index is not None and index.dtype in (torch.int32, torch.int64) else torch.int64
    tensors = {
        like: (inputs[like], inputs[like].shape),
        name: (pool, (pool.shape[0], *state)),
        "index": (index, (B,)),
    }
    check_tensors(op, tensors, like=like, kinds=KINDS | {name: dtype, "index": kind})
    if index is None and pool.shape[0] < B:
        raise ValueError(f"{op}: {name}: expected a slot for each of {B} rows, got {pool.shape[0]}")
    if not pool[0].is_contiguous() or (pool.shape[0] > 1 and pool.stride(0) < math.prod(state)):
        raise ValueError(f"{op}: {name}: expected slots that are contiguous, got strides {pool.stride()}")
    if torch.is_grad_enabled():
        for argument, x in {**inputs, name: pool}.items():
            if x.requires_grad:
                raise ValueError(f"{op}: {argument}: expected no gradient to be recorded: a step overwrites its states")


def step_on_gpu(backends: Container[str], x: Tensor, width: int) -> bool:
    """Whether the step's own kernel runs, rather than the op with its states gathered; x is the values.

    Args:
        backends: of the op; one of them may be forced.
        width: rows of a state that one program keeps.

    Raises:
        ValueError: a backend is forced that the op lacks.
    """
    if not forced() and "triton" not in FAST.get(x.device.type, ()):  # layers ask at every token
        return False
    kinds = (torch.float32, torch.bfloat16, torch.float16)  # float32 too: nothing is multiplied on matrix units
    able = lambda name: name == "triton" and usable() and x.dtype in kinds and width <= WIDEST
    return choose({"triton", *backends}, tokens=x.shape[1], device=x.device, able=able) == "triton"


def gathered(
    run: Callable[..., tuple[Tensor, ...]], batch: int, pool: Tensor, index: Tensor | None, *others: Tensor
) -> Tensor:
    """A step by whatever computes one from gathered states.

    Args:
        run: states [B, ...] of each pool -> what is read [B, T, ...] and the next states; it may write over those it
            gets.
        batch: B.
        pool, index: the step's own.
        others: more pools.

    Returns:
        What is read, zeros where the index is negative.
    """
    pools = pool, *others
    with torch.no_grad():
        if index is None:
            states = [pool[:batch] for pool in pools]
            o, *last = run(*states)
            for here, after in zip(states, last, strict=True):
                if after is not here:
                    here.copy_(after)
            return o
        slots = index.clamp(min=0).long()
        o, *last = run(*(pool[slots] for pool in pools))
        live = index >= 0
        # An inactive row does again what the first active one does, and where there is none, writes what is there.
        row = torch.where(live, torch.arange(batch, device=index.device), live.int().argmax())
        slots, some = slots[row], live[row]
        for pool, after in zip(pools, last, strict=True):
            pool.index_copy_(0, slots, torch.where(_along(some, pool), after[row].to(pool.dtype), pool[slots]))
        return torch.where(_along(live, o), o, 0)


def _along(x: Tensor, like: Tensor) -> Tensor:
    """x [B] as [B, 1, ...] with the dimensions of another."""
    return x.view(-1, *(1,) * len(like.shape[1:]))


def rows(x: Tensor) -> Tensor:
    """With each token's heads side by side, as a kernel reads them; a token and a row may be any steps apart."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def blocks(K: int, V: int, device: torch.device, states: int = 1) -> dict[str, int]:
    """How a state [K, V] is cut for programs that keep all K of some columns: about 2048 numbers each, 16 a thread.

    Args:
        K, V: its size.
        device: of the pool.
        states: that a program keeps.
    """
    BK, BV = (1 << (n - 1).bit_length() for n in (K, V))
    BV = min(BV, max(16, 2048 // BK))
    warps = min(8, max(1, BK * BV // 512))
    most = 64 * states if warps < 8 else 255  # the widest leave more than 16 to a thread
    return dict(BK=BK, BV=BV, num_warps=warps, num_stages=1, **registers(most, device))


def registers(most: int, device: torch.device) -> dict[str, int]:
    """What says to a compiler how many a thread may have: NVIDIA's else spills a few for one program more at a time."""
    return {} if arch(device).startswith("gfx") else dict(maxnreg=most)
