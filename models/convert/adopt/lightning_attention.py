"""Lightning attention from attention: q, k, v and the output's projection stay, every query head with keys and values
of its own; turns are left out, and norms of q and k become part of the projections. New are the output's gate and norm.
"""

from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import biased, one_way, options, out_bias, projected, refuse, repeat_heads
from seqzoo.models.convert.plain import Table
from seqzoo.models.convert.rules import COPY


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: attention with an output gate."""
    refuse("lightning_attention", attention, "output_gate")
    sizes = dict(num_heads=attention["num_heads"], head_width=attention["head_width"], norm_eps=attention["norm_eps"])
    return options("lightning_attention", wanted, sizes | dict(bias=attention["bias"], out_bias=out_bias(attention)))


def rows(attention: Spec, spec: Spec) -> Table:
    table: Table = [(f"out_proj.{what}", f"out_proj.{what}", COPY) for what in biased(spec["out_bias"])]
    for x in "qkv":
        each = (lambda w: w) if x == "q" else (lambda w: repeat_heads(w, attention))
        for what in biased(spec["bias"]):
            names, read = projected(x, what, attention)

            def there(*given: Tensor, each=each, read=read) -> tuple[Tensor]:
                return (each(read(*given)),)

            table.append((names, f"{x}_proj.{what}", one_way("repeated", there)))
    return table
