"""What the softmax mixers share: projections into heads, and attention to kept keys, in windows and documents.

B batch   T new tokens   S tokens kept   N sinks, in front of them   W window
H query heads   G key heads   K head width
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.causal_attention import causal_attention
from seqzoo.layers.heads import Heads
from seqzoo.layers.linear import Linear
from seqzoo.layers.norm import RMSNorm, check_eps
from seqzoo.layers.rope import Scaling, check_scaling, rotate, turns
from seqzoo.layers.span import Span
from seqzoo.layers.state import append


class AttentionState(NamedTuple):
    """The keys kept so far, in order."""

    k: Tensor  # [B, G, N + S, K] already turned
    v: Tensor  # [B, G, N + S, K]
    visible: Tensor  # [B, S] bool, False for padding and for documents that have ended


class WindowState(NamedTuple):
    """The last W keys, in a ring."""

    k: Tensor  # [B, G, N + W, K] already turned
    v: Tensor  # [B, G, N + W, K]
    visible: Tensor  # [B, W] bool, False for slots not yet used, padding, and documents that have ended
    slot: Tensor  # [B] int64, where the next token is written: the oldest slot
    seen: Tensor  # [B] int64, how many tokens came so far


Kept = AttentionState | WindowState
QK_NORMS = {"zero_centred": True, "rms": False, "rms_joint": False}  # name -> whether its weight is zero-centred


class SoftmaxHeads(nn.Module):
    """Everything of a softmax mixer but its forward: a mixer's own signature spells out the arguments.

    Args:
        num_heads, num_kv_heads: query heads, and key and value heads, which divide them.
        head_width: channels per head.
        window: [tokens] a token sees itself and window - 1 before it; None is everything.
        rope_theta: base of the rotary frequencies.
        rope_scaling: what stretches them beyond the length they were trained for, as `layers/rope.py` has it.
        rotary_width: channels per head that are turned, the first ones; None is all, 0 is none (no positions).
        qk_norm: of queries and keys: zero_centred or rms, each head by itself, or rms_joint, all heads as one; None is
            none.
        output_gate: the heads' outputs are multiplied by a sigmoid of the input, per channel.
        bias: the projections of the input have one.
        out_bias: the projection of the output has one; None is as `bias`.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    kind: str  # the mixer's name, for messages

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        window: int | None,
        rope_theta: float,
        rope_scaling: Scaling | None,
        rotary_width: int | None,
        qk_norm: str | None,
        output_gate: bool,
        bias: bool,
        out_bias: bool | None,
        norm_eps: float,
    ) -> None:
        super().__init__()
        rotary_width = head_width if rotary_width is None else rotary_width
        for name, size in dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_width=head_width).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{self.kind}: {name}={size} is not 1 or more, and whole")
        if num_heads % num_kv_heads:
            raise ValueError(f"{self.kind}: num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}")
        if rotary_width % 2 or not 0 <= rotary_width <= head_width:
            raise ValueError(f"{self.kind}: rotary_width={rotary_width} is not an even number from 0 to {head_width}")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"{self.kind}: window={window} is not a number of tokens, 1 or more")
        if not 0 < rope_theta < float("inf"):
            raise ValueError(f"{self.kind}: rope_theta={rope_theta} is not above 0 and finite")
        check_eps(norm_eps)
        check_scaling(self.kind, rope_scaling)
        if qk_norm not in (None, *QK_NORMS):
            raise ValueError(f"{self.kind}: qk_norm: expected one of {[*QK_NORMS]} or null, got {qk_norm!r}")
        self.H, self.G, self.K, self.window = num_heads, num_kv_heads, head_width, window
        self.theta, self.scaling, self.rotary_width = rope_theta, rope_scaling, rotary_width
        self.q_proj = Linear(hidden_size, num_heads * head_width, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_width, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_width, bias=bias)
        self.gate_proj = Linear(hidden_size, num_heads * head_width, bias=bias) if output_gate else None
        self.out_proj = Linear(num_heads * head_width, hidden_size, bias=bias if out_bias is None else out_bias)
        self.norms_jointly = qk_norm == "rms_joint"
        norm = lambda heads: nn.Identity() if qk_norm is None else RMSNorm(
            head_width * (heads if self.norms_jointly else 1), norm_eps, zero_centred=QK_NORMS[qk_norm]
        )  # fmt: skip
        self.q_norm, self.k_norm = norm(num_heads), norm(num_kv_heads)

    def heads(self) -> Heads | None:
        """How it is dealt over processes."""
        return None if self.norms_jointly else Heads(("num_heads", "num_kv_heads"))

    def init_kept(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Kept:
        S = self.window or 0
        k = torch.zeros(batch, self.G, S, self.K, device=device, dtype=dtype)
        visible = torch.zeros(batch, S, device=device, dtype=torch.bool)
        if self.window is None:
            return AttentionState(k, k.clone(), visible)
        none = torch.zeros(batch, device=device, dtype=torch.int64)
        return WindowState(k, k.clone(), visible, none, none.clone())

    def kept_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Of the keys of one sequence of that many tokens, the sinks apart."""
        kept = tokens if self.window is None else self.window
        return kept * (2 * self.G * self.K * dtype.itemsize + 1) + (0 if self.window is None else 16)

    def flops(self, context: int) -> int:
        """Forward, per token, at the mean over a sequence of `context` tokens; a multiply-add is 2."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        full = min(context, self.window or context)  # the first so many tokens see 1, 2, 3 ... tokens, the rest all
        seen = full - full * (full - 1) / (2 * context)
        return int(2 * matrices + 4 * seen * self.H * self.K)

    def sink_bytes(self, dtype: torch.dtype) -> int:
        """What one sequence keeps of each sink."""
        return 2 * self.G * self.K * dtype.itemsize

    def sink_flops(self) -> int:
        """Forward, per sink and token."""
        return 4 * self.H * self.K

    def queries(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> q [B, T, H, K], normed."""
        return self._normed(self.q_norm, self.q_proj(x))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] -> k and v [B, T, G, K], k normed."""
        return self._normed(self.k_norm, self.k_proj(x)), self.v_proj(x).unflatten(-1, (-1, self.K))

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """x [B, T, heads K] -> [B, T, heads, K]."""
        heads = (-1, self.K)
        return norm(x).unflatten(-1, heads) if self.norms_jointly else norm(x.unflatten(-1, heads))

    def turn(self, q: Tensor, k: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """q, k [B, T, heads, K] turned by their positions."""
        if not self.rotary_width:
            return q, k
        cos, sin = turns(span.positions, self.rotary_width, self.theta, q.dtype, self.scaling)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def look(self, q: Tensor, k: Tensor, v: Tensor, span: Span, past: Kept | None) -> tuple[Tensor, Kept | None]:
        """q, k, v [B, T, heads, K] -> what the queries read [B, T, H, K], and the keys to keep.

        Raises:
            ValueError: sinks in the span, and in the past already.
        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if span.both_ways:
            return causal_attention(q, k, v, sinks=q.shape[2]).transpose(1, 2), None
        if span.sinks is not None:
            ahead = [x.transpose(1, 2).expand(q.shape[0], -1, -1, -1) for x in self.keys(span.sinks[None])]
            if past is None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(ahead, (k, v), strict=True))
            elif _sinks_of(past):
                raise ValueError(f"{self.kind}: span.sinks: expected None, the state has {_sinks_of(past)} sinks")
            else:
                past = past._replace(k=torch.cat([ahead[0], past.k], 2), v=torch.cat([ahead[1], past.v], 2))
        if past is None:
            borders, sinks = span.borders, k.shape[2] - q.shape[2]
            document = None if borders is None else behind(sinks, borders.cumsum(1))
            o, kept = causal_attention(q, k, v, window=self.window, key_document=document, sinks=sinks), None
        elif isinstance(past, AttentionState):
            o, kept = _keep_all(q, k, v, span, past)
        else:
            o, kept = _keep_window(q, k, v, span, past)
        return o.transpose(1, 2), kept

    def out(self, o: Tensor, x: Tensor) -> Tensor:
        """What was read [B, T, H, K], gated by x [B, T, D] -> y [B, T, D]."""
        o = o.flatten(-2)
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.out_proj(o)


def seen_by(past: Kept) -> int | Tensor:
    """Tokens before this call, where no span says more: a number, or [B, 1]."""
    return past.visible.shape[1] if isinstance(past, AttentionState) else past.seen[:, None]


def _sinks_of(past: Kept) -> int:
    return past.k.shape[2] - past.visible.shape[1]


def behind(sinks: int, document: Tensor | None) -> Tensor | None:
    """Documents of keys [B, S] as those of sinks and keys [B, N + S]."""
    return F.pad(document, (sinks, 0)) if sinks and document is not None else document


def keys_seen(visible: Tensor, new: Tensor, span: Span) -> tuple[Tensor | None, Tensor]:
    """What T new tokens see of the S keys kept in order and of their own.

    Args:
        visible: [B, S] bool, of the kept keys.
        new: [B, T] True, the tokens that have come.

    Returns:
        key_document int64 [B, S + T] for `causal_attention` (None: all there are), and [B, S + T] bool: what the next
        call may see.
    """
    if span.borders is None and span.valid is None:
        key = None if _all_on_cpu(visible) else _documents(visible, new.shape[1], None)[1]
        return key, append(visible, new, dim=1)
    query, key = _documents(visible, new.shape[1], span.borders)
    return key, _visible(query, key, span.valid)


def _keep_all(q: Tensor, k: Tensor, v: Tensor, span: Span, past: AttentionState) -> tuple[Tensor, AttentionState]:
    sinks = _sinks_of(past)
    kept_k, kept_v = append(past.k, k, dim=2), append(past.v, v, dim=2)
    key, visible = keys_seen(past.visible, past.visible.new_ones(k.shape[0], k.shape[2]), span)
    o = causal_attention(q, kept_k, kept_v, key_document=behind(sinks, key), sinks=sinks)
    return o, AttentionState(kept_k, kept_v, visible)


def _keep_window(q: Tensor, k: Tensor, v: Tensor, span: Span, past: WindowState) -> tuple[Tensor, WindowState]:
    borders, T, G, W, sinks = span.borders, q.shape[2], k.shape[1], past.visible.shape[1], _sinks_of(past)
    if T == 1 and borders is None and span.valid is None:
        at = past.slot[:, None]
        here = (sinks + at)[:, None, :, None].expand(-1, G, 1, k.shape[-1])
        # under autocast the new ones may be of another dtype
        kept_k, kept_v = (old.scatter(2, here, new.to(old.dtype)) for old, new in ((past.k, k), (past.v, v)))
        visible = past.visible.scatter(1, at, True)
        now = visible.new_zeros(visible.shape[0], 1, dtype=torch.int64)
        key = behind(sinks, visible.long() - 1)
        o = causal_attention(q, kept_k, kept_v, query_document=now, key_document=key, sinks=sinks)
        return o, WindowState(kept_k, kept_v, visible, (past.slot + 1) % W, past.seen + 1)
    order = (past.slot[:, None] + torch.arange(W, device=q.device)) % W  # [B, W] oldest first
    seen = past.visible.gather(1, order)
    order = sinks + order
    if sinks:
        order = torch.cat([torch.arange(sinks, device=q.device).expand(order.shape[0], -1), order], 1)
    order = order[:, None, :, None].expand(-1, G, -1, k.shape[-1])
    all_k, all_v = torch.cat([past.k.gather(2, order), k], 2), torch.cat([past.v.gather(2, order), v], 2)
    query, key = _documents(seen, T, borders)
    key_document = behind(sinks, key)
    o = causal_attention(q, all_k, all_v, query_document=query, key_document=key_document, window=W, sinks=sinks)
    visible = _visible(query, key, span.valid)[:, T:]
    kept_k, kept_v = (torch.cat([x[:, :, :sinks], x[:, :, sinks + T :]], 2) for x in (all_k, all_v))
    return o, WindowState(kept_k, kept_v, visible, 0 * past.slot, past.seen + T)


def _all_on_cpu(visible: Tensor) -> bool:
    """Whether every kept key may be seen, so that nothing is masked. Not asked: a GPU, which would have to wait, and
    torch.compile, which would have to stop."""
    return visible.device.type == "cpu" and not torch.compiler.is_compiling() and bool(visible.all())


def _documents(visible: Tensor, T: int, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers of the documents that T new tokens [B, T] and all keys [B, S + T] belong to; -1 is seen by nobody."""
    query = visible.new_zeros(visible.shape[0], T, dtype=torch.int64) if borders is None else borders.cumsum(1)
    return query, torch.cat([visible.long() - 1, query], dim=1)


def _visible(query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
    """[B, S + T] bool: what the next call may see, the tokens of the last document that are no padding."""
    visible = key == query[:, -1:]
    if valid is not None:
        visible = visible & F.pad(valid, (visible.shape[1] - valid.shape[1], 0), value=True)
    return visible
