"""What Qwen3-Next and Qwen3.5 share: three layers of Gated DeltaNet, then one of gated attention, with MLPs or experts.

q_proj is [query | gate] in each query head; ours lie part by part. On disk experts are single matrices, or piled up.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from seqzoo.layers.registry import Spec
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.plain import (
    PASSED,
    Table,
    attention_fields,
    attention_rows,
    block_rows,
    expert_rows,
    mlp_fields,
    mlp_rows,
    moe_fields,
    moe_spec,
    rope_spec,
    specs_of,
    written_out,
)
from seqzoo.models.convert.rules import COPY, SQUEEZE, Row, deal, describe, differences, ends, join, period

KEPT = r"(model\.visual|mtp)\..*|.*\.rotary_emb\.inv_freq"  # theirs that ours has no room for
_PREFIXES = ("model.", "model.language_model.")
_PARTS = {"linear_attention": "delta", "full_attention": "full"}
_FURTHER: Table = [
    ("pre_fc_norm_embedding.weight", "embed_norm.weight", COPY),
    ("pre_fc_norm_hidden.weight", "hidden_norm.weight", COPY),
    ("fc.weight", "proj.weight", COPY),
    ("norm.weight", "stack.norm.weight", COPY),
]
_KINDS = {"gated_deltanet": "linear_attention", "attention": "full_attention"}


class Hybrid(NamedTuple):
    """An architecture of this kind."""

    title: str
    config: type[PreTrainedConfig]
    model: str  # transformers' class
    delta_rows: Callable[[Spec], Table]  # of the projections of a Gated DeltaNet
    is_sparse: Callable[[Any, int], bool]  # whether layer i has experts
    renormalise: Callable[[Any], bool]  # the weights of a token's experts
    of_sparse: Callable[[list[bool]], dict[str, Any]]  # back to their fields
    further: str | None = None  # their field: blocks of multi-token prediction, where those are to be ours

    def to_ours(self, theirs: dict[str, Any]) -> SeqZooConfig:
        """Their config.json, of any transformers version, as ours.

        Raises:
            ValueError: what transformers itself refuses, or a feature that ours lacks.
        """
        try:
            c = self.config.from_dict(dict(theirs))
        except Exception as error:  # transformers' validators raise classes of their own
            raise ValueError(f"config.json: no {self.title} config: {' '.join(str(error).split())}") from None
        self._check(c)
        entries = [f"{_PARTS[kind]}/{'moe' if self.is_sparse(c, i) else 'mlp'}" for i, kind in enumerate(c.layer_types)]
        further = [f"full/{'moe' if self.is_sparse(c, i) else 'mlp'}" for i in range(self._further(theirs))]
        used = {name for entry in [*entries, *further] for name in entry.split("/")}
        parts = {
            "delta": _delta,
            "full": _full,
            "moe": lambda c: moe_spec(c, self.renormalise(c), shared_width=c.shared_expert_intermediate_size),
            "mlp": lambda c: dict(kind="swiglu", width=c.intermediate_size),
        }
        specs = {name: make(c) for name, make in parts.items() if name in used}
        return SeqZooConfig(
            pattern=period(entries),
            mixers={name: specs[name] for name in ("delta", "full") if name in specs},
            channels={name: specs[name] for name in ("moe", "mlp") if name in specs},
            norm_eps=c.rms_norm_eps,
            mtp=dict(pattern=further) if further else None,
            architectures=["SeqZooForCausalLM"],
            **{name: getattr(c, name) for name in PASSED},
        )

    def to_theirs(self, ours: SeqZooConfig) -> dict[str, Any]:
        """Our config as their config.json.

        Raises:
            ValueError: what theirs cannot express, by name.
        """
        theirs = self.config(**self._derive(ours), architectures=[self.model]).to_dict()
        lost = differences(written_out(describe(ours)), describe(self.to_ours(theirs)))
        if lost:
            raise ValueError(f"{self.title} cannot express: {'; '.join(lost)}")
        return theirs

    def rows(self, ours: SeqZooConfig, names: Collection[str], prefix: str = "model.") -> list[Row]:
        """`names`: their tensors where they are known, which says what they begin with and how experts are stored; else
        as published. A text part that transformers took out of a folder with vision may keep that one's names."""
        prefix = next((x for x in _PREFIXES if f"{x}embed_tokens.weight" in names), prefix)
        table = ends(f"{prefix}embed_tokens.weight", ours, names)
        for i, (mixer, channel) in enumerate(self._specs(ours)):
            theirs = f"{prefix}layers.{i}."
            table += self._layer_rows(theirs, f"stack.blocks.{i}.", mixer, channel, names)
        table += [Row((f"{prefix}norm.weight",), ("stack.norm.weight",), COPY)]
        return table if ours.mtp is None else table + self._further_rows(ours, names)

    def _layer_rows(self, theirs: str, mine: str, mixer: Spec, channel: Spec, names: Collection[str]) -> list[Row]:
        block: Table = [("input_layernorm.weight", "mixer_norm.weight", COPY)]
        block += self._mixer_rows(mixer)
        block += [("post_attention_layernorm.weight", "channel_norm.weight", COPY)]
        if channel["kind"] == "moe":
            block += expert_rows(channel["num_experts"], f"{theirs}mlp.experts.gate_up_proj" in names)
            block += mlp_rows("mlp.shared_expert", "channel.shared")
            block += [("mlp.shared_expert_gate.weight", "channel.shared_gate.weight", COPY)]
        else:
            block += mlp_rows("mlp", "channel")
        return block_rows(theirs, mine, block)

    def _further_rows(self, ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
        """Of multi-token prediction."""
        table = block_rows("mtp.", "mtp.", _FURTHER)
        for i, entry in enumerate(ours.mtp["pattern"]):
            mixer, channel = entry.split("/")
            specs = ours.mixers[mixer], ours.channels[channel]
            table += self._layer_rows(f"mtp.layers.{i}.", f"mtp.stack.blocks.{i}.", *specs, names)
        return table

    def _further(self, theirs: dict[str, Any]) -> int:
        count = theirs.get(self.further) or 0
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"config.json: {self.further}: expected a whole number, 0 or more, got {count!r}")
        return count

    def _mixer_rows(self, spec: Spec) -> Table:
        if spec["kind"] == "attention":
            return _full_rows(spec)
        return self.delta_rows(spec) + [
            ("linear_attn.conv1d.weight", "mixer.conv.weight", SQUEEZE),
            ("linear_attn.A_log", "mixer.a_log", COPY),
            *((f"linear_attn.{x}", f"mixer.{x}", COPY) for x in ("dt_bias", "norm.weight", "out_proj.weight")),
        ]

    def _check(self, c: Any) -> None:
        kinds, shared = set(c.layer_types), getattr(c, "shared_expert_intermediate_size", 0)
        sparse = any(self.is_sparse(c, i) for i in range(c.num_hidden_layers))
        quantized = getattr(c, "quantization_config", None)
        for name, got, expected, fits in (
            ("hidden_act", c.hidden_act, "'silu'", c.hidden_act in ("silu", "swish")),
            ("attention_dropout", c.attention_dropout, "0", not c.attention_dropout),
            ("layer_types", sorted(kinds), sorted(_PARTS), kinds <= set(_PARTS)),
            ("shared_expert_intermediate_size", shared, "at least 1", shared >= 1 or not sparse),
            ("quantization_config", quantized, "none", quantized is None),
        ):
            if not fits:
                raise ValueError(f"config.json: {name}: expected {expected}, got {got!r}")

    def _derive(self, ours: SeqZooConfig) -> dict[str, Any]:
        """Their config's arguments, from the first part of each kind; whether all fit them, `to_theirs` sees."""
        kinds, sparse, found = [], [], {}
        for mixer, channel in self._specs(ours):
            for spec in (mixer, channel):
                found.setdefault(spec["kind"], spec)
            kinds.append(_KINDS[mixer["kind"]])
            sparse.append(channel["kind"] == "moe")
        arguments = {name: getattr(ours, name) for name in PASSED if getattr(ours, name, None) is not None}
        arguments |= dict(
            layer_types=kinds, rms_norm_eps=ours.norm_eps, tie_word_embeddings=ours.tie_word_embeddings
        )  # fmt: skip
        takers = {"gated_deltanet": _from_delta, "attention": _from_full, "moe": _from_moe, "swiglu": mlp_fields}
        for kind, spec in found.items():
            arguments |= takers[kind](spec)
        known = set(self.config().to_dict())
        arguments |= self.of_sparse(sparse)
        further = {} if self.further is None or ours.mtp is None else {self.further: len(ours.mtp["pattern"])}
        return {name: value for name, value in arguments.items() if name in known} | further

    def _specs(self, ours: SeqZooConfig) -> list[tuple[Spec, Spec]]:
        return specs_of(ours, self.title, set(_KINDS), {"moe", "swiglu"})


class Seeing(NamedTuple):
    """A checkpoint whose text part is such a hybrid; its eyes are kept for the way back."""

    text: Hybrid
    config: type[PreTrainedConfig]
    model: str

    def to_ours(self, theirs: dict[str, Any]) -> SeqZooConfig:
        """The text part of their config.json as ours. Raises ValueError: as `Hybrid.to_ours`, or no text part."""
        text = theirs.get("text_config")
        if not isinstance(text, dict):
            raise ValueError(f"config.json: text_config: expected a mapping, got {text!r}")
        above = {name: theirs[name] for name in ("tie_word_embeddings", "dtype", "torch_dtype") if name in theirs}
        return self.text.to_ours(text | above)

    def to_theirs(self, ours: SeqZooConfig) -> dict[str, Any]:
        """Raises ValueError: what theirs cannot express, by name."""
        text = self.text.to_theirs(ours)
        above = dict(tie_word_embeddings=ours.tie_word_embeddings, architectures=[self.model])
        return self.config(text_config=text, **above).to_dict()

    def rows(self, ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
        """As `Hybrid.rows`."""
        return self.text.rows(ours, names, prefix=_PREFIXES[1])

    def added(self, ours: SeqZooConfig) -> dict[str, Tensor]:
        """Raises ValueError: a model that came from no such folder has no eyes."""
        alone = self.text.config.model_type
        raise ValueError(f"{self.text.title} with vision: expected a folder that came of one; write {alone!r} instead")


def flat_rows(spec: Spec) -> Table:
    """Qwen3.5's projections of a Gated DeltaNet, part by part."""
    heads = [spec["num_value_heads"]] * 2
    return [
        ("linear_attn.in_proj_qkv.weight", "mixer.qkv_proj.weight", COPY),
        ("linear_attn.in_proj_z.weight", "mixer.gate_proj.weight", COPY),
        (tuple(f"linear_attn.in_proj_{x}.weight" for x in "ba"), "mixer.ba_proj.weight", join(heads)),
    ]


def _full_rows(spec: Spec) -> Table:
    query_and_gate = deal(spec["num_heads"], (spec["head_width"],) * 2, hands=(1, 1))
    return [
        (those, (these, these.replace("q_proj", "gate_proj")), query_and_gate)
        if ".q_proj." in those
        else (those, these, how)
        for those, these, how in attention_rows(spec)
    ]


def _delta(c: Any) -> Spec:
    return dict(
        kind="gated_deltanet",
        num_key_heads=c.linear_num_key_heads,
        num_value_heads=c.linear_num_value_heads,
        key_width=c.linear_key_head_dim,
        value_width=c.linear_value_head_dim,
        conv_width=c.linear_conv_kernel_dim,
        norm_eps=c.rms_norm_eps,
    )


def _full(c: Any) -> Spec:
    return dict(
        kind="attention",
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_width=c.head_dim,
        qk_norm="zero_centred",
        output_gate=True,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        norm_eps=c.rms_norm_eps,
        **rope_spec(c, c.head_dim),
    )


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
