"""Kimi Delta Attention from attention: as `gated_deltanet`, with a decay per key channel."""

from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import as_it_is, options, out_bias, refuse
from seqzoo.models.convert.adopt.gated_deltanet import rows  # noqa: F401


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: attention with an output gate."""
    refuse("kimi_delta_attention", attention, "output_gate")
    K = attention["head_width"]
    sizes = dict(num_heads=attention["num_heads"], key_width=K, value_width=K, norm_eps=attention["norm_eps"])
    return options("kimi_delta_attention", wanted, sizes | dict(bias=attention["bias"], out_bias=out_bias(attention)))


def fresh(spec: Spec) -> dict[str, Tensor]:
    channels = spec["num_heads"] * (2 * spec["key_width"] + spec["value_width"])
    return {"conv.weight": as_it_is(channels, spec["conv_width"])}
