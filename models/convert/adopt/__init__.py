"""How a mixer is made of an attention layer: one file per kind of mixer that can be.

    complete(attention, wanted) -> the mixer's whole spec, sizes from the attention layer's, options as wanted
    rows(attention, spec)       -> (names there, names here, how), relative to the mixer; what no row names is fresh
and, where something fresh should begin otherwise than the mixer itself begins it,
    fresh(spec)                 -> name -> its value
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.models.convert.plain import Table, attention_names
from seqzoo.models.convert.rules import COPY, How, Tensors


def adopters() -> list[str]:
    """The mixers that can be made of attention."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def adopter(kind: str) -> ModuleType:
    """Raises ValueError: none."""
    if kind not in adopters():
        raise ValueError(f"mixers: expected kinds that can be made of attention, {adopters()}, got {kind!r}")
    return import_module(f"{__name__}.{kind}")


def one_way(fate: str, there) -> How:
    """What has no way back: an approximate conversion keeps no account of what it leaves."""

    def back(*_: Tensor) -> Tensors:
        raise ValueError(f"{fate}: expected a conversion that has a way back, got an approximate one")

    return How(fate, there, back)


def refuse(kind: str, attention: Spec, *features: str) -> None:
    """Raises ValueError: attention that has what the mixer has no place for."""
    for name in features:
        if attention[name]:
            raise ValueError(
                f"{kind}: expected attention without {name}, for which it has no place, got {attention[name]!r}"
            )


def options(kind: str, wanted: Spec, derived: Spec) -> Spec:
    """The derived arguments and the wanted ones. Raises ValueError: a wanted one that is derived."""
    clash = sorted(set(wanted) & set(derived) - {"kind"})
    if clash:
        raise ValueError(f"{kind}: expected options beside what the attention layer decides, got {clash}")
    return {**derived, **wanted}


def out_bias(attention: Spec) -> bool:
    return attention["bias"] if attention["out_bias"] is None else attention["out_bias"]


def copied(attention: Spec) -> Table:
    """Every tensor of the attention layer under its own name."""
    return [(name, name, COPY) for name in attention_names(attention)]


def repeat_heads(x: Tensor, attention: Spec) -> Tensor:
    """[G K, ...] -> [H K, ...]: each key head for every query head that reads it."""
    H, G = attention["num_heads"], attention["num_kv_heads"]
    return x.unflatten(0, (G, -1)).repeat_interleave(H // G, dim=0).flatten(0, 1)


def norm_weight(x: Tensor, attention: Spec) -> Tensor:
    """What a norm of q or k multiplies a head's channels by."""
    return x + 1 if attention["qk_norm"] == "zero_centred" else x


def biased(bias: bool) -> tuple[str, ...]:
    """What a linear layer has."""
    return ("weight", "bias") if bias else ("weight",)


def projected(x: str, what: str, attention: Spec) -> tuple[tuple[str, ...], Callable[..., Tensor]]:
    """The weight or bias of q, k or v for a mixer without their norms: names, and what is made of their tensors.

    Rows of a head that is normed become as large as the norm makes its channels, for inputs that are 1 in the mean
    square and do not go together: where the norm in front of the mixer has weights far from 1, by so much too large or
    small.
    """
    if x == "v" or attention["qk_norm"] is None:
        return (f"{x}_proj.{what}",), lambda given: given

    def read(norm: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        scale, squares = norm_weight(norm, attention).float(), weight.float().square().sum(-1)
        squares = (squares + bias[0].float().square() if bias else squares).view(-1, scale.numel())
        scale = scale / squares.mean(1, keepdim=True).sqrt()  # [H, K]; of a joint norm all heads are one
        given = weight if what == "weight" else bias[0]
        return (given * scale.view(-1, *[1] * (given.ndim - 1))).to(given.dtype)

    return (f"{x}_norm.weight", *(f"{x}_proj.{part}" for part in biased(attention["bias"]))), read


def under(prefix: str, table: Table) -> Table:
    """The new mixer's names with a prefix."""
    put = lambda x: prefix + x if isinstance(x, str) else tuple(prefix + name for name in x)
    return [(those, put(these), how) for those, these, how in table]


def as_it_is(conv_channels: int, conv_width: int, scale: Tensor | None = None) -> Tensor:
    """Filters of a causal convolution that give each token itself, times `scale`."""
    like = torch.zeros(conv_channels, conv_width) if scale is None else scale.new_zeros(conv_channels, conv_width)
    like[:, -1] = 1 if scale is None else scale
    return like
