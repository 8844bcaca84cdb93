"""Linear attention from attention, as SpikingBrain has it: all projections and norms of q and k stay, heads in the same
groups; turns are left out. New are the decay's two small matrices and the norm of the output (arXiv 2509.05276)."""

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import copied, options, out_bias, refuse
from seqzoo.models.convert.plain import Table


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: attention with an output gate."""
    refuse("linear_attention", attention, "output_gate")
    width = attention["head_width"]
    derived = dict(
        num_heads=attention["num_heads"], num_kv_heads=attention["num_kv_heads"], key_width=width, value_width=width,
        bias=attention["bias"], out_bias=out_bias(attention), qk_norm=attention["qk_norm"],
    )  # fmt: skip
    return options("linear_attention", wanted, derived) | dict(norm_eps=attention["norm_eps"])


def rows(attention: Spec, spec: Spec) -> Table:
    return copied(attention)
