"""Attention from attention: all as it was, with a window, without one, or with an output gate. Exact for what fits the
window: a new gate begins at 1/2 for every token, and the output's projection twice as large.
"""

import torch

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.adopt import copied, one_way
from seqzoo.models.convert.plain import Table


def complete(attention: Spec, wanted: Spec) -> Spec:
    """Raises ValueError: other options than a window, the turns and a gate; a gate to be taken away."""
    allowed = {"kind", "window", "rope_theta", "rope_scaling", "output_gate"}
    if not set(wanted) <= allowed:
        raise ValueError(f"attention: expected options of {sorted(allowed)}, got {sorted(set(wanted) - allowed)}")
    if attention["output_gate"] and not wanted.get("output_gate", True):
        raise ValueError("attention: expected its output gate to stay, got output_gate: false")
    return {**attention, **wanted}


def rows(attention: Spec, spec: Spec) -> Table:
    if spec["output_gate"] == attention["output_gate"]:
        return copied(attention)
    begun = one_way("doubled", lambda x: (2 * x,))
    gated = one_way("gated", lambda q: (q, torch.zeros_like(q)))
    table: Table = [("out_proj.weight", "out_proj.weight", begun)]
    for name, same, how in copied(attention):
        if name.startswith("q_proj."):
            table.append((name, (name, name.replace("q_proj", "gate_proj")), gated))
        elif name != "out_proj.weight":
            table.append((name, same, how))
    return table
