"""A model's projections as W8ASpike: int8 weights in groups, and a product of whole numbers with spike counts.

    model = quantise(SeqZooForCausalLM.from_pretrained(folder), calibration=ids)
    model.save_pretrained(small)  # int8 in its safetensors; from_pretrained opens it

Source: SpikingBrain, arXiv 2509.05276. The released W8ASpike leaves the head and the embeddings as they are, and in its
forward the MLPs' down projections (`skip=["down_proj"]`). It is calibrated on 128 texts, how is not said: here as GPTQ
(arXiv 2210.17323) is, see `layers/rounding.py`.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.spike import spike
from seqzoo.kernels.spike.op import MOST
from seqzoo.layers.rounding import moments_of
from seqzoo.layers.spike_linear import W8ASpike, W8ASpikeStack
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
    model: nn.Module, *, k: float = 3.0, group: int = 128, head: bool = False, skip: list[str] | None = None,
    calibration: Tensor | None = None,
) -> nn.Module:  # fmt: skip
    """Round a model's weights to int8 and put W8ASpike in the place of its projections.

    Args:
        model: changed, and its config with it; where weights turn out not to be finite, half of it.
        k, group, head, skip: see `Quantisation`.
        calibration: ids [rows, T] of a text, on which a matrix's errors are made to make up for each other; None rounds
            every weight to its nearest step.

    Returns:
        The model.

    Raises:
        ValueError: a model that is quantised already, an option out of its range, a head that is the embedding, a part
            with matrices of its own that cannot be quantised, weights that are not finite, or what `moments` refuses.
    """
    if model.config.quantisation is not None:
        raise ValueError(f"quantise: expected a model with float weights, got {model.config.quantisation}")
    spec = quantisation_spec(dict(k=k, group=group, head=head, skip=skip or []))
    place_int8(model, spec, fill=True, moments=None if calibration is None else moments(model, spec, calibration))
    model.config.quantisation = spec
    return model


@torch.no_grad()
def moments(model: nn.Module, spec: dict[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """What the projections are given on a text, as `layers/rounding.py` wants to know it.

    Measured where they will be: on spikes, in a model whose weights are rounded to the nearest.

    Args:
        model: of float weights; left as it is. Beside it stand the int8 weights, and `group` numbers per input channel.
        spec: complete.
        ids: [rows, T], one row at a time.

    Returns:
        name of a W8ASpike -> [G, n, n], of a stack of them [E, G, n, n], see `moments_of`. Zero where an expert had no
        tokens.

    Raises:
        ValueError: ids of another shape, or none; inputs that are not finite.
    """
    if ids.ndim != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"calibration: expected ids [rows, T], got {ids.dtype} of shape {tuple(ids.shape)}")
    given = {id(x): x for x in (*model.parameters(), *model.buffers())}
    rough = deepcopy(model, given).eval()  # on the same weights
    place_int8(rough, spec, fill=True)
    found: dict[str, Tensor] = {}

    def listen(name: str):
        def add(module: nn.Module, args: tuple) -> None:
            x, *expert = args
            seen = moments_of(spike(x, k=module.k).flatten(0, -2), module.group)
            if name not in found:
                experts = module.weight.shape[:1] if isinstance(module, W8ASpikeStack) else ()
                found[name] = seen.new_zeros(*experts, *seen.shape)
            found[name][tuple(expert)] += seen

        return add

    for name, module in rough.named_modules():
        if isinstance(module, W8ASpike | W8ASpikeStack):
            module.register_forward_pre_hook(listen(name))
    for row in ids.to(model.device).split(1):
        rough(row, use_cache=False)
    for name, x in found.items():
        if not x.isfinite().all():
            raise ValueError(f"calibration: {name}: expected finite inputs, got NaN or infinity on the text")
    return found


def place_int8(
    model: nn.Module, spec: dict[str, Any], *, fill: bool, moments: Mapping[str, Tensor] | None = None
) -> None:  # fmt: skip
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
    known = moments or {}
    for projection in chosen:
        if projection.linear is not None:
            _place_layer(projection, sizes, fill, known.get(projection.name))
    for owner, own in owners.items():
        seen = {p.attribute: known.get(stacked(p.name)) for p in own}
        owner.quantise_experts(**sizes, fill=fill, moments=seen)


def stacked(name: str) -> str:
    """Of a mixture's own matrix: the name of its int8 ones."""
    owner, _, attribute = name.rpartition(".")
    return f"{owner}.experts.{attribute}"


def _place_layer(projection: Projection, sizes: dict[str, Any], fill: bool, moments: Tensor | None) -> None:
    linear = projection.linear
    layer = W8ASpike(linear.in_features, linear.out_features, bias=linear.bias is not None, **sizes)
    if fill:
        layer.fill(linear, moments)
    setattr(projection.parent, projection.attribute, layer)
