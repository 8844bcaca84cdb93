"""What an OVQ memory does, as options, and what it holds, as a state. Formulas: `reference.py`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHOICES = {
    "schedule": ("plateau", "min", "linear"),
    "first_chunk": ("farthest", "shared"),
    "similarity": ("dot", "cosine"),
    "choice": ("novel", "random"),
}


class OVQState(NamedTuple):
    """The open document of each row. How many slots are in use follows from `tokens`."""

    memory: Tensor  # [B, G, N, K + V] mean key beside mean value, fp32 (fp64 where v is)
    counts: Tensor  # [B, G, N] fp32 (fp64), tokens averaged in each slot; 0 is a slot not in use
    pending: Tensor  # [B, chunk - 1, G, K + V] the last keys and values, in v's dtype; the open chunk's are at the end
    tokens: Tensor  # [B] int64, of the document so far, in the memory or pending

    @classmethod
    def empty(
        cls, batch: int, heads: int, key_width: int, value_width: int, rule: "OVQRule", *, device, dtype
    ) -> "OVQState":
        """Of rows that have seen nothing. heads: of keys; dtype: of v."""
        width, wide = key_width + value_width, torch.promote_types(dtype, torch.float32)
        return cls(
            memory=torch.zeros(batch, heads, rule.slots, width, device=device, dtype=wide),
            counts=torch.zeros(batch, heads, rule.slots, device=device, dtype=wide),
            pending=torch.zeros(batch, rule.chunk - 1, heads, width, device=device, dtype=dtype),
            tokens=torch.zeros(batch, device=device, dtype=torch.int64),
        )


@dataclass(frozen=True, kw_only=True)
class OVQRule:
    """Args:
    chunk: [tokens] kept exactly until there are so many, which are then merged into the slots at once.
    slots: N, at most so many means per key head.
    schedule: slots in use after t tokens. "plateau" floor(tN / (t + N)); "min" min(t, N), with which a memory that
        never fills is full attention; "linear" floor(tN / horizon) up to N. At least 1, from the first chunk on.
    horizon: [tokens] where "linear" reaches N, N or more; None with the others.
    first_chunk: which tokens of a document's first chunk get its slots. "farthest" begins with the first token and
        goes on with that least like all chosen, the rest joins what it is most like; "shared" takes the first token
        and those least like it, the rest joins the first token, as the method's public re-implementation does.
    similarity: of a key and a slot, "dot" product, which favours tight clusters, or "cosine".
    choice: which tokens get the new slots of later chunks, "novel" those least like any slot, or, to compare with,
        "random" ones, by their position in the document.
    step: how far a slot moves towards each of its tokens: None is 1 / count, which makes it their mean, else a constant
        up to 1, or 1 / (the chunk's tokens there) if that is less.
    log_count: a slot's logit has the log of its count.
    norm_correction: a slot's logit has -scale / 2 (|key|^2 - 1), which a mixture of equal Gaussians would have.
    renormalise: mean keys are brought back to unit length.
    detach: no gradient passes from a chunk to those before it.

    Raises:
        ValueError: a value that is none of these.
    """

    chunk: int
    slots: int
    schedule: str = "plateau"
    horizon: int | None = None
    first_chunk: str = "farthest"
    similarity: str = "dot"
    choice: str = "novel"
    step: float | None = None
    log_count: bool = True
    norm_correction: bool = False
    renormalise: bool = False
    detach: bool = False

    def __post_init__(self) -> None:
        def wrong(name: str, expected: str) -> ValueError:
            return ValueError(f"ovq_attention: {name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("chunk", "slots"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise wrong(name, "a whole number, 1 or more")
        for name in ("log_count", "norm_correction", "renormalise", "detach"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, "True or False")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise wrong(name, f"one of {values}")
        if self.schedule != "linear" and self.horizon is not None:
            raise wrong("horizon", f"None with schedule {self.schedule!r}")
        if self.schedule == "linear" and (type(self.horizon) is not int or self.horizon < self.slots):
            raise wrong("horizon", f"{self.slots} tokens, one per slot, or more with schedule 'linear'")
        if self.step is not None and not (isinstance(self.step, int | float) and 0.0 < self.step <= 1.0):
            raise wrong("step", "None, or above 0 and up to 1")

    def used(self, t: int) -> int:
        """Slots in use once t tokens, a multiple of the chunk, are in the memory; grows by a chunk at most."""
        if t == 0:
            return 0
        N = self.slots
        grown = {"plateau": t * N // (t + N), "min": t, "linear": t * N // (self.horizon or 1)}[self.schedule]
        return max(1, min(N, grown))

    def scatter(self, t: int, device: torch.device) -> Tensor:
        """[chunk] an order of tokens t to t + chunk that looks random: multiplicative hashing of their positions."""
        positions = torch.arange(t, t + self.chunk, device=device)
        return (positions * 2654435761 % 2**32).argsort()
