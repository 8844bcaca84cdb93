"""What the plain Transformers share: Llama and those with its tensors' names. A file of theirs says what is its own.

Block by block: RMS norm, softmax attention with rotary positions, residual; RMS norm, gated MLP or experts, residual.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.rules import COPY, How, Row, describe, differences, ends, period, pile

KEPT = r".*\.rotary_emb\.inv_freq"  # theirs that ours has no room for
PASSED = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "initializer_range", "use_cache"),
    *("tie_word_embeddings", "dtype", "pad_token_id", "bos_token_id", "eos_token_id"),
)
Names = str | tuple[str, ...]
Table = list[tuple[Names, Names, How]]  # of one block


class Family(NamedTuple):
    """An architecture of this kind. `windows` and `biases` are told by a config of theirs."""

    title: str
    config: type[PreTrainedConfig]
    model: str  # transformers' class
    qk_norm: str | None = None
    windows: Callable[[Any], list[int | None]] = lambda c: [None] * c.num_hidden_layers  # [tokens] of each layer
    biases: Callable[[Any], tuple[bool, bool]] = lambda c: (False, False)  # of q, k and v; of the output
    of_windows: Callable[[list[int | None]], dict[str, Any]] = lambda windows: {}  # back to their fields
    of_biases: Callable[[bool, bool], dict[str, Any]] = lambda qkv, out: {}

    def to_ours(self, theirs: dict[str, Any]) -> SeqZooConfig:
        """Their config.json, of any transformers version, as ours.

        Raises:
            ValueError: what transformers itself refuses, or a feature that ours lacks.
        """
        c = self._read(theirs)
        windows, sparse = self.windows(c), [is_sparse(c, i) for i in range(c.num_hidden_layers)]
        several = len(set(windows) - {None}) > 1
        if several:
            raise ValueError(f"config.json: sliding_window: expected one, got {windows}")
        names = {None: "full", **{w: "window" for w in windows if w is not None}}
        entries = [f"{names[w]}/{'moe' if s else 'mlp'}" for w, s in zip(windows, sparse, strict=True)]
        channels = {
            "mlp": lambda: dict(kind="swiglu", width=c.intermediate_size, bias=bool(getattr(c, "mlp_bias", False))),
            "moe": lambda: moe_spec(c, c.norm_topk_prob, shared_width=0),
        }
        return SeqZooConfig(
            pattern=period(entries),
            mixers={names[w]: self._attention(c, w) for w in dict.fromkeys(windows)},
            channels={name: make() for name, make in channels.items() if any(x.endswith(name) for x in entries)},
            norm="rms",
            norm_eps=c.rms_norm_eps,
            architectures=["SeqZooForCausalLM"],
            **{name: getattr(c, name) for name in PASSED},
        )

    def to_theirs(self, ours: SeqZooConfig) -> dict[str, Any]:
        """Our config as their config.json.

        Raises:
            ValueError: what theirs cannot express, by name.
        """
        cannot = f"{self.title} cannot express: "
        specs = specs_of(ours, self.title, {"attention"}, {"swiglu", "moe"})
        if not specs:
            raise ValueError(f"{cannot}a model without layers")
        fields = passed_fields(ours)
        fields |= dict(rms_norm_eps=ours.norm_eps, tie_word_embeddings=ours.tie_word_embeddings)
        mixer = specs[0][0]
        fields |= self.of_windows([mixer["window"] for mixer, _ in specs])
        fields |= self.of_biases(mixer["bias"], mixer["bias"] if mixer["out_bias"] is None else mixer["out_bias"])
        fields |= attention_fields(mixer)
        if fields["rope_parameters"]["partial_rotary_factor"] == 1.0:
            del fields["rope_parameters"]["partial_rotary_factor"]
        if fields["head_dim"] * mixer["num_heads"] == ours.hidden_size and "head_dim" not in vars(self.config):
            del fields["head_dim"]
        for channel in {channel["kind"]: channel for _, channel in specs}.values():
            fields |= mlp_fields(channel) if channel["kind"] == "swiglu" else moe_fields(channel)
        if any(channel["kind"] == "moe" for _, channel in specs):
            fields["mlp_only_layers"] = [i for i, (_, channel) in enumerate(specs) if channel["kind"] == "swiglu"]
        theirs = self.config(**fields, architectures=[self.model]).to_dict()
        try:
            lost = differences(written_out(describe(ours)), describe(self.to_ours(theirs)))
        except ValueError as error:
            lost = [str(error)]
        if lost:
            raise ValueError(f"{cannot}{'; '.join(lost)}")
        return theirs

    def rows(self, ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
        """`names`: their tensors where they are known, which says how their experts are stored; else as published."""
        table = ends("model.embed_tokens.weight", ours, names)
        for i, (mixer, channel) in enumerate(specs_of(ours, self.title, {"attention"}, {"swiglu", "moe"})):
            theirs = f"model.layers.{i}."
            block = [("input_layernorm.weight", "mixer_norm.weight", COPY), *attention_rows(mixer)]
            block += [("post_attention_layernorm.weight", "channel_norm.weight", COPY)]
            if channel["kind"] == "moe":
                block += expert_rows(channel["num_experts"], f"{theirs}mlp.experts.gate_up_proj" in names)
            else:
                block += mlp_rows("mlp", "channel", channel["bias"])
            table += block_rows(theirs, f"stack.blocks.{i}.", block)
        return [*table, Row(("model.norm.weight",), ("stack.norm.weight",), COPY)]

    def _read(self, theirs: dict[str, Any]) -> Any:
        try:
            config = self.config.from_dict(dict(theirs))
        except Exception as error:  # transformers' validators raise classes of their own
            raise ValueError(f"config.json: no {self.title} config: {' '.join(str(error).split())}") from None
        turned = config.rope_parameters.get("partial_rotary_factor", 1.0)
        quantized, split = getattr(config, "quantization_config", None), getattr(config, "pretraining_tp", 1)
        for name, got, expected, fits in (
            ("hidden_act", config.hidden_act, "'silu'", config.hidden_act in ("silu", "swish")),
            ("attention_dropout", config.attention_dropout, "0", not config.attention_dropout),
            ("quantization_config", quantized, "none", quantized is None),
            ("pretraining_tp", split, "1", split in (1, None)),
            ("partial_rotary_factor", turned, "1", turned in (1.0, None)),
        ):
            if not fits:
                raise ValueError(f"config.json: {name}: expected {expected}, got {got!r}")
        return config

    def _attention(self, c: Any, window: int | None) -> Spec:
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        bias, out_bias = self.biases(c)
        return dict(
            kind="attention", num_heads=c.num_attention_heads, num_kv_heads=c.num_key_value_heads, head_width=width,
            window=window, qk_norm=self.qk_norm, bias=bias, out_bias=out_bias, norm_eps=c.rms_norm_eps,
            **rope_spec(c, width),
        )  # fmt: skip


def passed_fields(ours: SeqZooConfig) -> dict[str, Any]:
    """What both configs say under one name. Tokens that a model made here does not name are none, whatever theirs would
    take them to be."""
    fields = {name: getattr(ours, name, None) for name in PASSED}
    if fields["dtype"] is None:
        del fields["dtype"]
    return fields


def by_layer_types(c: Any) -> list[int | None]:
    """Windows as `layer_types` has them. Raises ValueError: a kind that is neither."""
    known = "full_attention", "sliding_attention"
    if other := sorted({str(kind) for kind in c.layer_types if kind not in known}):
        raise ValueError(f"config.json: layer_types: expected {' and '.join(known)}, got {', '.join(other)}")
    return [c.sliding_window if kind == "sliding_attention" else None for kind in c.layer_types]


def of_layer_types(windows: list[int | None]) -> dict[str, Any]:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    found = next((window for window in windows if window is not None), None)
    return dict(layer_types=kinds, use_sliding_window=found is not None, sliding_window=found)


def rope_spec(c: Any, width: int) -> Spec:
    """Raises ValueError: an odd number of channels to turn."""
    unread = {
        "type",
        "mrope_section",
        "mrope_interleaved",
    }  # an old word; where pictures stand, which text does not ask
    rope = {name: value for name, value in c.rope_parameters.items() if name not in unread and value is not None}
    turned = int(width * rope.pop("partial_rotary_factor", 1.0))
    theta, kind = float(rope.pop("rope_theta")), rope.pop("rope_type", "default")
    if turned % 2:
        raise ValueError(f"config.json: partial_rotary_factor: expected an even number of channels, got {turned}")
    if kind == "yarn" and "factor" not in rope:
        rope["factor"] = c.max_position_embeddings / rope["original_max_position_embeddings"]
    scaling = None if kind == "default" else dict(rope_type=kind, **rope)
    return dict(rope_theta=theta, rope_scaling=scaling, rotary_width=turned)


def attention_fields(spec: Spec) -> dict[str, Any]:
    """Heads and positions of one of our attention layers, as config.json has them."""
    width = spec["head_width"]
    turned = width if spec["rotary_width"] is None else spec["rotary_width"]
    factor = turned / width
    if int(width * factor) != turned:  # rounded down, transformers would turn one channel less
        factor = math.nextafter(factor, 1.0)
    rope = dict(rope_type="default") | (spec["rope_scaling"] or {}) | dict(rope_theta=spec["rope_theta"])
    return dict(
        num_attention_heads=spec["num_heads"], num_key_value_heads=spec["num_kv_heads"], head_dim=width,
        rope_parameters=dict(rope, partial_rotary_factor=factor),
    )  # fmt: skip


def moe_spec(c: Any, renormalise: bool, *, shared_width: int) -> Spec:
    return dict(
        kind="moe", num_experts=c.num_experts, num_experts_per_token=c.num_experts_per_tok,
        expert_width=c.moe_intermediate_size, shared_width=shared_width, renormalise=renormalise,
        balance_coefficient=c.router_aux_loss_coef if c.output_router_logits else 0.0,
    )  # fmt: skip


def moe_fields(spec: Spec) -> dict[str, Any]:
    balanced = spec["balance_coefficient"] > 0
    return dict(
        num_experts=spec["num_experts"],
        num_experts_per_tok=spec["num_experts_per_token"],
        moe_intermediate_size=spec["expert_width"],
        norm_topk_prob=spec["renormalise"],
        output_router_logits=balanced,
        **(dict(router_aux_loss_coef=spec["balance_coefficient"]) if balanced else {}),
    )


def mlp_fields(spec: Spec) -> dict[str, Any]:
    return dict(intermediate_size=spec["width"], **(dict(mlp_bias=True) if spec["bias"] else {}))


def is_sparse(c: Any, i: int) -> bool:
    """Whether layer i has experts."""
    if not getattr(c, "num_experts", 0):
        return False
    return i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0


def attention_rows(spec: Spec) -> Table:
    out_bias = spec["bias"] if spec["out_bias"] is None else spec["out_bias"]
    table: Table = []
    for x, mine, bias in (*((x, x, spec["bias"]) for x in "qkv"), ("o", "out", out_bias)):
        for what in ("weight", "bias") if bias else ("weight",):
            table.append((f"self_attn.{x}_proj.{what}", f"mixer.{mine}_proj.{what}", COPY))
    norms = () if spec["qk_norm"] is None else "qk"
    return [*table, *((f"self_attn.{x}_norm.weight", f"mixer.{x}_norm.weight", COPY) for x in norms)]


def attention_names(spec: Spec) -> list[str]:
    """The tensors of one of our attention layers, as it names them."""
    names = [these.removeprefix("mixer.") for _, these, _ in attention_rows(spec)]
    gate = [f"gate_proj.{what}" for what in (("weight", "bias") if spec["bias"] else ("weight",))]
    return names + (gate if spec["output_gate"] else [])


def mlp_rows(theirs: str, ours: str, bias: bool = False) -> Table:
    return [
        (f"{theirs}.{x}_proj.{what}", f"{ours}.{x}_proj.{what}", COPY)
        for x in ("gate", "up", "down")
        for what in (("weight", "bias") if bias else ("weight",))
    ]


def expert_rows(experts: int, piled: bool) -> Table:
    """The router and the routed experts: single matrices on disk, or `piled` as in memory."""
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
    ]


def block_rows(theirs: str, ours: str, table: Table) -> list[Row]:
    """The rows of one block, its names written out."""
    listed = lambda prefix, names: tuple(prefix + x for x in ((names,) if isinstance(names, str) else names))
    return [Row(listed(theirs, those), listed(ours, these), how) for those, these, how in table]


def specs_of(ours: SeqZooConfig, title: str, mixers: set[str], channels: set[str]) -> list[tuple[Spec, Spec]]:
    """The mixer and the channel of every layer.

    Raises:
        ValueError: a part that they do not have.
    """
    found = []
    for i in range(ours.num_hidden_layers):
        entry = ours.pattern[i % len(ours.pattern)]
        mixer, slash, channel = entry.partition("/")
        if not slash:
            raise ValueError(f"{title} cannot express: layer {i}, block {entry!r}")
        found.append((ours.mixers[mixer], ours.channels[channel]))
        for spec, known in zip(found[-1], (mixers, channels), strict=True):
            if spec["kind"] not in known:
                raise ValueError(f"{title} cannot express: layer {i}, {spec['kind']!r}; it has {sorted(known)}")
    return found


def written_out(mine: dict[str, Any]) -> dict[str, Any]:
    """A description of ours with what stands for another argument's value written out: None is all, or as the other."""
    for what, default in (("rotary_width", "head_width"), ("out_bias", "bias")):
        for name in [name for name, value in mine.items() if name.endswith(f" mixer {what}") and value is None]:
            mine[name] = mine[name.removesuffix(what) + default]
    return mine
