"""Momentum attention: queries and keys are pushed on along their last change, so that one layer sees what came before.

    q, k, v = W_q x, W_k x, W_v x             normed per head if `qk_norm`, turned by their positions as in attention
    q^_t    = q_t + gamma (q_t - q_{t-1})     the shear: keys alike, values as they are
    y       = W_o [ softmax(q^ k^^T / sqrt K) v * sigmoid(W_g x) ]

A filter of two taps, (1 + gamma) q_t - gamma q_{t-1}, whose gain at w radians per token is

    |H(w)|^2 = 1 + 2 gamma (1 + gamma) (1 - cos w)

1 at rest and 1 + 2 gamma at its fastest: high frequencies are raised for gamma > 0, lowered for -1 < gamma < 0.

Source: Maitra 2026, arXiv 2602.04902: the shear of q and k, and gamma = 4.17 N^-0.74 over N layers. Open there, and
chosen here: gamma may be learned (one per key head, which its query heads share); the shear comes after the turn
("post", where the difference is of turned vectors; "pre": before it); a first token has no momentum ("zero_momentum";
with "zero_input" zeros stand before it, and it is 1 + gamma times as long). One key that carries its predecessor is
enough for induction, and with queries sheared too the token before the query's ties with the one sought: "k_only".
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels import across
from seqzoo.layers.attend import Kept, SoftmaxHeads, seen_by
from seqzoo.layers.schema import check_types
from seqzoo.layers.span import Span

SHEARS = {"qk": (True, True), "q_only": (True, False), "k_only": (False, True)}  # queries, keys


class MomentumAttentionState(NamedTuple):
    kept: Kept  # the keys after the shear
    q: Tensor  # [B, H, K] the last token's query before the shear, turned if that comes first; no heads if not sheared
    k: Tensor  # [B, G, K] its key, in the same way
    begun: Tensor  # [B] bool, False as long as no token but padding has come


class MomentumAttention(SoftmaxHeads):
    """Args:
    gamma: the shear's strength, in steps of a token.
    law_depth: in its place, the layers of the model: gamma is 4.17 law_depth^-0.74.
    learned: gamma is where a parameter per key head begins, of any sign later.
    allow_negative: gamma may be below 0, which lowers high frequencies.
    shear: qk, k_only or q_only.
    placement: of the shear: post or pre, after or before the rotary turn.
    first: a document's first token has zero_momentum, or zero_input before it.
    temperature: logits are divided by what uncorrelated neighbours make them grow by, (1 + gamma)^2 + gamma^2, or its
        root where only queries or only keys are sheared: to tell the shear from a lower temperature.

    The others are `SoftmaxHeads`'. Sinks, which stand in no order, are not sheared.

    Raises:
        ValueError: not one of gamma and law_depth, a gamma below 0 that is not allowed, an unknown name, or sizes that
            do not fit each other.
    """

    kind = "momentum_attention"

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        gamma: float | None = None,
        law_depth: int | None = None,
        learned: bool = False,
        allow_negative: bool = False,
        shear: str = "qk",
        placement: str = "post",
        first: str = "zero_momentum",
        temperature: bool = False,
        window: int | None = None,
        rope_theta: float = 10_000.0,
        rope_scaling: dict | None = None,
        rotary_width: int | None = None,
        qk_norm: str | None = None,
        output_gate: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        check_types(self.kind, MomentumAttention, locals())
        super().__init__(
            hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_width=head_width, window=window,
            rope_theta=rope_theta, rope_scaling=rope_scaling, rotary_width=rotary_width, qk_norm=qk_norm,
            output_gate=output_gate, bias=bias, out_bias=out_bias, norm_eps=norm_eps,
        )  # fmt: skip
        for name, value, known in (
            ("shear", shear, [*SHEARS]),
            ("placement", placement, ["post", "pre"]),
            ("first", first, ["zero_momentum", "zero_input"]),
        ):
            if value not in known:
                raise ValueError(f"momentum_attention: {name}: expected one of {known}, got {value!r}")
        self.start = _strength(gamma, law_depth, allow_negative)
        self.shears, self.placement, self.first, self.temperature = SHEARS[shear], placement, first, temperature
        self.gamma = nn.Parameter(torch.empty(num_kv_heads)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Own parameters only; `nn.init.*` only, so a checkpoint just loaded is never overwritten."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.start)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> MomentumAttentionState:
        q, k = (torch.zeros(batch, heads, self.K, device=device, dtype=dtype) for heads in self._sheared())
        begun = torch.zeros(batch, device=device, dtype=torch.bool)
        return MomentumAttentionState(self.init_kept(batch, device=device, dtype=dtype), q, k, begun)

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence of that many tokens keeps."""
        return self.kept_bytes(tokens, dtype) + sum(self._sheared()) * self.K * dtype.itemsize + 1

    def forward(
        self, x: Tensor, span: Span | None = None, state: MomentumAttentionState | None = None
    ) -> tuple[Tensor, MomentumAttentionState | None]:
        """x [B, T, D] -> y [B, T, D] and, if a state came in, the next one."""
        span = Span.whole(x, 0 if state is None else seen_by(state.kept)) if span is None else span
        q, (k, v) = self.queries(x), self.keys(x)
        if self.placement == "post":
            q, k = self.turn(q, k, span)
        plain = q, k
        if not span.both_ways:
            q, k = self._shear(q, k, span, state)
        if self.placement == "pre":
            q, k = self.turn(q, k, span)
        o, kept = self.look(q, k, v, span, None if state is None else state.kept)
        y = self.out(o, x)
        if state is None:
            return y, None
        last = [part[:, -1, :heads] for part, heads in zip(plain, self._sheared(), strict=True)]
        if x.shape[1] > 1:  # not a view, which would hold all the others
            last = [part.clone() for part in last]
        begun = torch.ones_like(state.begun) if span.valid is None else span.valid[:, -1]
        return y, MomentumAttentionState(kept, *last, begun)

    def _sheared(self) -> tuple[int, int]:
        """Heads of queries and of keys that are sheared."""
        return self.H * self.shears[0], self.G * self.shears[1]

    def _shear(self, q: Tensor, k: Tensor, span: Span, state: MomentumAttentionState | None) -> tuple[Tensor, Tensor]:
        if self.gamma is None:
            gammas = self.start, self.start
        else:
            gamma = self.gamma.to(q.dtype)[:, None]
            gammas = gamma.repeat_interleave(self.H // self.G, dim=0), gamma
        past, begun = ((None, None), None) if state is None else ((state.q, state.k), state.begun)
        if (split := across.ranks()) is not None:  # the last token of the rank before stands before the first one here
            past = [across.from_before(x[:, -1]) for x in (q, k)]
            begun = torch.full((q.shape[0],), split.rank > 0, device=q.device)
        q, k = (
            shear(x, gamma, last=last, begun=begun, borders=span.borders, first=self.first) if wanted else x
            for x, gamma, last, wanted in zip((q, k), gammas, past, self.shears, strict=True)
        )
        if self.temperature:
            growth = (1 + gammas[0]) ** 2 + gammas[0] ** 2
            q = q * growth ** (-0.5 * sum(self.shears))
        return q, k


def shear(
    x: Tensor,
    gamma: float | Tensor,
    *,
    last: Tensor | None = None,
    begun: Tensor | None = None,
    borders: Tensor | None = None,
    first: str = "zero_momentum",
) -> Tensor:
    """x_t + gamma (x_t - x_{t-1}) [B, T, heads, K].

    Args:
        gamma: a number, or one per head [heads, 1].
        last, begun: [B, heads, K] what stands before x, where there is anything: [B] bool. None is nothing.
        borders: [B, T] bool, tokens that have nothing before them.
        first: what those have that begin: zero_momentum (x itself comes out), or zero_input (1 + gamma times x).
    """
    alone = x if first == "zero_momentum" else torch.zeros_like(x)  # as what stands before a token that begins
    before = alone[:, :1]
    if last is not None:
        before = torch.where(begun[:, None, None, None], last[:, None], before)
    if x.shape[1] > 1:
        before = torch.cat([before, x[:, :-1]], dim=1)
    if borders is not None:
        before = torch.where(borders[..., None, None], alone, before)
    if isinstance(gamma, Tensor):
        return torch.addcmul(x, x - before, gamma)
    return torch.add(x, x - before, alpha=gamma)


def _strength(gamma: float | None, law_depth: int | None, allow_negative: bool) -> float:
    if (gamma is None) == (law_depth is None):
        raise ValueError(
            f"momentum_attention: expected one of gamma and law_depth, got gamma={gamma}, law_depth={law_depth}"
        )
    if law_depth is not None and law_depth < 1:
        raise ValueError(f"momentum_attention: law_depth: expected 1 layer or more, got {law_depth}")
    strength = float(gamma) if law_depth is None else 4.17 * law_depth**-0.74
    if not math.isfinite(strength):
        raise ValueError(f"momentum_attention: gamma: expected a finite number, got {gamma}")
    if strength < 0 and not allow_negative:
        raise ValueError(f"momentum_attention: gamma: expected 0 or more, or allow_negative, got {gamma}")
    return strength
