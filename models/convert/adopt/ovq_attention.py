"""OVQ attention from attention: the same projections; the weights of norms of q and k are multiplied into them, for
here q and k are of unit length and what a norm of one head divides by does not matter. Turns are left out."""

from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import norm_weight, one_way, options, out_bias, refuse
from seqzoo.models.convert.plain import Table, attention_names
from seqzoo.models.convert.rules import COPY


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: heads that are normed as one, or an output gate."""
    refuse("ovq_attention", attention, "output_gate")
    if attention["qk_norm"] == "rms_joint":
        raise ValueError("ovq_attention: expected attention whose heads are normed one by one, got qk_norm='rms_joint'")
    derived = dict(
        num_heads=attention["num_heads"], num_kv_heads=attention["num_kv_heads"],
        head_width=attention["head_width"], bias=attention["bias"] or out_bias(attention),
    )  # fmt: skip
    return options("ovq_attention", wanted, derived)


def rows(attention: Spec, spec: Spec) -> Table:
    def scaled(x: Tensor, norm: Tensor) -> tuple[Tensor]:
        weight = norm_weight(norm, attention).repeat(x.shape[0] // norm.numel())
        return (x * (weight[:, None] if x.ndim == 2 else weight),)

    normed = () if attention["qk_norm"] is None else ("q_proj", "k_proj")
    table: Table = []
    for name in attention_names(attention):
        part = name.partition(".")[0]
        if part in normed:
            table.append(((name, f"{part[0]}_norm.weight"), name, one_way("fused", scaled)))
        elif not part.endswith("_norm"):
            table.append((name, name, COPY))
    return table
