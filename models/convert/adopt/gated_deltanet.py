"""Gated DeltaNet from attention: q, k, v and the output's projection stay, every query head with keys of its own.

The convolution begins as the token itself, times the weights of the norms of q and k where there are any (the delta
rule norms them anyway). New are decays, step sizes and the output's gate and norm.
"""

import torch
from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import as_it_is, norm_weight, one_way, options, out_bias, refuse, repeat_heads
from seqzoo.models.convert.plain import Table
from seqzoo.models.convert.rules import COPY


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: attention with an output gate."""
    refuse("gated_deltanet", attention, "output_gate")
    derived = sizes(attention) | dict(bias=attention["bias"], out_bias=out_bias(attention))
    return options("gated_deltanet", wanted, derived)


def sizes(attention: Spec) -> Spec:
    H, K = attention["num_heads"], attention["head_width"]
    return dict(num_key_heads=H, num_value_heads=H, key_width=K, value_width=K, norm_eps=attention["norm_eps"])


def rows(attention: Spec, spec: Spec) -> Table:
    def join(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (torch.cat([q, repeat_heads(k, attention), repeat_heads(v, attention)]),)

    table: Table = [
        (tuple(f"{x}_proj.{what}" for x in "qkv"), f"qkv_proj.{what}", one_way("fused", join))
        for what in (("weight", "bias") if attention["bias"] else ("weight",))
    ]
    table += [(f"out_proj.{what}", f"out_proj.{what}", COPY) for what in ("weight", *(["bias"] * out_bias(attention)))]
    if attention["qk_norm"] is not None:
        table.append((("q_norm.weight", "k_norm.weight"), "conv.weight", one_way("fused", _conv(attention, spec))))
    return table


def fresh(spec: Spec) -> dict[str, Tensor]:
    channels = 2 * spec["num_key_heads"] * spec["key_width"] + spec["num_value_heads"] * spec["value_width"]
    return {"conv.weight": as_it_is(channels, spec["conv_width"])}


def _conv(attention: Spec, spec: Spec):
    H, K = attention["num_heads"], attention["head_width"]

    def there(q: Tensor, k: Tensor) -> tuple[Tensor]:
        q, k = (norm_weight(x, attention) for x in (q, k))
        q = q if q.numel() == H * K else q.repeat(H)
        k = k.repeat(H) if k.numel() == K else repeat_heads(k, attention)
        return (as_it_is(3 * H * K, spec["conv_width"], torch.cat([q, k, torch.ones_like(q)])),)

    return there
