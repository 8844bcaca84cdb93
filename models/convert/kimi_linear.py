"""Kimi Linear: the rows and the config, both ways.

On disk every projection, the three parts of the convolution and the experts' matrices are single tensors. transformers
writes a dense layer's MLP under the name that experts have; that is read, too. What moves the experts' bias is no part
of a checkpoint: models that come in get the rate below. Source: arXiv 2510.26692, the released Kimi-Linear-48B-A3B, and
transformers' KimiLinearForCausalLM.
"""

from collections.abc import Collection
from typing import Any

import torch
from transformers import KimiLinearConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.plain import PASSED, Table, block_rows, mlp_rows, passed_fields, specs_of
from seqzoo.models.convert.rules import COPY, How, Row, describe, differences, ends, join, period, pile

KEPT = r".*\.rotary_emb\.inv_freq"  # theirs that ours has no room for
_LATENT_EPS = 1e-6  # of the norms inside latent attention, in their code
_UPDATE_RATE = 0.001  # of the experts' bias: DeepSeek-V3's, arXiv 2412.19437, whose router it is
_KINDS = {"kimi_delta_attention": "linear_attention", "latent_attention": "full_attention"}
_HEADS = How("reshaped", lambda x: (x.flatten(),), lambda x: (x.view(1, 1, -1, 1),))  # [1, 1, H, 1] <-> [H]


def to_ours(theirs: dict[str, Any]) -> SeqZooConfig:
    """Their config.json as ours.

    Raises:
        ValueError: what transformers itself refuses, or a feature that ours lacks.
    """
    try:
        c = KimiLinearConfig.from_dict(dict(theirs))
    except Exception as error:  # transformers' validators raise classes of their own
        raise ValueError(f"config.json: no Kimi Linear config: {' '.join(str(error).split())}") from None
    kinds, mlps = set(c.layer_types), set(c.mlp_layer_types)
    for name, got, expected, fits in (
        ("hidden_act", c.hidden_act, "'silu'", c.hidden_act in ("silu", "swish")),
        ("attention_dropout", c.attention_dropout, "0", not c.attention_dropout),
        ("quantization_config", getattr(c, "quantization_config", None), "none", None),
        ("layer_types", sorted(map(str, kinds)), sorted(_KINDS.values()), kinds <= set(_KINDS.values())),
        ("mlp_layer_types", sorted(map(str, mlps)), "dense and sparse", mlps <= {"dense", "sparse"}),
        ("num_key_value_heads", c.num_key_value_heads, c.num_attention_heads, None),
        ("num_expert_group", c.n_group, 1, None),
        ("tie_word_embeddings", c.tie_word_embeddings, False, None),  # transformers' class has a head in any case
        ("mla_use_nope", getattr(c, "mla_use_nope", True), True, None),
        ("moe_router_activation_func", getattr(c, "moe_router_activation_func", "sigmoid"), "sigmoid", None),
        ("moe_layer_freq", getattr(c, "moe_layer_freq", 1), 1, None),
    ):
        if fits is None:
            fits = got == (None if expected == "none" else expected)
        if not fits:
            raise ValueError(f"config.json: {name}: expected {expected}, got {got!r}")
    entries = [
        f"{'delta' if kind == 'linear_attention' else 'full'}/{'moe' if mlp == 'sparse' else 'mlp'}"
        for kind, mlp in zip(c.layer_types, c.mlp_layer_types, strict=True)
    ]
    specs = {"delta": _delta, "full": _full, "mlp": _mlp, "moe": _moe}
    parts = {name: make(c) for name, make in specs.items() if any(name in entry.split("/") for entry in entries)}
    return SeqZooConfig(
        pattern=period(entries), mixers={name: parts[name] for name in ("delta", "full") if name in parts},
        channels={name: parts[name] for name in ("mlp", "moe") if name in parts}, norm="rms", norm_eps=c.rms_norm_eps,
        architectures=["SeqZooForCausalLM"], **{name: getattr(c, name) for name in PASSED},
    )  # fmt: skip


def to_theirs(ours: SeqZooConfig) -> dict[str, Any]:
    """Our config as their config.json.

    Raises:
        ValueError: what Kimi Linear cannot express, by name.
    """
    layers = _layers(ours)
    fields = passed_fields(ours)
    fields |= dict(
        rms_norm_eps=ours.norm_eps, layer_types=[_KINDS[mixer["kind"]] for mixer, _ in layers],
        mlp_layer_types=["sparse" if channel["kind"] == "moe" else "dense" for _, channel in layers],
    )  # fmt: skip
    fields_of = dict(
        kimi_delta_attention=_of_delta, latent_attention=_of_full, moe=_of_moe,
        swiglu=lambda spec: dict(intermediate_size=spec["width"]),
    )  # fmt: skip
    for spec in (spec for layer in reversed(layers) for spec in layer):  # the first of each kind decides, see below
        fields |= fields_of[spec["kind"]](spec)
    try:
        theirs = KimiLinearConfig(**fields, architectures=["KimiLinearForCausalLM"]).to_dict()
        lost = differences(_settled(describe(ours)), _settled(describe(to_ours(theirs))))
    except Exception as error:  # transformers' validators raise classes of their own
        lost = [" ".join(str(error).split())]
    if lost:
        raise ValueError(f"Kimi Linear cannot express: {'; '.join(lost)}")
    return theirs


def rows(ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
    """`names`: their tensors where they are known, which says what a dense layer's MLP is called; else as published.

    Raises:
        ValueError: a layer that Kimi Linear does not have.
    """
    table = ends("model.embed_tokens.weight", ours, names)
    for i, (mixer, channel) in enumerate(_layers(ours)):
        theirs = f"model.layers.{i}."
        block: Table = [("input_layernorm.weight", "mixer_norm.weight", COPY)]
        block += _delta_rows(mixer) if mixer["kind"] == "kimi_delta_attention" else _full_rows(mixer)
        block += [("post_attention_layernorm.weight", "channel_norm.weight", COPY)]
        if channel["kind"] == "moe":
            block += _moe_rows(channel)
        else:
            moved = f"{theirs}block_sparse_moe.gate_proj.weight" in names
            block += mlp_rows("block_sparse_moe" if moved else "mlp", "channel")
        table += block_rows(theirs, f"stack.blocks.{i}.", block)
    return [*table, Row(("model.norm.weight",), ("stack.norm.weight",), COPY)]


def _delta(c: KimiLinearConfig) -> Spec:
    return dict(
        kind="kimi_delta_attention", num_heads=c.linear_num_heads, key_width=c.linear_head_dim,
        value_width=c.linear_head_dim, conv_width=c.linear_conv_kernel_dim, norm_eps=c.rms_norm_eps,
    )  # fmt: skip


def _full(c: KimiLinearConfig) -> Spec:
    return dict(
        kind="latent_attention", num_heads=c.num_attention_heads, key_width=c.qk_nope_head_dim,
        shared_width=c.qk_rope_head_dim, value_width=c.v_head_dim, latent_width=c.kv_lora_rank,
        query_rank=c.q_lora_rank, bias=c.attention_bias, norm_eps=_LATENT_EPS,
    )  # fmt: skip


def _mlp(c: KimiLinearConfig) -> Spec:
    return dict(kind="swiglu", width=c.intermediate_size)


def _moe(c: KimiLinearConfig) -> Spec:
    return dict(
        kind="moe", num_experts=c.num_local_experts, num_experts_per_token=c.num_experts_per_tok,
        expert_width=c.moe_intermediate_size, shared_width=c.moe_intermediate_size * c.n_shared_experts,
        shared_gate=False, renormalise=c.norm_topk_prob, router_score="sigmoid", routed_scale=c.routed_scaling_factor,
        balance_coefficient=0.0, bias_update_rate=_UPDATE_RATE,
    )  # fmt: skip


def _of_delta(spec: Spec) -> dict[str, Any]:
    return dict(
        linear_num_heads=spec["num_heads"], linear_head_dim=spec["key_width"], linear_conv_kernel_dim=spec["conv_width"]
    )


def _of_full(spec: Spec) -> dict[str, Any]:
    return dict(
        num_attention_heads=spec["num_heads"], num_key_value_heads=spec["num_heads"], kv_lora_rank=spec["latent_width"],
        qk_nope_head_dim=spec["key_width"], qk_rope_head_dim=spec["shared_width"], v_head_dim=spec["value_width"],
        q_lora_rank=spec["query_rank"], attention_bias=spec["bias"],
    )  # fmt: skip


def _of_moe(spec: Spec) -> dict[str, Any]:
    return dict(
        num_local_experts=spec["num_experts"], num_experts_per_tok=spec["num_experts_per_token"],
        moe_intermediate_size=spec["expert_width"], n_shared_experts=spec["shared_width"] // spec["expert_width"],
        norm_topk_prob=spec["renormalise"], routed_scaling_factor=spec["routed_scale"],
    )  # fmt: skip


def _delta_rows(spec: Spec) -> Table:
    sizes = [spec["num_heads"] * spec[width] for width in ("key_width", "key_width", "value_width")]
    conv = How("fused", lambda *x: (torch.cat(x).squeeze(1),), lambda x: x.unsqueeze(1).split(sizes))
    named = lambda form: tuple(f"self_attn.{x}_{form}.weight" for x in "qkv")
    plain = dict(f_a="decay_down", f_b="decay_up", b="beta", g_a="gate_down", g_b="gate_up", o="out")
    return [
        (named("proj"), "mixer.qkv_proj.weight", join(sizes)),
        (named("conv1d"), "mixer.conv.weight", conv),
        ("self_attn.A_log", "mixer.a_log", _HEADS),
        ("self_attn.dt_bias", "mixer.dt_bias", COPY),
        ("self_attn.o_norm.weight", "mixer.norm.weight", COPY),
        *((f"self_attn.{x}_proj.weight", f"mixer.{mine}_proj.weight", COPY) for x, mine in plain.items()),
    ]


def _full_rows(spec: Spec) -> Table:
    named = {"kv_a_proj_with_mqa": "kv_down_proj", "kv_b_proj": "kv_proj", "kv_a_layernorm": "kv_norm"}
    if spec["query_rank"] is None:
        named |= {"q_proj": "q_proj"}
    else:
        named |= {"q_a_proj": "q_down_proj", "q_a_layernorm": "q_norm", "q_b_proj": "q_proj"}
    named |= {"o_proj": "out_proj"}
    biased = {"kv_down_proj", "q_down_proj", "out_proj"} if spec["bias"] else set()
    return [
        (f"self_attn.{x}.{what}", f"mixer.{mine}.{what}", COPY)
        for x, mine in named.items()
        for what in (("weight", "bias") if mine in biased else ("weight",))
    ]


def _moe_rows(spec: Spec) -> Table:
    experts = lambda *which: tuple(
        f"block_sparse_moe.experts.{e}.{x}.weight" for e in range(spec["num_experts"]) for x in which
    )
    shared = mlp_rows("block_sparse_moe.shared_experts", "channel.shared") if spec["shared_width"] else []
    return [
        ("block_sparse_moe.gate.weight", "channel.router.weight", COPY),
        ("block_sparse_moe.gate.e_score_correction_bias", "channel.expert_bias", COPY),
        (experts("w1", "w3"), "channel.gate_up_proj", pile(2)),
        (experts("w2"), "channel.down_proj", pile(1)),
        *shared,
    ]


def _layers(ours: SeqZooConfig) -> list[tuple[Spec, Spec]]:
    """Raises ValueError: a layer that Kimi Linear does not have."""
    found = specs_of(ours, "Kimi Linear", set(_KINDS), {"swiglu", "moe"})
    for i, (_, channel) in enumerate(found):
        if channel["kind"] == "moe" and not channel["bias_update_rate"]:
            raise ValueError(f"Kimi Linear cannot express: layer {i}, experts without a bias (bias_update_rate 0)")
    return found


def _settled(facts: dict[str, Any]) -> dict[str, Any]:
    """A description of ours without what is of training alone, and with what stands for another argument's value
    written out."""
    found = {name: x for name, x in facts.items() if not name.endswith((" bias_update_rate", " balance_coefficient"))}
    for what, width in (("decay_rank", "key_width"), ("gate_rank", "value_width")):
        for name in [name for name, x in found.items() if name.endswith(f" mixer {what}") and x is None]:
            found[name] = found[name.removesuffix(what) + width]
    return found
