"""BDH, the Dragon Hatchling: n neurons per token that remember each other, around a stream of the model width.

    x  = relu(D_x v)                                per head: which neurons fire
    a  = sum over s < t of (r_t . r_s) v_s          r is x turned by its position: a memory read before it is written
    y  = relu(D_y LN(a))                            what the memory lets through
    v' = LN(v + LN(E (x * y)))                      residual "model", as released
    v' = LN(E (x * y)),  x = x of the level before + relu(D_x v)      residual "neuron", as in the paper's Def. 4

LN has no parameters. A document's first token reads nothing: residual "neuron" makes it 0, and its next token in the
next level. Levels share the weights, and the blocks of a tied stack are levels too. It wants its input
normed (`embed_norm` of the model) and gives it normed. Phases are fp64's, not fp32's as released.

B batch   T time   D model width   H heads   N neurons per head
Source: Kosowski et al. 2025, arXiv 2509.26507; the code released with it for what the paper leaves open. The damping
that the paper asks for in long contexts is `decay`: e^-decay is kept per token and head.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.strict_linear_attention import bdh_level
from seqzoo.layers.registry import Spec
from seqzoo.layers.rope import pair_turns
from seqzoo.layers.span import Span


class BDHState(NamedTuple):
    memory: tuple[Tensor, ...]  # of each level [B, H, N, D] fp32
    seen: Tensor  # [B] int64, how many tokens came so far


class BDH(nn.Module):
    """
    Args:
        num_heads: H.
        neurons: n = H N, of all heads.
        levels: how often the block is gone through, with the same weights and a memory each.
        residual: model, or neuron: x is handed on from level to level (and not beyond the block).
        decay: [nats/token] by which each head's memory fades, H numbers; None is not at all.
        dropout: share of x * y that is dropped in training.
        rope_theta: base of the rotary frequencies.
        ladders: how often the frequencies of N / ladders neurons stand beside each other, as after a merge.

    Raises:
        ValueError: sizes that do not fit each other, an unknown residual, numbers out of range.
    """

    by_level = True  # how many neurons are active differs from level to level, the lowest is dense

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        neurons: int,
        levels: int = 1,
        residual: str = "model",
        decay: list[float] | None = None,
        dropout: float = 0.0,
        rope_theta: float = 65536.0,
        ladders: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, size in dict(num_heads=num_heads, neurons=neurons, levels=levels, ladders=ladders).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"bdh: {name}: expected a whole number, at least 1, got {size!r}")
        if neurons % (2 * num_heads * ladders):
            raise ValueError(f"bdh: neurons: expected pairs for {num_heads} heads x {ladders} ladders, got {neurons}")
        if residual not in ("model", "neuron"):
            raise ValueError(f"bdh: residual: expected 'model' or 'neuron', got {residual!r}")
        if decay is not None and not (isinstance(decay, list) and len(decay) == num_heads and all(map(_fades, decay))):
            raise ValueError(f"bdh: decay: expected {num_heads} numbers from 0 on, one per head, got {decay}")
        if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
            raise ValueError(f"bdh: dropout: expected 0 to less than 1, got {dropout}")
        for name, value in dict(rope_theta=rope_theta, norm_eps=norm_eps).items():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"bdh: {name}: expected more than 0, got {value!r}")
        self.D, self.H, self.N, self.levels = hidden_size, num_heads, neurons // num_heads, levels
        self.residual, self.decay, self.dropout = residual, decay, dropout
        self.theta, self.ladders, self.norm_eps = rope_theta, ladders, norm_eps
        self.encoder = nn.Parameter(torch.empty(num_heads, self.N, hidden_size))  # D_x, a row per neuron, as all three
        self.encoder_v = nn.Parameter(torch.empty(num_heads, self.N, hidden_size))  # D_y
        self.decoder = nn.Parameter(torch.empty(num_heads, self.N, hidden_size))  # E
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        for weight in (self.encoder, self.encoder_v, self.decoder):
            nn.init.normal_(weight, std=std)

    @staticmethod
    def joined_spec(specs: Sequence[Spec]) -> Spec:
        """Of a block that has the neurons of all of these, head by head, each with the frequencies it had.

        Raises:
            ValueError: options other than neurons and ladders differ, or ladders are not of one length.
        """
        first, own = specs[0], ("neurons", "ladders")
        for spec in specs[1:]:
            differ = sorted(name for name in first if name not in own and spec.get(name) != first[name])
            if differ:
                raise ValueError(f"bdh: expected blocks alike but for their neurons, got other {differ}")
            if spec["neurons"] * first["ladders"] != first["neurons"] * spec["ladders"]:
                raise ValueError("bdh: expected ladders of one length, got neurons / ladders that differ")
        return first | {name: sum(spec[name] for spec in specs) for name in own}

    @staticmethod
    def joined(blocks: Sequence["BDH"]) -> dict[str, Tensor]:
        """The parameters of that block, by name."""
        names = [name for name, _ in blocks[0].named_parameters()]
        return {name: torch.cat([getattr(block, name).detach() for block in blocks], dim=1) for name in names}

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> BDHState:
        memory = tuple(torch.zeros(batch, self.H, self.N, self.D, device=device) for _ in range(self.levels))
        return BDHState(memory, torch.zeros(batch, device=device, dtype=torch.int64))

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence keeps, however long it is."""
        return 4 * self.levels * self.H * self.N * self.D + 8

    def flops(self, context: int) -> int:
        """Forward, per token: three matrices, and a memory written and read; a multiply-add is 2."""
        return 10 * self.levels * self.H * self.N * self.D

    def forward(
        self, v: Tensor, span: Span | None = None, state: BDHState | None = None
    ) -> tuple[Tensor, BDHState | None, dict[str, Tensor]]:
        """v [B, T, D] -> v [B, T, D], the next state if one came in, and sums over tokens and levels: how many x and
        how many x * y are not 0, of how many neurons."""
        span = Span.whole(v, 0 if state is None else state.seen[:, None]) if span is None else span
        B, T, _ = v.shape
        if span.valid is not None:  # v = 0 gives x = 0: padding on the left writes nothing
            v = v * span.valid[..., None]
        cos, sin = pair_turns(span.positions, self.N, self.theta, _wide(v.dtype), self.ladders)
        decay = None if self.decay is None else -v.new_tensor(self.decay, dtype=_wide(v.dtype))
        x = v.new_zeros(B, self.H, T, self.N) if self.residual == "neuron" else None
        memories, active = [], 0
        for level in range(self.levels):
            u, memory, counted, x = bdh_level(
                v, self.encoder, self.encoder_v, self.decoder, cos, sin,
                state=None if state is None else state.memory[level], starts=span.starts, decay=decay,
                passed=self._passed(v), dropout=self.dropout, norm_eps=self.norm_eps, x_before=x,
            )  # fmt: skip
            u = self._norm(u)
            v = self._norm(v + u) if self.residual == "model" else u
            memories.append(memory)
            active = active + counted
        tokens = v.new_full((), B * T, dtype=torch.float32) if span.valid is None else span.valid.sum().float()
        stats = dict(x=active[0], xy=active[1], neurons=tokens * (self.levels * self.H * self.N))
        return v, None if state is None else BDHState(tuple(memories), state.seen + T), stats

    def _norm(self, v: Tensor) -> Tensor:
        return F.layer_norm(v, (self.D,), eps=self.norm_eps)

    def _passed(self, v: Tensor) -> Tensor | None:
        """Which x * y dropout lets through, [B, H, N, T]; None is all."""
        if not (self.training and self.dropout):
            return None
        passed = torch.empty(v.shape[0], self.H, self.N, v.shape[1], dtype=torch.bool, device=v.device)
        return passed.bernoulli_(1 - self.dropout)

    def loss(self, stats: dict[str, Tensor], earlier: dict[str, Tensor] | None = None) -> float:
        """Nothing is added to the loss."""
        return 0.0

    def metrics(self, stats: dict[str, Tensor]) -> dict[str, float]:
        """Of all neurons, the share whose x, and whose x * y, is not 0."""
        return {f"{name}_density": (stats[name] / stats["neurons"]).item() for name in ("x", "xy")}

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Nothing to move."""


def _fades(decay: object) -> bool:
    return isinstance(decay, int | float) and 0 <= decay < math.inf


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
