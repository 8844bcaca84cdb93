"""A model's projections as W8ASpike: int8 weights in groups, and a product of whole numbers with spike counts.

    model = quantise(SeqZooForCausalLM.from_pretrained(folder))
    model.save_pretrained(small)  # int8 in its safetensors; from_pretrained opens it

Source: SpikingBrain, arXiv 2509.05276. The released W8ASpike leaves the head and the embeddings as they are, and in its
forward the MLPs' down projections (`skip=["down_proj"]`); it does calibrate, on 128 texts, which we do not.
"""

from typing import Any, NamedTuple

from torch import nn

from seqzoo.kernels.spike.op import MOST
from seqzoo.layers.spike_linear import W8ASpike
from seqzoo.models.projections import Projection, options, projections, refuse_own

KINDS = ("w8aspike",)


class Quantisation(NamedTuple):
    """The options of `quantisation` in a model's config."""

    kind: str = "w8aspike"
    k: float = 3.0  # mean absolute value over threshold, as in AdaptiveSpike
    group: int = 128  # input channels that share a scale
    head: bool = False  # the head too, where it is not the embedding
    skip: list[str] = []  # regular expressions: projections in whose name one is found are left as they are


def quantisation_spec(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """With every default written out. Raises ValueError: an unknown key, or a value out of its range."""
    if given is None:
        return None
    spec = options(Quantisation, given, "quantisation")
    if spec["kind"] not in KINDS:
        raise ValueError(f"quantisation: kind: expected one of {', '.join(KINDS)}, got {spec['kind']!r}")
    group = spec["group"]
    if isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= MOST:
        raise ValueError(f"quantisation: group: expected 1 to {MOST} channels, got {group!r}")
    return spec


def quantise(
    model: nn.Module, *, k: float = 3.0, group: int = 128, head: bool = False, skip: list[str] | None = None
) -> nn.Module:
    """Round a model's weights to int8 and put W8ASpike in the place of its projections.

    Args:
        model: changed, and its config with it; where weights turn out not to be finite, half of it.
        k, group, head, skip: see `Quantisation`.

    Returns:
        The model.

    Raises:
        ValueError: a model that is quantised already, an option out of its range, a head that is the embedding, a part
            with matrices of its own that cannot be quantised, or weights that are not finite.
    """
    if model.config.quantisation is not None:
        raise ValueError(f"quantise: expected a model with float weights, got {model.config.quantisation}")
    spec = quantisation_spec(dict(k=k, group=group, head=head, skip=skip or []))
    place_int8(model, spec, fill=True)
    model.config.quantisation = spec
    return model


def place_int8(model: nn.Module, spec: dict[str, Any], *, fill: bool) -> None:
    """Put W8ASpike where a complete spec says; `fill`: with the weights that are there, otherwise with none yet."""
    if spec["head"] and model.config.tie_word_embeddings:
        raise ValueError("quantisation: head: expected false where the head is the embedding, got true")
    chosen = projections(model, head=spec["head"], skip=spec["skip"], what="quantisation")
    owners: dict[nn.Module, list[Projection]] = {}  # parts with matrices of their own
    for projection in chosen:
        if projection.linear is None:
            owners.setdefault(projection.parent, []).append(projection)
    for owner, own in owners.items():
        if not hasattr(owner, "quantise_experts"):
            refuse_own(own[0], "quantisation")
        if len(own) < len(owner.SPIKES):
            raise ValueError(f"quantisation: skip: expected none of a mixture's matrices or all, got not {own[0].name}")
    sizes = dict(k=spec["k"], group=spec["group"])
    for projection in chosen:
        if projection.linear is not None:
            _place_layer(projection, sizes, fill)
    for owner in owners:
        owner.quantise_experts(**sizes, fill=fill)


def _place_layer(projection: Projection, sizes: dict[str, Any], fill: bool) -> None:
    linear = projection.linear
    layer = W8ASpike(linear.in_features, linear.out_features, bias=linear.bias is not None, **sizes)
    if fill:
        layer.fill(linear)
    setattr(projection.parent, projection.attribute, layer)
