"""MiniMax-Text-01: the rows and the config, both ways.

Their qkv_proj lies head by head, [q | k | v] in each; ours are three. Every layer's slope is its own, so every
lightning layer is a block of its own. Their tables of decays are in the files, though they follow from the config; they
are kept for the way back. Source: arXiv 2501.08313 and transformers' MiniMaxForCausalLM.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import MiniMaxConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.plain import (
    PASSED,
    Table,
    attention_fields,
    attention_rows,
    block_rows,
    passed_fields,
    rope_spec,
)
from seqzoo.models.convert.rules import COPY, Row, deal, describe, differences, ends, period, pile

TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
KEPT = rf".*\.self_attn\.({'|'.join(TABLES)})|.*\.rotary_emb\.inv_freq"  # theirs that ours has no room for
_NORM_EPS = 1e-6  # of the lightning layers' own norm, in their code


def to_ours(theirs: dict[str, Any]) -> SeqZooConfig:
    """Their config.json as ours.

    Raises:
        ValueError: what transformers itself refuses, or a feature that ours lacks.
    """
    try:
        c = MiniMaxConfig.from_dict(dict(theirs))
    except Exception as error:  # transformers' validators raise classes of their own
        raise ValueError(f"config.json: no MiniMax config: {' '.join(str(error).split())}") from None
    turned = c.rope_parameters.get("partial_rotary_factor")
    quantized, kinds = getattr(c, "quantization_config", None), set(c.layer_types)
    for name, got, expected, fits in (
        ("hidden_act", c.hidden_act, "'silu'", c.hidden_act in ("silu", "swish")),
        ("attention_dropout", c.attention_dropout, "0", not c.attention_dropout),
        ("router_jitter_noise", c.router_jitter_noise, "0", not c.router_jitter_noise),
        ("quantization_config", quantized, "none", quantized is None),
        ("partial_rotary_factor", turned, "1, as transformers has it whatever it says", turned in (1.0, None)),
        ("layer_types", sorted(kinds), "full and linear attention", kinds <= {"full_attention", "linear_attention"}),
    ):
        if not fits:
            raise ValueError(f"config.json: {name}: expected {expected}, got {got!r}")
    blocks = {f"{kind.partition('_')[0]}_{i}": _block(c, kind, i) for i, kind in enumerate(c.layer_types)}
    names, found = [], {}
    for name, spec in blocks.items():  # layers of one spec share a name
        first = next((old for old, other in found.items() if other == spec), name)
        found[first] = spec
        names.append(first)
    return SeqZooConfig(
        pattern=period(names), blocks=found, norm="rms", norm_eps=c.rms_norm_eps, architectures=["SeqZooForCausalLM"],
        **{name: getattr(c, name) for name in PASSED},
    )  # fmt: skip


def to_theirs(ours: SeqZooConfig) -> dict[str, Any]:
    """Our config as their config.json.

    Raises:
        ValueError: what MiniMax cannot express, by name.
    """
    blocks = _blocks(ours)
    kinds = {"attention": "full_attention", "lightning_attention": "linear_attention"}
    fields = passed_fields(ours)
    fields |= dict(rms_norm_eps=ours.norm_eps, layer_types=[kinds[b["mixer"]["kind"]] for b in blocks])
    for block in reversed(blocks):  # the first of each kind decides; whether all fit it, is seen below
        mixer, moe, linear = block["mixer"], block["channel"], block["mixer"]["kind"] == "lightning_attention"
        a, b = block["mixer_weights"]
        prefix = "linear" if linear else "full"
        fields |= {f"{prefix}_attn_alpha_factor": a, f"{prefix}_attn_beta_factor": b}
        fields |= dict(zip(("mlp_alpha_factor", "mlp_beta_factor"), block["channel_weights"], strict=True))
        heads = dict(num_attention_heads=mixer["num_heads"], head_dim=mixer["head_width"])
        fields |= heads if linear else attention_fields(mixer) | dict(sliding_window=mixer["window"])
        balanced = moe["balance_coefficient"] > 0
        fields |= dict(
            num_local_experts=moe["num_experts"], num_experts_per_tok=moe["num_experts_per_token"],
            intermediate_size=moe["expert_width"], output_router_logits=balanced,
        )  # fmt: skip
        fields |= dict(router_aux_loss_coef=moe["balance_coefficient"]) if balanced else {}
    if "rope_parameters" in fields and fields["rope_parameters"]["partial_rotary_factor"] == 1.0:
        del fields["rope_parameters"]["partial_rotary_factor"]
    theirs = MiniMaxConfig(**fields, architectures=["MiniMaxForCausalLM"]).to_dict()
    try:
        lost = differences(describe(ours), describe(to_ours(theirs)))
    except ValueError as error:
        lost = [str(error)]
    if lost:
        raise ValueError(f"MiniMax cannot express: {'; '.join(lost)}")
    return theirs


def rows(ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
    """`names`: their tensors where they are known, which says how their experts are stored; else as published."""
    table = ends("model.embed_tokens.weight", ours, names)
    for i, block in enumerate(_blocks(ours)):
        theirs, mixer, experts = f"model.layers.{i}.", block["mixer"], block["channel"]["num_experts"]
        piled = f"{theirs}mlp.experts.gate_up_proj" in names
        parts: Table = [("input_layernorm.weight", "mixer_norm.weight", COPY)]
        parts += _lightning_rows(mixer) if mixer["kind"] == "lightning_attention" else attention_rows(mixer)
        parts += [("post_attention_layernorm.weight", "channel_norm.weight", COPY)]
        if piled:
            parts += [("mlp.gate.weight", "channel.router.weight", COPY)]
            parts += [(f"mlp.experts.{x}_proj", f"channel.{x}_proj", COPY) for x in ("gate_up", "down")]
        else:
            parts += [("block_sparse_moe.gate.weight", "channel.router.weight", COPY)]
            parts += [(_experts(experts, "w1", "w3"), "channel.gate_up_proj", pile(2))]
            parts += [(_experts(experts, "w2"), "channel.down_proj", pile(1))]
        table += block_rows(theirs, f"stack.blocks.{i}.", parts)
    return [*table, Row(("model.norm.weight",), ("stack.norm.weight",), COPY)]


def added(ours: SeqZooConfig) -> dict[str, Tensor]:
    """Their tables of decays, for a folder that has not kept them."""
    return {
        f"model.layers.{i}.self_attn.{name}": x
        for i, block in enumerate(_blocks(ours))
        if block["mixer"]["kind"] == "lightning_attention"
        for name, x in _tables(block["mixer"]).items()
    }


def check_kept(ours: SeqZooConfig, kept: Mapping[str, Tensor]) -> None:
    """Raises ValueError: decays that are not those of the config."""
    for i, block in enumerate(_blocks(ours)):
        name = f"model.layers.{i}.self_attn.slope_rate"
        if name in kept:
            expected = _tables(block["mixer"])["slope_rate"]
            near = max(1e-6, torch.finfo(kept[name].dtype).eps)
            if kept[name].shape != expected.shape or not torch.allclose(kept[name].float(), expected, rtol=near):
                raise ValueError(f"{name}: expected the slopes that follow from config.json, got others")


def _experts(number: int, *which: str) -> tuple[str, ...]:
    return tuple(f"block_sparse_moe.experts.{e}.{x}.weight" for e in range(number) for x in which)


def _lightning_rows(spec: Spec) -> Table:
    q_k_v = tuple(f"mixer.{x}_proj.weight" for x in "qkv")
    return [
        ("self_attn.qkv_proj.weight", q_k_v, deal(spec["num_heads"], (spec["head_width"],) * 3, hands=(1, 1, 1))),
        ("self_attn.output_gate.weight", "mixer.gate_proj.weight", COPY),
        ("self_attn.norm.weight", "mixer.norm.weight", COPY),
        ("self_attn.out_proj.weight", "mixer.out_proj.weight", COPY),
    ]


def _tables(spec: Spec, size: int = 256) -> dict[str, Tensor]:
    """As their class makes them for blocks of 256 tokens, its default."""
    slope = torch.exp2(-8.0 / spec["num_heads"] * torch.arange(1, spec["num_heads"] + 1)) * spec["slope"]
    slope, at = slope[:, None, None], torch.arange(1, size + 1)
    apart = (at[:, None] - at[None, :])[None, None]
    return dict(
        slope_rate=slope,
        query_decay=torch.exp(-slope * at[:, None]), key_decay=torch.exp(-slope * (size - at[:, None])),
        diagonal_decay=torch.where(apart >= 0, torch.exp(-slope * apart), 0.0),
    )  # fmt: skip


def _block(c: MiniMaxConfig, kind: str, i: int) -> Spec:
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    linear = kind == "linear_attention"
    lightning = dict(
        kind="lightning_attention", num_heads=c.num_attention_heads, head_width=width, norm_eps=_NORM_EPS,
        slope=1 - i / (c.num_hidden_layers - 1 + 1e-5) + 1e-5,
    )  # fmt: skip
    attention = dict(
        kind="attention", num_heads=c.num_attention_heads, num_kv_heads=c.num_key_value_heads, head_width=width,
        window=c.sliding_window, out_bias=False, norm_eps=c.rms_norm_eps, **rope_spec(c, width),
    )  # fmt: skip
    a, b = (getattr(c, f"{'linear' if linear else 'full'}_attn_{x}_factor") for x in ("alpha", "beta"))
    return dict(
        kind="normed_residual", mixer=lightning if linear else attention, mixer_weights=[float(a), float(b)],
        channel=dict(
            kind="moe", num_experts=c.num_local_experts, num_experts_per_token=c.num_experts_per_tok,
            expert_width=c.intermediate_size, shared_width=0, renormalise=True,
            balance_coefficient=c.router_aux_loss_coef if c.output_router_logits else 0.0,
        ),
        channel_weights=[float(c.mlp_alpha_factor), float(c.mlp_beta_factor)], norm="rms", norm_eps=c.rms_norm_eps,
    )  # fmt: skip


def _blocks(ours: SeqZooConfig) -> list[Spec]:
    """Of every layer.

    Raises:
        ValueError: a block that MiniMax does not have.
    """
    found = []
    for i in range(ours.num_hidden_layers):
        spec = ours.blocks.get(ours.pattern[i % len(ours.pattern)])
        kinds = (
            None
            if spec is None or spec["kind"] != "normed_residual"
            else [spec[x]["kind"] for x in ("mixer", "channel")]
        )
        if kinds not in (["attention", "moe"], ["lightning_attention", "moe"]):
            raise ValueError(f"MiniMax cannot express: layer {i}, {ours.pattern[i % len(ours.pattern)]!r}, {kinds}")
        found.append(spec)
    return found
