"""BDH as released: the rows and the config, both ways, and a state dict in memory.

Their D_x and D_y lie [H, D, N], ours [H, N, D]; their E is one matrix [H N, D], their head [D, V]. Their config.json is
the fields of their config beside a model_type. A model that was saved compiled has a prefix at every name. The table
of frequencies (in turns per token, not radians) follows from the config; it is kept for the way back.
Source: the code released with arXiv 2509.26507.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.rules import COPY, How, Row, describe, differences

KEPT = r"(_orig_mod\.)?attn\.freqs"  # theirs that ours has no room for
_PREFIX = "_orig_mod."
_SIZES = dict(n_layer=6, n_embd=256, n_head=4, mlp_internal_dim_multiplier=128, vocab_size=256, dropout=0.1)
_PASSED = (
    *("max_position_embeddings", "initializer_range", "use_cache", "dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
_NOISE = {"model_type", "architectures", "transformers_version", "torch_dtype"}
_THETA = 65536.0

TRANSPOSED = How("transposed", lambda x: (x.mT.contiguous(),), lambda x: (x.mT.contiguous(),))


def _by_head(heads: int) -> How:
    return How("reshaped", lambda x: (x.unflatten(0, (heads, -1)),), lambda x: (x.flatten(0, 1),))


def to_ours(theirs: dict[str, Any]) -> SeqZooConfig:
    """Their config.json as ours; what it leaves out has the default of their code.

    Raises:
        ValueError: an unknown key, or sizes that do not fit.
    """
    return _config(theirs, ladders=1)


def _config(theirs: Mapping[str, Any], ladders: int) -> SeqZooConfig:
    unknown = sorted(set(theirs) - {*_SIZES, *_PASSED, *_NOISE})
    if unknown:
        raise ValueError(f"config.json: expected keys of {sorted({*_SIZES, *_PASSED})}, got {unknown}")
    sizes = _SIZES | {name: theirs[name] for name in _SIZES if name in theirs}
    for name in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size"):
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            raise ValueError(f"config.json: {name}: expected at least 1, got {sizes[name]!r}")
    spec = dict(
        kind="bdh",
        num_heads=sizes["n_head"],
        neurons=sizes["mlp_internal_dim_multiplier"] * sizes["n_embd"],
        dropout=sizes["dropout"],
        rope_theta=_THETA,
        ladders=ladders,
        norm_eps=1e-5,
    )
    return SeqZooConfig(
        hidden_size=sizes["n_embd"],
        vocab_size=sizes["vocab_size"],
        num_hidden_layers=sizes["n_layer"],
        pattern=["bdh"],
        blocks={"bdh": spec},
        tied=True,
        norm="layer",
        norm_eps=1e-5,
        embed_norm=True,
        final_norm=False,
        architectures=["SeqZooForCausalLM"],
        **{name: theirs[name] for name in _PASSED if name in theirs},
    )


def to_theirs(ours: SeqZooConfig) -> dict[str, Any]:
    """Our config as their config.json.

    Raises:
        ValueError: what BDH as released cannot express, by name.
    """
    spec = _spec(ours)
    theirs = dict(
        model_type="bdh",
        n_layer=ours.num_hidden_layers,
        n_embd=ours.hidden_size,
        n_head=spec["num_heads"],
        mlp_internal_dim_multiplier=spec["neurons"] // ours.hidden_size,
        vocab_size=ours.vocab_size,
        dropout=spec["dropout"],
    )
    defaults = SeqZooConfig()
    for name in _PASSED:
        value = getattr(ours, name, None)
        if value is not None and value != getattr(defaults, name, None):
            theirs[name] = str(value).removeprefix("torch.") if name == "dtype" else value
    lost = differences(describe(ours), describe(to_ours(theirs)))
    if lost:
        raise ValueError(f"BDH as released cannot express: {'; '.join(lost)}")
    return theirs


def rows(ours: SeqZooConfig, names: Collection[str]) -> list[Row]:
    """`names`: their tensors where they are known, which says whether they have the prefix."""
    prefix, block = _PREFIX if any(name.startswith(_PREFIX) for name in names) else "", "stack.blocks.0."
    return [
        Row((f"{prefix}{theirs}",), (mine,), how)
        for theirs, mine, how in (
            ("embed.weight", "embed_tokens.weight", COPY),
            ("encoder", f"{block}encoder", TRANSPOSED),
            ("encoder_v", f"{block}encoder_v", TRANSPOSED),
            ("decoder", f"{block}decoder", _by_head(_spec(ours)["num_heads"])),
            ("lm_head", "lm_head.weight", TRANSPOSED),
        )
    ]


def added(ours: SeqZooConfig) -> dict[str, Tensor]:
    """Their tensors that follow from the config, for a folder that has not kept them."""
    spec = _spec(ours)
    return {"attn.freqs": _frequencies(spec["neurons"] // spec["num_heads"], spec["ladders"])}


def check_kept(ours: SeqZooConfig, kept: Mapping[str, Tensor]) -> None:
    """Raises ValueError: frequencies that are not the one ladder of a config.json; it has no word for several."""
    spec = _spec(ours)
    for name, freqs in kept.items():
        found = _ladders(freqs, spec["neurons"] // spec["num_heads"])
        if found != spec["ladders"]:
            raise ValueError(
                f"{name}: expected {spec['ladders']} ladder, got {found}, as of merged models; "
                "from_bdh_state_dict reads them"
            )


def from_bdh_state_dict(
    state_dict: Mapping[str, Tensor], *, num_layers: int, dropout: float = 0.0
) -> SeqZooForCausalLM:
    """Our model from the state dict of a released one, or of several merged.

    Args:
        state_dict: with or without torch.compile's prefix. Its tensors are copied only where they must be turned.
        num_layers: how many levels; no tensor says so.
        dropout: of the model, in training; likewise.

    Raises:
        ValueError: tensors missing or unknown, shapes that do not fit, frequencies that are no ladders.
    """
    tensors = {name.removeprefix(_PREFIX): x.detach() for name, x in state_dict.items()}
    expected = {"embed.weight", "encoder", "encoder_v", "decoder", "lm_head", "attn.freqs"}
    if set(tensors) != expected or tensors["encoder"].ndim != 3:
        raise ValueError(f"state dict: expected {sorted(expected)}, encoder of [H, D, N], got {sorted(tensors)}")
    (H, D, N), V = tensors["encoder"].shape, tensors["embed.weight"].shape[0]
    if H * N % D:
        raise ValueError(f"state dict: encoder: expected a multiple of {D} neurons, got {H} x {N}")
    sizes = dict(n_layer=num_layers, n_embd=D, n_head=H, vocab_size=V, dropout=dropout)
    config = _config(sizes | dict(mlp_internal_dim_multiplier=H * N // D), _ladders(tensors.pop("attn.freqs"), N))
    values = {row.ours[0]: row.how.there(tensors[row.theirs[0]])[0] for row in rows(config, tensors)}
    with torch.device("meta"):
        model = SeqZooForCausalLM(config)
    wanted = {name: x.shape for name, x in model.state_dict().items()}
    wrong = [f"{n}: expected {list(wanted[n])}, got {list(x.shape)}" for n, x in values.items() if x.shape != wanted[n]]
    if wrong:
        raise ValueError(f"state dict: {'; '.join(wrong)}")
    model.load_state_dict(values, assign=True)
    return model


def _spec(ours: SeqZooConfig) -> dict[str, Any]:
    """Of the one block there is.

    Raises:
        ValueError: other parts, or sizes their config has no words for.
    """
    specs = [ours.blocks.get(entry) for entry in ours.pattern]
    if len(specs) != 1 or specs[0] is None or specs[0]["kind"] != "bdh":
        raise ValueError(f"BDH as released cannot express: the pattern {ours.pattern}; it is one block of kind 'bdh'")
    if specs[0]["neurons"] % ours.hidden_size:
        raise ValueError(
            f"BDH as released cannot express: neurons {specs[0]['neurons']}, no multiple of {ours.hidden_size}"
        )
    return specs[0]


def _frequencies(neurons: int, ladders: int) -> Tensor:
    """[1, 1, 1, N] turns per token, as their code computes them."""
    N = neurons // ladders
    pair = torch.arange(N, dtype=torch.float32).div(2).floor() * 2
    return (1.0 / _THETA ** (pair / N) / (2 * math.pi)).repeat(ladders).view(1, 1, 1, -1)


def _ladders(freqs: Tensor, neurons: int) -> int:
    """How many there are beside each other, as exactly as their dtype can say."""
    got, near = freqs.detach().cpu().float().flatten(), max(1e-5, torch.finfo(freqs.dtype).eps)
    fits = [n for n in range(1, neurons // 2 + 1) if neurons % (2 * n) == 0 and got.numel() == neurons
            and torch.allclose(got, _frequencies(neurons, n).flatten(), rtol=near, atol=0)]  # fmt: skip
    if not fits:
        raise ValueError(f"attn.freqs: expected ladders of theta {_THETA:.0f} for {neurons} neurons, got others")
    return fits[0]
