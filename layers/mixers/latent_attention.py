"""Multi-head latent attention: the keys and values of all heads are made of one short vector per token, which is kept.

    c, r  = norm(W_c x), W_r x                        the latent, and a key that all heads share
    k_h   = [W_kh c, r]     v_h = W_vh c
    q     = W_q x, or W_qb norm(W_qa x)               per head [q_n, q_r]
    y     = W_o softmax([q_n, q_r] k^T / sqrt(N + P)) v

Without positions, or with q_r and r turned by them. Few queries over many kept tokens never make keys of them: q_n k is
(W_k^T q_n) c, and a sum of values is W_v of the same sum of latents.

B batch   T new tokens   S tokens kept   H heads   N own key width   P shared key width   V value width   R latent width
Source: DeepSeek-AI 2024, arXiv 2405.04434, section 2.1; without positions Kimi Team 2025, arXiv 2510.26692.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.causal_attention import causal_attention
from seqzoo.layers.attend import behind, keys_seen
from seqzoo.layers.heads import Heads
from seqzoo.layers.linear import Linear
from seqzoo.layers.norm import RMSNorm
from seqzoo.layers.rope import rotate, turns
from seqzoo.layers.span import Span
from seqzoo.layers.state import append


class LatentAttentionState(NamedTuple):
    """The latents kept so far, in order."""

    latent: Tensor  # [B, sinks + S, R + P], r already turned
    visible: Tensor  # [B, S] bool, False for padding and for documents that have ended


class LatentAttention(nn.Module):
    """Args:
    num_heads: heads.
    key_width, shared_width: channels of a head's key that are its own, and that all heads share (0 is none).
    value_width: channels of a head's value.
    latent_width: of what keys and values are made of.
    query_rank: of what queries are made of; None makes them of x.
    rope_theta: base of the rotary frequencies of the shared channels; None is no positions.
    bias: of the projections down, and of the output's.
    query_bias: of the queries.
    out_bias: of the output's projection; None is as bias.

    Raises:
        ValueError: a size out of its range, or positions for an odd number of channels.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        key_width: int,
        shared_width: int,
        value_width: int,
        latent_width: int,
        query_rank: int | None = None,
        rope_theta: float | None = None,
        bias: bool = False,
        query_bias: bool = False,
        out_bias: bool | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = dict(num_heads=num_heads, key_width=key_width, value_width=value_width, latent_width=latent_width)
        for name, size in (sizes | dict(query_rank=1 if query_rank is None else query_rank)).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"latent_attention: {name}: expected a whole number, at least 1, got {size!r}")
        if not isinstance(shared_width, int) or shared_width < 0:
            raise ValueError(f"latent_attention: shared_width: expected a number of channels, got {shared_width!r}")
        if rope_theta is not None and (shared_width % 2 or not 0 < rope_theta < float("inf")):
            raise ValueError(
                f"latent_attention: rope_theta: expected null for shared_width={shared_width}, or an even width and a "
                f"finite base above 0, got {rope_theta!r}"
            )
        self.H, self.N, self.P, self.V, self.R = num_heads, key_width, shared_width, value_width, latent_width
        self.theta = rope_theta
        self.q_down_proj = self.q_norm = None
        if query_rank is not None:
            self.q_down_proj = Linear(hidden_size, query_rank, bias=bias)
            self.q_norm = RMSNorm(query_rank, norm_eps, zero_centred=False)
        self.q_proj = Linear(query_rank or hidden_size, num_heads * (key_width + shared_width), bias=query_bias)
        self.kv_down_proj = Linear(hidden_size, latent_width + shared_width, bias=bias)
        self.kv_norm = RMSNorm(latent_width, norm_eps, zero_centred=False)
        self.kv_proj = Linear(latent_width, num_heads * (key_width + value_width), bias=False)
        self.out_proj = Linear(num_heads * value_width, hidden_size, bias=bias if out_bias is None else out_bias)

    def heads(self) -> Heads:
        """How it is dealt over processes."""
        return Heads(("num_heads",))

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> LatentAttentionState:
        return LatentAttentionState(
            torch.zeros(batch, 0, self.R + self.P, device=device, dtype=dtype),
            torch.zeros(batch, 0, device=device, dtype=torch.bool),
        )

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence of that many tokens keeps."""
        return tokens * ((self.R + self.P) * dtype.itemsize + 1)

    def sink_bytes(self, dtype: torch.dtype) -> int:
        """What one sequence keeps of each sink."""
        return (self.R + self.P) * dtype.itemsize

    def flops(self, context: int) -> int:
        """Forward, per token, at the mean over a sequence of `context` tokens; a multiply-add is 2."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 2 * matrices + (context + 1) * self.sink_flops() // 2

    def sink_flops(self) -> int:
        """Forward, per sink and token."""
        return 2 * self.H * (self.N + self.P + self.V)

    def forward(
        self, x: Tensor, span: Span | None = None, state: LatentAttentionState | None = None
    ) -> tuple[Tensor, LatentAttentionState | None]:
        """x [B, T, D] -> y [B, T, D] and, if a state came in, the next one.

        Raises:
            ValueError: sinks in the span, and in the state already.
        """
        if span is None:
            span = Span.whole(x, 0 if state is None else state.visible.shape[1])
        B, T = x.shape[:2]
        q, latent = self._queries(x), self._latents(x)
        if self.theta is not None:
            cos, sin = turns(span.positions, self.P, self.theta, q.dtype, None)
            q = torch.cat([q[..., : self.N], rotate(q[..., self.N :], cos, sin)], -1)
            c, r = latent.split([self.R, self.P], -1)
            latent = torch.cat([c, rotate(r[:, :, None], cos, sin)[:, :, 0]], -1)
        if span.both_ways:
            o = self._read(q, latent, None, sinks=T)
        else:
            sinks = 0 if state is None else state.latent.shape[1] - state.visible.shape[1]
            ahead = latent[:, :0] if state is None else state.latent
            if span.sinks is not None:
                if sinks:
                    raise ValueError(f"latent_attention: span.sinks: expected None, the state has {sinks} sinks")
                sinks = span.sinks.shape[0]
                ahead = torch.cat([self._latents(span.sinks[None]).expand(B, -1, -1), ahead], 1)
            if state is None:
                document = None if span.borders is None else span.borders.cumsum(1)
                latent = torch.cat([ahead, latent], 1) if sinks else latent
            else:
                document, visible = keys_seen(state.visible, state.visible.new_ones(B, T), span)
                latent = append(ahead, latent, dim=1)
                state = LatentAttentionState(latent, visible)
            o = self._read(q, latent, behind(sinks, document), sinks=sinks)
        return self.out_proj(o.flatten(-2)), state

    def _queries(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, H, N + P]."""
        x = x if self.q_down_proj is None else self.q_norm(self.q_down_proj(x))
        return self.q_proj(x).unflatten(-1, (self.H, -1))

    def _latents(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, R + P], not turned."""
        c, r = self.kv_down_proj(x).split([self.R, self.P], -1)
        return torch.cat([self.kv_norm(c), r], -1)

    def _read(self, q: Tensor, latent: Tensor, document: Tensor | None, *, sinks: int) -> Tensor:
        """q [B, T, H, N + P], latent [B, S, R + P] -> what they read [B, T, H, V]."""
        how, S = dict(key_document=document, sinks=sinks), latent.shape[1]
        q, latent = q.transpose(1, 2), latent[:, None]  # [B, H, T, N + P], [B, 1, S, R + P]
        if self._is_few(q.shape[2], S):
            w_k, w_v = self.kv_proj.weight.unflatten(0, (self.H, -1)).split([self.N, self.V], 1)  # [H, N or V, R]
            asked = torch.cat([q[..., : self.N] @ w_k, q[..., self.N :]], -1)
            scale = (self.N + self.P) ** -0.5 / (self.R + self.P) ** -0.5  # the op divides by the root of the width
            o = causal_attention(asked * scale, latent, latent[..., : self.R], **how)
            return (o @ w_v.mT).transpose(1, 2)
        k, v = self.kv_proj(latent[:, 0, :, : self.R]).unflatten(-1, (self.H, -1)).split([self.N, self.V], -1)
        k = torch.cat([k.transpose(1, 2), latent[..., self.R :].expand(-1, self.H, -1, -1)], -1)
        return causal_attention(q, k, v.transpose(1, 2), **how).transpose(1, 2)

    def _is_few(self, T: int, S: int) -> bool:
        """Whether reading T queries' latents takes fewer products than making S tokens' keys and values.

        Not where weights are spiked or whole numbers: what is then multiplied is no matrix to be moved elsewhere.
        """
        if type(self.kv_proj) is not Linear:
            return False
        longer = T * S * (2 * self.R - self.N - self.V)  # products with latents, which are wider than keys
        return longer < (S - T) * self.R * (self.N + self.V)
