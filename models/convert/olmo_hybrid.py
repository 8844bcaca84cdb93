"""OLMo-Hybrid: the rows and the config, both ways.

Layers of Gated DeltaNet norm what their parts get; layers of attention norm what their parts give, and all heads of q
and of k as one. On disk every projection and the three parts of the convolution are single tensors. transformers writes
folders with some other names, and cuts the convolution into thirds, whatever lies in them; those are read, too.
Positions are turned by where `rope_theta` is a number; as released it is null, and nothing is turned.
Source: the released Olmo-Hybrid-7B and transformers' OlmoHybridForCausalLM.
"""

from collections.abc import Collection
from typing import Any

import torch
from transformers import OlmoHybridConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.plain import (
    KEPT,  # noqa: F401
    PASSED,
    Table,
    attention_fields,
    attention_rows,
    block_rows,
    mlp_fields,
    mlp_rows,
    passed_fields,
    rope_spec,
)
from seqzoo.models.convert.rules import COPY, SQUEEZE, How, Row, describe, differences, ends, join, period

_NORM_EPS = 1e-5  # of the norm of what is read, in their code
_PARTS = ("block mixer", "block channel")
_KINDS = {"gated_deltanet": "linear_attention", "attention": "full_attention"}
_NORMS = {  # of the mixer and the channel: as published, and as transformers writes or holds them
    "gated_deltanet": [
        ("attention_layer_norm", "feedforward_layer_norm"),
        ("input_layernorm", "post_attention_layernorm"),
    ],
    "attention": [
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        ("feedforward_layer_norm", "post_feedforward_layernorm"),
    ],
}


def to_ours(theirs: dict[str, Any]) -> SeqZooConfig:
    """Their config.json as ours.

    Raises:
        ValueError: what transformers itself refuses, or a feature that ours lacks.
    """
    try:
        c = OlmoHybridConfig.from_dict(dict(theirs))
    except Exception as error:  # transformers' validators raise classes of their own
        raise ValueError(f"config.json: no OLMo-Hybrid config: {' '.join(str(error).split())}") from None
    quantized, kinds, known = getattr(c, "quantization_config", None), set(c.layer_types), set(_KINDS.values())
    width, rest = divmod(c.hidden_size, c.num_attention_heads)
    turned = c.rope_parameters.get("partial_rotary_factor", 1.0)
    for name, got, expected, fits in (
        ("hidden_act", c.hidden_act, "'silu'", c.hidden_act in ("silu", "swish")),
        ("attention_dropout", c.attention_dropout, "0", not c.attention_dropout),
        ("layer_types", sorted(kinds), sorted(known), kinds <= known),
        ("hidden_size", c.hidden_size, f"a multiple of {c.num_attention_heads} heads", not rest),
        ("partial_rotary_factor", turned, "1", turned in (1.0, None)),
        ("quantization_config", quantized, "none", quantized is None),
    ):
        if not fits:
            raise ValueError(f"config.json: {name}: expected {expected}, got {got!r}")
    rope = dict(rotary_width=0) if c.rope_parameters.get("rope_theta") is None else rope_spec(c, width)
    mlp = dict(kind="swiglu", width=c.intermediate_size)
    attention = dict(
        kind="attention", num_heads=c.num_attention_heads, num_kv_heads=c.num_key_value_heads, head_width=width,
        qk_norm="rms_joint", bias=c.attention_bias, out_bias=c.attention_bias, norm_eps=c.rms_norm_eps, **rope,
    )  # fmt: skip
    delta = dict(
        kind="gated_deltanet", num_key_heads=c.linear_num_key_heads, num_value_heads=c.linear_num_value_heads,
        key_width=c.linear_key_head_dim, value_width=c.linear_value_head_dim, conv_width=c.linear_conv_kernel_dim,
        beta_scale=2.0 if c.linear_allow_neg_eigval else 1.0, norm_eps=_NORM_EPS,
    )  # fmt: skip
    full = dict(kind="post_norm", mixer=attention, channel=mlp, norm="rms", norm_eps=c.rms_norm_eps)
    return SeqZooConfig(
        pattern=period(["delta/mlp" if kind == "linear_attention" else "full" for kind in c.layer_types]),
        mixers=dict(delta=delta), channels=dict(mlp=mlp), blocks=dict(full=full), norm="rms", norm_eps=c.rms_norm_eps,
        architectures=["SeqZooForCausalLM"], **{name: getattr(c, name) for name in PASSED},
    )  # fmt: skip


def to_theirs(ours: SeqZooConfig) -> dict[str, Any]:
    """Our config as their config.json.

    Raises:
        ValueError: what OLMo-Hybrid cannot express, by name.
    """
    layers = _layers(ours)
    fields = passed_fields(ours)
    fields |= dict(rms_norm_eps=ours.norm_eps, layer_types=[_KINDS[mixer["kind"]] for mixer, _ in layers])
    for mixer, channel in reversed(layers):  # the first of each kind decides; whether all fit it, is seen below
        fields |= mlp_fields(channel) | (_of_delta(mixer) if mixer["kind"] == "gated_deltanet" else _of_full(mixer))
    try:
        theirs = OlmoHybridConfig(**fields, architectures=["OlmoHybridForCausalLM"]).to_dict()
        lost = differences(_settled(describe(ours)), _settled(describe(to_ours(theirs))))
    except Exception as error:  # transformers' validators raise classes of their own
        lost = [" ".join(str(error).split())]
    if lost:
        raise ValueError(f"OLMo-Hybrid cannot express: {'; '.join(lost)}")
    return theirs


def rows(ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
    """`names`: their tensors where they are known, which says how a folder names and cuts them; else as published.

    Raises:
        ValueError: a layer that OLMo-Hybrid does not have.
    """
    table, layers = ends("model.embed_tokens.weight", ours, names), _layers(ours)
    full = [i for i, (mixer, _) in enumerate(layers) if mixer["kind"] == "attention"]
    thirds = any(f"model.layers.{i}.{_NORMS['attention'][1][0]}.weight" in names for i in full)
    for i, (mixer, _) in enumerate(layers):
        theirs, ways = f"model.layers.{i}.", _NORMS[mixer["kind"]]
        way = next((way for way in ways if all(f"{theirs}{x}.weight" in names for x in way)), ways[0])
        block: Table = [(f"{way[n]}.weight", f"{x}_norm.weight", COPY) for n, x in enumerate(("mixer", "channel"))]
        if mixer["kind"] == "attention":
            block += attention_rows(mixer)
        else:
            block += _delta_rows(mixer, thirds=thirds, whole=f"{theirs}linear_attn.conv1d.weight" in names)
        table += block_rows(theirs, f"stack.blocks.{i}.", block + mlp_rows("mlp", "channel"))
    return [*table, Row(("model.norm.weight",), ("stack.norm.weight",), COPY)]


def _delta_rows(spec: Spec, *, thirds: bool, whole: bool) -> Table:
    """`thirds`, `whole`: how their convolution is cut."""
    keys, HV = spec["num_key_heads"] * spec["key_width"], spec["num_value_heads"]
    sizes = [keys, keys, HV * spec["value_width"]]
    third = -(-sum(sizes) // 3)
    cut = [third, third, sum(sizes) - 2 * third] if thirds else sizes
    conv = How("fused", lambda *x: (torch.cat(x).squeeze(1),), lambda x: x.unsqueeze(1).split(cut))
    named = lambda form, letters: tuple(f"linear_attn.{x}_{form}.weight" for x in letters)
    return [
        (named("proj", "qkv"), "mixer.qkv_proj.weight", join(sizes)),
        (named("proj", "ba"), "mixer.ba_proj.weight", join([HV, HV])),
        ("linear_attn.conv1d.weight", "mixer.conv.weight", SQUEEZE)
        if whole
        else (named("conv1d", "qkv"), "mixer.conv.weight", conv),
        ("linear_attn.g_proj.weight", "mixer.gate_proj.weight", COPY),
        ("linear_attn.A_log", "mixer.a_log", COPY),
        ("linear_attn.dt_bias", "mixer.dt_bias", COPY),
        ("linear_attn.o_norm.weight", "mixer.norm.weight", COPY),
        ("linear_attn.o_proj.weight", "mixer.out_proj.weight", COPY),
    ]


def _of_delta(spec: Spec) -> dict[str, Any]:
    return dict(
        linear_num_key_heads=spec["num_key_heads"], linear_num_value_heads=spec["num_value_heads"],
        linear_key_head_dim=spec["key_width"], linear_value_head_dim=spec["value_width"],
        linear_conv_kernel_dim=spec["conv_width"], linear_allow_neg_eigval=spec["beta_scale"] == 2,
    )  # fmt: skip


def _of_full(spec: Spec) -> dict[str, Any]:
    fields = attention_fields(spec) | dict(attention_bias=spec["bias"])
    del fields["head_dim"], fields["rope_parameters"]["partial_rotary_factor"]
    if spec["rotary_width"] == 0:
        fields["rope_parameters"] = dict(rope_type="default", rope_theta=None)
    return fields


def _settled(facts: dict[str, Any]) -> dict[str, Any]:
    """A description of ours, argument by argument, what stands for another argument's value or for none written out."""
    found = {}
    for name, x in facts.items():
        found |= {f"{name} {what}": y for what, y in x.items()} if name.endswith(_PARTS) else {name: x}
    for name in [name.removesuffix("kind") for name in found if name.endswith("block mixer kind")]:
        for what, default in (("rotary_width", "head_width"), ("out_bias", "bias")):
            if found[name + what] is None:
                found[name + what] = found[name + default]
        if found[name + "rotary_width"] == 0:
            found[name + "rope_theta"] = found[name + "rope_scaling"] = None
    return found


def _layers(ours: SeqZooConfig) -> list[tuple[Spec, Spec]]:
    """The mixer and the channel of every layer.

    Raises:
        ValueError: a block that OLMo-Hybrid does not have.
    """
    found = []
    for i in range(ours.num_hidden_layers):
        entry = ours.pattern[i % len(ours.pattern)]
        mixer, _, channel = entry.partition("/")
        block = ours.blocks.get(entry) or dict(
            kind="residual", mixer=ours.mixers[mixer], channel=ours.channels[channel]
        )
        kinds = block["kind"], *(block[x]["kind"] for x in ("mixer", "channel") if x in block)
        if kinds not in (("residual", "gated_deltanet", "swiglu"), ("post_norm", "attention", "swiglu")):
            raise ValueError(f"OLMo-Hybrid cannot express: layer {i}, {entry!r}, {' of '.join(kinds)}")
        found.append((block["mixer"], block["channel"]))
    return found
