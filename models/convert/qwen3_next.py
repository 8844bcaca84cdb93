"""Qwen3-Next: the rows and the config, both ways.

Their fused projections lie key head by key head: in_proj_qkvz [q | k | v | z] and in_proj_ba [b | a] in each of them;
q_proj is [query | gate] in each query head. Ours lie part by part. On disk their experts are single matrices.
Source: the released Qwen3-Next-80B-A3B and transformers' Qwen3NextForCausalLM.
"""

from collections.abc import Collection
from typing import Any

from transformers import Qwen3NextConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.plain import (
    PASSED,
    Table,
    attention_fields,
    attention_rows,
    block_rows,
    expert_rows,
    is_sparse,
    mlp_fields,
    mlp_rows,
    moe_fields,
    moe_spec,
    rope_spec,
    specs_of,
    written_out,
)
from seqzoo.models.convert.rules import COPY, SQUEEZE, Row, deal, describe, differences, ends, period

KEPT = r"mtp\..*|.*\.rotary_emb\.inv_freq"  # theirs that ours has no room for; transformers does not load them either
_PARTS = {"linear_attention": "delta", "full_attention": "full"}


def to_ours(theirs: dict[str, Any]) -> SeqZooConfig:
    """Their config.json, of any transformers version, as ours.

    Raises:
        ValueError: what transformers itself refuses, or a feature that ours lacks.
    """
    try:
        config = Qwen3NextConfig.from_dict(dict(theirs))
    except Exception as error:  # transformers' validators raise classes of their own
        raise ValueError(f"config.json: no Qwen3-Next config: {' '.join(str(error).split())}") from None
    _check(config)
    entries = [
        f"{_PARTS[kind]}/{'moe' if is_sparse(config, i) else 'mlp'}" for i, kind in enumerate(config.layer_types)
    ]
    used = {name for entry in entries for name in entry.split("/")}
    parts = {
        "delta": _delta,
        "full": _full,
        "moe": lambda c: moe_spec(c, c.norm_topk_prob, shared_width=c.shared_expert_intermediate_size),
        "mlp": lambda c: dict(kind="swiglu", width=c.intermediate_size),
    }
    specs = {name: make(config) for name, make in parts.items() if name in used}
    return SeqZooConfig(
        pattern=period(entries),
        mixers={name: specs[name] for name in ("delta", "full") if name in specs},
        channels={name: specs[name] for name in ("moe", "mlp") if name in specs},
        norm_eps=config.rms_norm_eps,
        architectures=["SeqZooForCausalLM"],
        **{name: getattr(config, name) for name in PASSED},
    )


def to_theirs(ours: SeqZooConfig) -> dict[str, Any]:
    """Our config as their config.json.

    Raises:
        ValueError: what Qwen3-Next cannot express, by name.
    """
    theirs = Qwen3NextConfig(**_derive(ours), architectures=["Qwen3NextForCausalLM"]).to_dict()
    lost = differences(written_out(describe(ours)), describe(to_ours(theirs)))
    if lost:
        raise ValueError(f"Qwen3-Next cannot express: {'; '.join(lost)}")
    return theirs


def rows(ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
    """`names`: their tensors where they are known, which says how their experts are stored; else as published."""
    table = ends("model.embed_tokens.weight", ours, names)
    for i, (mixer, channel) in enumerate(_specs(ours)):
        theirs = f"model.layers.{i}."
        block: Table = [("input_layernorm.weight", "mixer_norm.weight", COPY)]
        block += _delta_rows(mixer) if mixer["kind"] == "gated_deltanet" else _full_rows(mixer)
        block += [("post_attention_layernorm.weight", "channel_norm.weight", COPY)]
        if channel["kind"] == "moe":
            block += expert_rows(channel["num_experts"], f"{theirs}mlp.experts.gate_up_proj" in names)
            block += mlp_rows("mlp.shared_expert", "channel.shared")
            block += [("mlp.shared_expert_gate.weight", "channel.shared_gate.weight", COPY)]
        else:
            block += mlp_rows("mlp", "channel")
        table += block_rows(theirs, f"stack.blocks.{i}.", block)
    return [*table, Row(("model.norm.weight",), ("stack.norm.weight",), COPY)]


def _delta_rows(spec: Spec) -> Table:
    H, K = spec["num_key_heads"], spec["key_width"]
    share = spec["num_value_heads"] // H  # value heads of a key head
    sizes = (K, K, share * spec["value_width"], share * spec["value_width"])
    return [
        (
            "linear_attn.in_proj_qkvz.weight",
            ("mixer.qkv_proj.weight", "mixer.gate_proj.weight"),
            deal(H, sizes, hands=(3, 1)),
        ),
        ("linear_attn.in_proj_ba.weight", "mixer.ba_proj.weight", deal(H, (share, share), hands=(2,))),
        ("linear_attn.conv1d.weight", "mixer.conv.weight", SQUEEZE),
        ("linear_attn.A_log", "mixer.a_log", COPY),
        ("linear_attn.dt_bias", "mixer.dt_bias", COPY),
        ("linear_attn.norm.weight", "mixer.norm.weight", COPY),
        ("linear_attn.out_proj.weight", "mixer.out_proj.weight", COPY),
    ]


def _full_rows(spec: Spec) -> Table:
    query_and_gate = deal(spec["num_heads"], (spec["head_width"],) * 2, hands=(1, 1))
    return [
        (those, (these, these.replace("q_proj", "gate_proj")), query_and_gate)
        if ".q_proj." in those
        else (those, these, how)
        for those, these, how in attention_rows(spec)
    ]


def _check(config: Qwen3NextConfig) -> None:
    kinds, shared = set(config.layer_types), config.shared_expert_intermediate_size
    sparse = any(is_sparse(config, i) for i in range(config.num_hidden_layers))
    quantized = getattr(config, "quantization_config", None)
    for name, got, expected, fits in (
        ("hidden_act", config.hidden_act, "'silu'", config.hidden_act in ("silu", "swish")),
        ("attention_dropout", config.attention_dropout, "0", not config.attention_dropout),
        ("layer_types", sorted(kinds), sorted(_PARTS), kinds <= set(_PARTS)),
        ("shared_expert_intermediate_size", shared, "at least 1", shared >= 1 or not sparse),
        ("quantization_config", quantized, "none", quantized is None),
    ):
        if not fits:
            raise ValueError(f"config.json: {name}: expected {expected}, got {got!r}")


def _delta(config: Qwen3NextConfig) -> Spec:
    return dict(
        kind="gated_deltanet",
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_width=config.linear_key_head_dim,
        value_width=config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        norm_eps=config.rms_norm_eps,
    )


def _full(config: Qwen3NextConfig) -> Spec:
    return dict(
        kind="attention",
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        qk_norm="zero_centred",
        output_gate=True,
        bias=config.attention_bias,
        out_bias=config.attention_bias,
        norm_eps=config.rms_norm_eps,
        **rope_spec(config, config.head_dim),
    )


def _derive(ours: SeqZooConfig) -> dict[str, Any]:
    """Their config's arguments, from the first part of each kind; whether all fit them, `to_theirs` sees."""
    kinds, sparse, found = [], [], {}
    for mixer, channel in _specs(ours):
        for spec in (mixer, channel):
            found.setdefault(spec["kind"], spec)
        kinds.append({"gated_deltanet": "linear_attention", "attention": "full_attention"}[mixer["kind"]])
        sparse.append(channel["kind"] == "moe")
    arguments = {name: getattr(ours, name) for name in PASSED if getattr(ours, name, None) is not None}
    arguments |= dict(
        layer_types=kinds, rms_norm_eps=ours.norm_eps, num_experts=0, tie_word_embeddings=ours.tie_word_embeddings
    )
    arguments["mlp_only_layers"] = [i for i, x in enumerate(sparse) if not x] if any(sparse) else []
    takers = {"gated_deltanet": _from_delta, "attention": _from_full, "moe": _from_moe, "swiglu": mlp_fields}
    for kind, spec in found.items():
        arguments |= takers[kind](spec)
    return arguments


def _from_delta(spec: Spec) -> dict[str, Any]:
    return dict(
        linear_num_key_heads=spec["num_key_heads"],
        linear_num_value_heads=spec["num_value_heads"],
        linear_key_head_dim=spec["key_width"],
        linear_value_head_dim=spec["value_width"],
        linear_conv_kernel_dim=spec["conv_width"],
    )


def _from_full(spec: Spec) -> dict[str, Any]:
    return dict(attention_bias=spec["bias"], **attention_fields(spec))


def _from_moe(spec: Spec) -> dict[str, Any]:
    return dict(shared_expert_intermediate_size=spec["shared_width"], **moe_fields(spec))


def _specs(ours: SeqZooConfig) -> list[tuple[Spec, Spec]]:
    return specs_of(ours, "Qwen3-Next", {"gated_deltanet", "attention"}, {"moe", "swiglu"})
