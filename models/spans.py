"""From transformers' ways to say where tokens stand (mask, position ids, cumulative lengths) to a Span."""

import torch
from torch import Tensor

from seqzoo.kernels.across import ranks
from seqzoo.layers.span import Span


def span_of(
    B: int,
    T: int,
    *,
    seen: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int | None,
) -> Span:
    """The span of T new tokens in B sequences that have `seen` tokens each behind them. Arguments: `SeqZooForCausalLM`.

    Raises:
        ValueError: shapes that do not fit, padding elsewhere than on the left, a sequence longer than `longest`.
    """
    valid, masked = None, False
    if attention_mask is not None:
        valid, masked = _valid(attention_mask, B, T, seen)
    if cu_seqlens is not None:
        span = _packed(cu_seqlens, B, T, seen, device)
    elif position_ids is not None:
        span = _from_positions(position_ids, B, T, seen, valid)
    elif masked:
        span = Span((attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:])
    else:
        span = Span(torch.arange(seen, seen + T, device=device).expand(B, T))
    _check_range(span.positions, longest, given=position_ids is not None, reach=seen + T)
    return span if valid is None else span._replace(valid=valid)


def _check_range(positions: Tensor, longest: int | None, *, given: bool, reach: int) -> None:
    """Given positions are looked at on a CPU; counted ones, and a GPU's, only where they could go too far."""
    if (longest is None or reach <= longest) and not (given and positions.device.type == "cpu" and positions.numel()):
        return
    low, high = (int(x) for x in positions.aminmax())
    if low < 0:
        raise ValueError(f"position_ids: expected 0 or more, got {low}")
    if longest is not None and high >= longest:
        raise ValueError(f"sequence of {high + 1} tokens: max_position_embeddings is {longest}")


def _valid(mask: Tensor, B: int, T: int, seen: int) -> tuple[Tensor | None, bool]:
    """[B, T] bool of the new tokens, None where none of them is padding; and whether anything is, or may be."""
    if mask.shape != (B, seen + T):
        raise ValueError(f"attention_mask: expected [{B}, {seen + T}], got {list(mask.shape)}")
    if mask.device.type == "cpu":  # on a GPU a look would wait for all that is under way
        if (mask[:, 1:] < mask[:, :-1]).any():
            raise ValueError("attention_mask: padding must stand on the left (padding_side='left')")
        if mask[:, -T:].all():
            return None, not mask.all()
    return mask[:, -T:].bool(), True


def _packed(cu_seqlens: Tensor, B: int, T: int, seen: int, device: torch.device) -> Span:
    if B != 1 or seen:
        raise ValueError(f"cu_seq_lens_q: expected one row without a past, got {B} rows with {seen} tokens behind them")
    first = cu_seqlens[:-1].to(device).long()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != T or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seq_lens_q: expected to rise from 0 to {T}, got {cu_seqlens.tolist()}")
    first = first[cu_seqlens.diff().to(device) > 0]
    starts = torch.zeros(1, T, dtype=torch.bool, device=device)
    starts[:, first] = True
    place = torch.arange(T, device=device)
    return Span((place - first[starts[0].cumsum(0) - 1])[None], starts=starts)


def _from_positions(positions: Tensor, B: int, T: int, seen: int, valid: Tensor | None) -> Span:
    """A document starts where the positions do not go on by one; a first token goes on from the past, or from the rank
    before where the sequence is split, unless it is 0."""
    if positions.ndim != 2 or positions.shape[0] not in (1, B) or positions.shape[1] != T:
        raise ValueError(f"position_ids: expected [{B}, {T}], got {list(positions.shape)}")
    positions = positions.expand(B, T)
    starts = torch.zeros(B, T, dtype=torch.bool, device=positions.device)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if seen or ranks() is not None:
        starts[:, 0] = positions[:, 0] == 0
    if valid is not None:  # padding has positions too, which mean nothing
        starts &= valid
    return Span(positions, starts=starts if bool(starts.any()) else None)
