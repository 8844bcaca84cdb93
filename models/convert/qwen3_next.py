"""Qwen3-Next: the rows and the config, both ways.

Their fused projections lie key head by key head: in_proj_qkvz [q | k | v | z] and in_proj_ba [b | a] in each of them;
q_proj is [query | gate] in each query head. Ours lie part by part. On disk their experts are single matrices.
Source: the released Qwen3-Next-80B-A3B and transformers' Qwen3NextForCausalLM.
"""

import math
from collections.abc import Collection
from typing import Any

from transformers import Qwen3NextConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.rules import COPY, SQUEEZE, How, Row, deal, describe, differences, ends, period, pile

KEPT = r"mtp\..*|.*\.rotary_emb\.inv_freq"  # theirs that ours has no room for; transformers does not load them either
_PASSED = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "initializer_range", "use_cache"),
    *("tie_word_embeddings", "dtype", "pad_token_id", "bos_token_id", "eos_token_id"),
)
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
        f"{_PARTS[kind]}/{'moe' if _is_sparse(config, i) else 'mlp'}" for i, kind in enumerate(config.layer_types)
    ]
    used = {name for entry in entries for name in entry.split("/")}
    parts = {
        "delta": _delta,
        "full": _full,
        "moe": _moe,
        "mlp": lambda c: dict(kind="swiglu", width=c.intermediate_size),
    }
    specs = {name: make(config) for name, make in parts.items() if name in used}
    return SeqZooConfig(
        pattern=period(entries),
        mixers={name: specs[name] for name in ("delta", "full") if name in specs},
        channels={name: specs[name] for name in ("moe", "mlp") if name in specs},
        norm_eps=config.rms_norm_eps,
        architectures=["SeqZooForCausalLM"],
        **{name: getattr(config, name) for name in _PASSED},
    )


def to_theirs(ours: SeqZooConfig) -> dict[str, Any]:
    """Our config as their config.json.

    Raises:
        ValueError: what Qwen3-Next cannot express, by name.
    """
    theirs = Qwen3NextConfig(**_derive(ours), architectures=["Qwen3NextForCausalLM"]).to_dict()
    mine = describe(ours)
    for what, default in (("rotary_width", "head_width"), ("out_bias", "bias")):  # None is all, and as the others
        for name in [name for name, value in mine.items() if name.endswith(f" mixer {what}") and value is None]:
            mine[name] = mine[name.removesuffix(what) + default]
    lost = differences(mine, describe(to_ours(theirs)))
    if lost:
        raise ValueError(f"Qwen3-Next cannot express: {'; '.join(lost)}")
    return theirs


def rows(ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
    """`names`: their tensors where they are known, which says how their experts are stored; else as published."""
    table = ends("model.embed_tokens.weight", ours, names)
    for i in range(ours.num_hidden_layers):
        mixer, channel = _specs(ours, i)
        theirs = f"model.layers.{i}."
        piled = f"{theirs}mlp.experts.gate_up_proj" in names
        block = [("input_layernorm.weight", "mixer_norm.weight", COPY)]
        block += _delta_rows(mixer) if mixer["kind"] == "gated_deltanet" else _full_rows(mixer)
        block += [("post_attention_layernorm.weight", "channel_norm.weight", COPY)]
        block += _moe_rows(channel["num_experts"], piled) if channel["kind"] == "moe" else _mlp_rows("mlp", "channel")
        for those, these, how in block:
            those, these = ((x,) if isinstance(x, str) else x for x in (those, these))
            table.append(Row(tuple(theirs + x for x in those), tuple(f"stack.blocks.{i}.{x}" for x in these), how))
    return [*table, Row(("model.norm.weight",), ("stack.norm.weight",), COPY)]


_Names = str | tuple[str, ...]


def _delta_rows(spec: Spec) -> list[tuple[_Names, _Names, How]]:
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


def _full_rows(spec: Spec) -> list[tuple[_Names, _Names, How]]:
    query_and_gate = deal(spec["num_heads"], (spec["head_width"],) * 2, hands=(1, 1))
    table: list[tuple[_Names, _Names, How]] = []
    for what in ("weight", "bias") if spec["bias"] else ("weight",):
        table += [
            (f"self_attn.q_proj.{what}", (f"mixer.q_proj.{what}", f"mixer.gate_proj.{what}"), query_and_gate),
            (f"self_attn.k_proj.{what}", f"mixer.k_proj.{what}", COPY),
            (f"self_attn.v_proj.{what}", f"mixer.v_proj.{what}", COPY),
            (f"self_attn.o_proj.{what}", f"mixer.out_proj.{what}", COPY),
        ]
    return [*table, *((f"self_attn.{x}_norm.weight", f"mixer.{x}_norm.weight", COPY) for x in "qk")]


def _moe_rows(experts: int, piled: bool) -> list[tuple[_Names, _Names, How]]:
    if piled:
        gate_up, down, hows = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", (COPY, COPY)
    else:
        gate_up = tuple(f"mlp.experts.{e}.{x}_proj.weight" for e in range(experts) for x in ("gate", "up"))
        down = tuple(f"mlp.experts.{e}.down_proj.weight" for e in range(experts))
        hows = (pile(2), pile(1))
    return [
        ("mlp.gate.weight", "channel.router.weight", COPY),
        (gate_up, "channel.gate_up_proj", hows[0]),
        (down, "channel.down_proj", hows[1]),
        *_mlp_rows("mlp.shared_expert", "channel.shared"),
        ("mlp.shared_expert_gate.weight", "channel.shared_gate.weight", COPY),
    ]


def _mlp_rows(theirs: str, ours: str) -> list[tuple[_Names, _Names, How]]:
    return [(f"{theirs}.{x}_proj.weight", f"{ours}.{x}_proj.weight", COPY) for x in ("gate", "up", "down")]


def _check(config: Qwen3NextConfig) -> None:
    rope, kinds, shared = config.rope_parameters, set(config.layer_types), config.shared_expert_intermediate_size
    rope_type, fraction = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    sparse = any(_is_sparse(config, i) for i in range(config.num_hidden_layers))
    quantized = getattr(config, "quantization_config", None)
    for name, got, expected, fits in (
        ("hidden_act", config.hidden_act, "'silu'", config.hidden_act in ("silu", "swish")),
        ("rope_parameters.rope_type", rope_type, "'default'", rope_type == "default"),
        ("partial_rotary_factor", fraction, "an even number of channels", int(config.head_dim * fraction) % 2 == 0),
        ("attention_dropout", config.attention_dropout, "0", not config.attention_dropout),
        ("layer_types", sorted(kinds), sorted(_PARTS), kinds <= set(_PARTS)),
        ("shared_expert_intermediate_size", shared, "at least 1", shared >= 1 or not sparse),
        ("quantization_config", quantized, "none", quantized is None),
    ):
        if not fits:
            raise ValueError(f"config.json: {name}: expected {expected}, got {got!r}")


def _is_sparse(config: Qwen3NextConfig, i: int) -> bool:
    listed = i in config.mlp_only_layers
    return not listed and config.num_experts > 0 and (i + 1) % config.decoder_sparse_step == 0


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
    rope = config.rope_parameters
    return dict(
        kind="attention",
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        rope_theta=float(rope["rope_theta"]),
        rotary_width=int(config.head_dim * rope.get("partial_rotary_factor", 1.0)),
        qk_norm="zero_centred",
        output_gate=True,
        bias=config.attention_bias,
        out_bias=config.attention_bias,
        norm_eps=config.rms_norm_eps,
    )


def _moe(config: Qwen3NextConfig) -> Spec:
    return dict(
        kind="moe",
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_tok,
        expert_width=config.moe_intermediate_size,
        shared_width=config.shared_expert_intermediate_size,
        renormalise=config.norm_topk_prob,
        balance_coefficient=config.router_aux_loss_coef if config.output_router_logits else 0.0,
    )


def _derive(ours: SeqZooConfig) -> dict[str, Any]:
    """Their config's arguments, from the first part of each kind; whether all fit them, `to_theirs` sees."""
    kinds, sparse, found = [], [], {}
    for i in range(ours.num_hidden_layers):
        mixer, channel = _specs(ours, i)
        for spec in (mixer, channel):
            found.setdefault(spec["kind"], spec)
        kinds.append({"gated_deltanet": "linear_attention", "attention": "full_attention"}[mixer["kind"]])
        sparse.append(channel["kind"] == "moe")
    arguments = {name: getattr(ours, name) for name in _PASSED if getattr(ours, name, None) is not None}
    arguments |= dict(
        layer_types=kinds, rms_norm_eps=ours.norm_eps, num_experts=0, tie_word_embeddings=ours.tie_word_embeddings
    )
    arguments["mlp_only_layers"] = [i for i, x in enumerate(sparse) if not x] if any(sparse) else []
    takers = {"gated_deltanet": _from_delta, "attention": _from_full, "moe": _from_moe, "swiglu": _from_mlp}
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
    width = spec["head_width"]
    turned = width if spec["rotary_width"] is None else spec["rotary_width"]
    factor = turned / width
    if int(width * factor) != turned:  # rounded down, transformers would turn one channel less
        factor = math.nextafter(factor, 1.0)
    return dict(
        num_attention_heads=spec["num_heads"],
        num_key_value_heads=spec["num_kv_heads"],
        head_dim=width,
        attention_bias=spec["bias"],
        rope_parameters=dict(rope_type="default", rope_theta=spec["rope_theta"], partial_rotary_factor=factor),
    )


def _from_moe(spec: Spec) -> dict[str, Any]:
    balanced = spec["balance_coefficient"] > 0
    return dict(
        num_experts=spec["num_experts"],
        num_experts_per_tok=spec["num_experts_per_token"],
        moe_intermediate_size=spec["expert_width"],
        shared_expert_intermediate_size=spec["shared_width"],
        norm_topk_prob=spec["renormalise"],
        output_router_logits=balanced,
        **(dict(router_aux_loss_coef=spec["balance_coefficient"]) if balanced else {}),
    )


def _from_mlp(spec: Spec) -> dict[str, Any]:
    return dict(intermediate_size=spec["width"])


def _specs(ours: SeqZooConfig, i: int) -> tuple[Spec, Spec]:
    """The mixer and the channel of layer i.

    Raises:
        ValueError: a part that Qwen3-Next does not have.
    """
    entry = ours.pattern[i % len(ours.pattern)]
    mixer, slash, channel = entry.partition("/")
    if not slash:
        raise ValueError(f"Qwen3-Next cannot express: layer {i}, block {entry!r}")
    specs = ours.mixers[mixer], ours.channels[channel]
    for spec, known in zip(specs, ({"gated_deltanet", "attention"}, {"moe", "swiglu"}), strict=True):
        if spec["kind"] not in known:
            raise ValueError(f"Qwen3-Next cannot express: layer {i}, {spec['kind']!r}; it has {sorted(known)}")
    return specs
