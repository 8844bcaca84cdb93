"""SpikingBrain-7B: the rows and the config, both ways.

Layers of even number, counted from 0, are gated linear attention, the others softmax attention in a sliding window.
Their decoding keeps `sliding_window` tokens, the new one among them, as the report has it and as `window` says in ours;
their prefill sees one more. For its numbers set mixers.window.window one higher in our config.json.
Source: arXiv 2509.05276 and the released SpikingBrain-7B. Transformers does not know the architecture, so config.json
is read here, and strictly: a field that is not named below is refused. The int8 W8ASpike folders are not read.
"""

from collections.abc import Collection
from typing import Any

from seqzoo.layers.registry import Spec
from seqzoo.models.config import PASSED_ON, SeqZooConfig
from seqzoo.models.convert.rules import COPY, Row, describe, differences, ends, period

KEPT = r".*\.inv_freq"  # theirs that ours has no room for
QUANTIZED = (".weight_quantizer.scales", ".weight_quantizer.zeros", ".attn.gk_proj.weight")
DEFAULTS = dict(  # their class's own, where config.json is silent
    vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    intermediate_size=18944, max_position_embeddings=131072, sliding_window=4096, norm_eps=1e-6, rope_theta=1e6,
    initializer_range=0.02, use_cache=True, tie_word_embeddings=False, pad_token_id=None, bos_token_id=151643,
    eos_token_id=151643,
)  # fmt: skip
FIXED = dict(  # what ours cannot do otherwise
    hidden_act=("swish", "silu"), use_short_conv=(False,), elementwise_affine=(True,), attention_dropout=(0,),
    gate_low_rank_dim=(16,), gate_logit_normalizer=(16,), rope_scaling=(None,), quant_weight_group_size=(None,),
    quantization_config=(None,),
)  # fmt: skip
IGNORED = {"attn_layers", "attn_mode", "conv_size", "fuse_cross_entropy"}  # derived, or of no consequence here
_PASSED = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "initializer_range", "use_cache"),
    *("tie_word_embeddings", "norm_eps", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def to_ours(theirs: dict[str, Any]) -> SeqZooConfig:
    """Their config.json as ours.

    Raises:
        ValueError: a field that is unknown, or that asks for what ours lacks.
    """
    _check(theirs)
    c = DEFAULTS | theirs
    depth, parts = c["num_hidden_layers"], {"linear": _linear(c), "window": _window(c)}
    entries = ["window/mlp" if i % 2 else "linear/mlp" for i in range(depth)]
    dtype = theirs.get("dtype", theirs.get("torch_dtype"))
    return SeqZooConfig(
        pattern=period(entries),
        mixers={name: spec for name, spec in parts.items() if f"{name}/mlp" in entries},
        channels={"mlp": dict(kind="swiglu", width=c["intermediate_size"])},
        norm="rms",
        architectures=["SeqZooForCausalLM"],
        **({} if dtype is None else dict(dtype=dtype)),
        **{name: c[name] for name in _PASSED},
    )


def to_theirs(ours: SeqZooConfig) -> dict[str, Any]:
    """Our config as their config.json.

    Raises:
        ValueError: what SpikingBrain-7B cannot express, by name.
    """
    theirs = dict(architectures=["GLAswaForCausalLM"], model_type="gla_swa", **_derive(ours))
    mine = describe(ours)
    for name in [name for name, value in mine.items() if name.endswith(" mixer rotary_width") and value is None]:
        mine[name] = mine[name.replace("rotary_width", "head_width")]  # None is all
    try:
        lost = differences(mine, describe(to_ours(theirs)))
    except ValueError as error:
        lost = [str(error)]
    if lost:
        raise ValueError(f"SpikingBrain-7B cannot express: {'; '.join(lost)}")
    return theirs


def rows(ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
    """`names`: their tensors where they are known. Raises ValueError: they are quantized."""
    scales = sorted(name for name in names if name.endswith(QUANTIZED))
    if scales:
        raise ValueError(f"{scales[0]}: expected plain weights, got those of a quantized (W8ASpike) checkpoint")
    table = ends("model.embeddings.weight", ours, names)
    for i in range(ours.num_hidden_layers):
        theirs, these = f"model.layers.{i}.", f"stack.blocks.{i}."
        for a, b in [*_SHARED, *(() if i % 2 else _LINEAR)]:
            table.append(Row((theirs + a,), (these + b,), COPY))
    return [*table, Row(("model.norm.weight",), ("stack.norm.weight",), COPY)]


_SHARED = [
    ("attn_norm.weight", "mixer_norm.weight"),
    *((f"attn.{x}_proj.{what}", f"mixer.{x}_proj.{what}") for x in "qkv" for what in ("weight", "bias")),
    ("attn.o_proj.weight", "mixer.out_proj.weight"),
    ("mlp_norm.weight", "channel_norm.weight"),
    *((f"mlp.{x}_proj.weight", f"channel.{x}_proj.weight") for x in ("gate", "up", "down")),
]
_LINEAR = [
    ("attn.gk_proj.0.weight", "mixer.decay_down.weight"),
    ("attn.gk_proj.1.weight", "mixer.decay_up.weight"),
    ("attn.gk_proj.1.bias", "mixer.decay_up.bias"),
    ("attn.g_norm.weight", "mixer.norm.weight"),
]


def _check(theirs: dict[str, Any]) -> None:
    unknown = set(theirs) - set(DEFAULTS) - set(FIXED) - IGNORED - PASSED_ON
    if unknown:
        raise ValueError(f"config.json: no field of gla_swa that is known: {sorted(unknown)}")
    for name, values in FIXED.items():
        if name in theirs and theirs[name] not in values:
            raise ValueError(f"config.json: {name}: expected {values[0]!r}, got {theirs[name]!r}")
    c = DEFAULTS | theirs
    for name in (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("vocab_size", "max_position_embeddings"),
    ):
        if not isinstance(c[name], int) or c[name] < 1:
            raise ValueError(f"config.json: {name}: expected 1 or more, got {c[name]!r}")
    groups = c["num_key_value_heads"]
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise ValueError(f"config.json: num_key_value_heads: expected 1 or more, or null, got {groups!r}")
    for name in ("norm_eps", "rope_theta"):
        if not isinstance(c[name], int | float) or not c[name] > 0:
            raise ValueError(f"config.json: {name}: expected a number above 0, got {c[name]!r}")
    if c["hidden_size"] % (2 * c["num_attention_heads"]):
        wanted = f"heads of an even width in hidden_size={c['hidden_size']}"
        raise ValueError(f"config.json: num_attention_heads: expected {wanted}, got {c['num_attention_heads']}")
    odd = list(range(1, c["num_hidden_layers"], 2))
    if theirs.get("attn_layers", odd) != odd:
        raise ValueError(f"config.json: attn_layers: expected {odd}, which they derive, got {theirs['attn_layers']}")


def _heads(c: dict[str, Any]) -> dict[str, int]:
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    return dict(num_heads=heads, num_kv_heads=heads if groups is None else groups)


def _linear(c: dict[str, Any]) -> Spec:
    width = c["hidden_size"] // c["num_attention_heads"]
    return dict(
        kind="linear_attention", **_heads(c), key_width=width, value_width=width, feature="relu", decay="channel",
        decay_rank=16, decay_scale=16.0, bias=True, norm_eps=c["norm_eps"],
    )  # fmt: skip


def _window(c: dict[str, Any]) -> Spec:
    width = c["hidden_size"] // c["num_attention_heads"]
    return dict(
        kind="attention", **_heads(c), head_width=width, rotary_width=width, window=c["sliding_window"],
        rope_theta=float(c["rope_theta"]), bias=True, out_bias=False, norm_eps=c["norm_eps"],
    )  # fmt: skip


def _derive(ours: SeqZooConfig) -> dict[str, Any]:
    """Their fields, from the first part of each kind; whether all fit them, `to_theirs` sees."""
    found: dict[str, Spec] = {}
    for i in range(ours.num_hidden_layers):
        mixer, slash, channel = ours.pattern[i % len(ours.pattern)].partition("/")
        wanted = "attention" if i % 2 else "linear_attention"
        kinds = [ours.mixers[mixer]["kind"], ours.channels[channel]["kind"]] if slash else [mixer]
        if kinds != [wanted, "swiglu"]:
            raise ValueError(f"SpikingBrain-7B cannot express: layer {i}, {kinds}; it has {[wanted, 'swiglu']}")
        found |= {wanted: found.get(wanted, ours.mixers[mixer]), "swiglu": found.get("swiglu", ours.channels[channel])}
    heads = next((found[kind] for kind in ("linear_attention", "attention") if kind in found), {})
    window = found.get("attention", {})
    fields = {name: getattr(ours, name, None) for name in _PASSED}
    fields |= {theirs: spec[mine] for theirs, spec, mine in (
        ("num_attention_heads", heads, "num_heads"), ("num_key_value_heads", heads, "num_kv_heads"),
        ("sliding_window", window, "window"), ("rope_theta", window, "rope_theta"),
        ("intermediate_size", found.get("swiglu", {}), "width"),
    ) if mine in spec}  # fmt: skip
    if ours.dtype is not None:
        fields["torch_dtype"] = str(ours.dtype).removeprefix("torch.")
    odd = list(range(1, ours.num_hidden_layers, 2))
    return fields | {name: values[0] for name, values in FIXED.items() if values[0] is not None} | dict(attn_layers=odd)
