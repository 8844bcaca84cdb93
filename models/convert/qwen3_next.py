"""Qwen3-Next: the rows and the config, both ways.

The module of multi-token prediction (tensors mtp.*) is ours where config.json says num_nextn_predict_layers, as engines
that decode with it name it; the released config does not, and then its tensors are kept for the way back.

Their fused projections lie key head by key head: in_proj_qkvz [q | k | v | z] and in_proj_ba [b | a] in each of them.
Source: the released Qwen3-Next-80B-A3B and transformers' Qwen3NextForCausalLM.
"""

from typing import Any

from transformers import Qwen3NextConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.plain import Table, is_sparse
from seqzoo.models.convert.qwen3_hybrid import Hybrid
from seqzoo.models.convert.rules import deal

KEPT = r"mtp\..*|.*\.rotary_emb\.inv_freq"  # theirs, where ours has no room for them; transformers loads neither


def _delta_rows(spec: Spec) -> Table:
    H, K = spec["num_key_heads"], spec["key_width"]
    share = spec["num_value_heads"] // H  # value heads of a key head
    sizes = (K, K, share * spec["value_width"], share * spec["value_width"])
    q_k_v_and_z = ("mixer.qkv_proj.weight", "mixer.gate_proj.weight")
    return [
        ("linear_attn.in_proj_qkvz.weight", q_k_v_and_z, deal(H, sizes, hands=(3, 1))),
        ("linear_attn.in_proj_ba.weight", "mixer.ba_proj.weight", deal(H, (share, share), hands=(2,))),
    ]


def _of_sparse(sparse: list[bool]) -> dict[str, Any]:
    if not any(sparse):
        return dict(num_experts=0, mlp_only_layers=[])
    return dict(mlp_only_layers=[i for i, x in enumerate(sparse) if not x])


HYBRID = Hybrid(
    "Qwen3-Next",
    Qwen3NextConfig,
    "Qwen3NextForCausalLM",
    _delta_rows,
    is_sparse,
    lambda c: c.norm_topk_prob,
    _of_sparse,
    further="num_nextn_predict_layers",
)
to_ours, to_theirs, rows = HYBRID.to_ours, HYBRID.to_theirs, HYBRID.rows
