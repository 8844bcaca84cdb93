"""Configurations drawn at random from all config groups, small enough to be trained for a step in a second."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

MODELS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))
Words = dict[str, Any]  # option -> value
SMALL = {  # of a model as it is published, by the name of a size
    "num_heads": 2, "num_kv_heads": 1, "num_key_heads": 1, "num_value_heads": 2, "head_width": 8, "key_width": 8,
    "value_width": 6, "rotary_width": 4, "latent_width": 8, "shared_width": 4, "query_rank": 6, "width": 20,
    "expert_width": 6, "num_experts": 4, "num_experts_per_token": 2, "neurons": 48, "chunk": 4, "slots": 6, "window": 5,
    "decay_rank": 3, "num_sink_tokens": 2, "hidden_size": 16, "vocab_size": 264, "horizon": 16, "law_depth": 2,
}  # fmt: skip


def heads(r: Random, outer: str = "num_heads", inner: str = "num_kv_heads") -> Words:
    groups = r.choice([1, 2])
    return {outer: groups * r.choice([1, 2]), inner: groups}


def attention(r: Random) -> Words:
    scalings = [None, dict(rope_type="linear", factor=2.0)]
    scalings += [dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)]
    return heads(r) | dict(
        head_width=r.choice([4, 6, 8]), window=r.choice([None, 1, 3, 9]), rotary_width=r.choice([None, 0, 2, 4]),
        rope_scaling=r.choice(scalings), qk_norm=r.choice([None, "zero_centred", "rms", "rms_joint"]),
        output_gate=flip(r), bias=flip(r), out_bias=r.choice([None, True, False]),
    )  # fmt: skip


def momentum_attention(r: Random) -> Words:
    strength = r.choice([dict(gamma=r.choice([0.0, 0.7]), law_depth=None), dict(gamma=None, law_depth=3)])
    return attention(r) | strength | dict(
        learned=flip(r), allow_negative=flip(r), shear=r.choice(["qk", "k_only", "q_only"]), temperature=flip(r),
        placement=r.choice(["post", "pre"]), first=r.choice(["zero_momentum", "zero_input"]),
    )  # fmt: skip


def delta(r: Random) -> Words:
    widths = dict(key_width=r.choice([3, 8]), value_width=r.choice([5, 8]), conv_width=r.choice([1, 2, 4]))
    return heads(r, "num_value_heads", "num_key_heads") | widths


def gated_deltanet(r: Random) -> Words:
    return delta(r) | dict(bias=flip(r), out_bias=flip(r), beta_scale=r.choice([1.0, 2.0]))


def momentum_deltanet(r: Random) -> Words:
    return delta(r) | dict(gates=r.choice(["mean", "coupled"]), ask_faded=flip(r))


def kimi_delta_attention(r: Random) -> Words:
    sizes = dict(num_heads=r.choice([1, 3]), key_width=r.choice([3, 8]), value_width=r.choice([5, 8]))
    return sizes | dict(decay_rank=r.choice([None, 2]), gate_rank=r.choice([None, 3]), conv_width=r.choice([1, 4]))


def latent_attention(r: Random) -> Words:
    shared = r.choice([0, 2, 3, 4])
    return dict(
        num_heads=r.choice([1, 3]), key_width=r.choice([3, 8]), shared_width=shared, value_width=r.choice([4, 5]),
        latent_width=r.choice([4, 7]), query_rank=r.choice([None, 5]), bias=flip(r),
        rope_theta=r.choice([None, 1e4]) if shared in (2, 4) else None,
    )  # fmt: skip


def lightning_attention(r: Random) -> Words:
    return dict(num_heads=r.choice([1, 3]), head_width=r.choice([4, 5]), slope=r.choice([0.0, 0.5, 1.0]))


def linear_attention(r: Random) -> Words:
    decay = r.choice(["none", "fixed", "lightning", "head", "channel", "key"])
    feature = "sigmoid" if decay == "key" else r.choice(["identity", "relu", "sigmoid", "elu", "softmax"])
    turned = r.choice([0, 0, 2])
    return heads(r) | dict(
        key_width=r.choice([4, 7]), value_width=r.choice([4, 5]), feature=feature, decay=decay, rotary_width=turned,
        decay_rank=3, decay_scale=r.choice([1.0, 16.0]), decay_depth=r.choice([0.0, 0.5]), conv_width=r.choice([0, 4]),
        normalise=flip(r) and feature != "identity" and not turned, output_norm=flip(r), output_gate=flip(r),
        bias=flip(r), out_bias=flip(r), qk_norm=r.choice([None, "zero_centred", "rms"]),
    )  # fmt: skip


def ovq_attention(r: Random) -> Words:
    schedule = r.choice(["plateau", "min", "linear"])
    return heads(r) | dict(
        head_width=r.choice([4, 6]), chunk=r.choice([1, 4]), slots=r.choice([1, 6]), schedule=schedule,
        horizon=16 if schedule == "linear" else None, first_chunk=r.choice(["farthest", "shared"]),
        similarity=r.choice(["dot", "cosine"]), choice=r.choice(["novel", "random"]), step=r.choice([None, 0.3]),
        log_count=flip(r), norm_correction=flip(r), renormalise=flip(r), detach=flip(r), output_gate=flip(r),
        bias=flip(r),
    )  # fmt: skip


def moe(r: Random) -> Words:
    return dict(
        num_experts=r.choice([2, 5]), num_experts_per_token=r.choice([1, 2]), expert_width=r.choice([3, 8]),
        shared_width=r.choice([0, 4]), shared_gate=flip(r), renormalise=flip(r), bias_update_rate=r.choice([0.0, 0.01]),
        router_score=r.choice(["softmax", "sigmoid"]), routed_scale=r.choice([1.0, 2.5]),
        balance_coefficient=r.choice([0.0, 0.1]),
    )  # fmt: skip


def monotone_mlp(r: Random) -> Words:
    activation = r.choice(["relu", "softplus", "sigmoid", "tanh"])
    return dict(width=r.choice([5, 16]), weights=r.choice(["softplus", "square"]), activation=activation)


def swiglu(r: Random) -> Words:
    return dict(width=r.choice([5, 16]), bias=flip(r))


def bdh(r: Random) -> Words:
    number, ladders, levels = r.choice([1, 2]), r.choice([1, 2]), r.choice([1, 2])
    return dict(
        num_heads=number, neurons=2 * number * ladders * r.choice([3, 8]), ladders=ladders, levels=levels,
        residual=r.choice(["model", "neuron"]) if levels > 1 else "model", dropout=r.choice([0.0, 0.2]),
        decay=r.choice([None, [0.01] * number]),
    )  # fmt: skip


MIXERS: dict[str, Callable[[Random], Words]] = {
    one.__name__: one
    for one in (
        attention, gated_deltanet, kimi_delta_attention, latent_attention, lightning_attention, linear_attention,
        momentum_attention, momentum_deltanet, ovq_attention,
    )
}  # fmt: skip
CHANNELS: dict[str, Callable[[Random], Words]] = {one.__name__: one for one in (moe, monotone_mlp, swiglu)}
NORMS = ["rms", "zero_centred", "layer"]


def flip(r: Random) -> bool:
    return r.random() < 0.5


def part(
    r: Random, family: str, table: dict[str, Callable[[Random], Words]], place: str, new: bool = True
) -> list[str]:
    """Words that put one of a family's parts at a place of the configuration."""
    kind = r.choice(sorted(table))
    words = [f"{'+' if new else ''}{family}@{place}={kind}"]
    return words + [f"{place}.{name}={said(x)}" for name, x in table[kind](r).items()]


def mixer(r: Random, place: str, new: bool = True) -> list[str]:
    """One of the mixers, or some of them beside each other."""
    if not new or r.random() < 0.8:
        return part(r, "mixer", MIXERS, place, new)
    words = [f"+mixer@{place}=parallel", f"{place}.merge={r.choice(['mean', 'learned'])}"]
    names = ["a", "b", "c"][: r.choice([1, 2, 3])]
    for name in names:
        words += part(r, "mixer", MIXERS, f"{place}.branches.{name}")
    dropped = [f"+{place}.branch_dropout.a=0.5"] if flip(r) else []
    return [*words, f"{place}.norm={r.choice(NORMS)}", *dropped]


def composed(r: Random) -> list[str]:
    """A model put together from parts."""
    words, entries = ["model=transformer", "~model.mixers.full", "~model.channels.mlp"], []
    for i in range(r.choice([1, 2, 3])):
        if r.random() < 0.25:
            kind, place = r.choice(["bdh", "normed_residual", "post_norm", "residual"]), f"model.blocks.b{i}"
            words.append(f"+block@{place}={kind}")
            if kind == "bdh":
                words += [f"{place}.{name}={said(x)}" for name, x in bdh(r).items()]
            else:
                words += mixer(r, f"{place}.mixer", new=False) + part(r, "channel", CHANNELS, f"{place}.channel", False)
                words.append(f"{place}.norm={r.choice(NORMS)}")
            entries.append(f"b{i}")
        else:
            words += mixer(r, f"model.mixers.m{i}") + part(r, "channel", CHANNELS, f"model.channels.c{i}")
            entries.append(f"m{i}/c{i}")
    tied = r.random() < 0.15
    model = dict(
        pattern=entries, hidden_size=r.choice([6, 16]), num_hidden_layers=len(entries) * r.choice([1, 1, 2]), tied=tied,
        norm=r.choice(NORMS), embed_norm=flip(r), final_norm=flip(r), tie_word_embeddings=flip(r),
        vocab_size=r.choice([257, 264]),
    )  # fmt: skip
    words += [f"{'+' if name not in KNOWN else ''}model.{name}={said(x)}" for name, x in model.items()]
    has = lambda *names: any(word.endswith(f"={kind}") for word in words for kind in names)
    if has("attention", "momentum_attention", "latent_attention") and r.random() < 0.3:
        words.append("+model.num_sink_tokens=2")
    elif r.random() < 0.3:  # with sinks there is none
        words += [f"+model.mtp={said(dict(pattern=entries[-1:]))}", "objective=mtp"]
    if not has("bdh", "monotone_mlp") and r.random() < 0.15:  # whose matrices are not spiked
        words.append("+model.spikes={k: 3.0, through_threshold: false, head: false, skip: []}")
    return words


def published(r: Random) -> list[str]:
    """One of configs/model, every size of it small."""
    name = r.choice(MODELS)
    with initialize_config_module("seqzoo.configs", version_base=None):
        model = OmegaConf.to_container(compose("train", [f"model={name}"]).model, resolve=True)
    words = [f"model={name}", *sizes(model, "model")]
    pattern = list(dict.fromkeys(model["pattern"]))
    return [*words, f"model.pattern={said(pattern)}", f"model.num_hidden_layers={len(pattern)}"]


def sizes(tree: dict, place: str) -> list[str]:
    """Every size in it that is set, small; experts per token no more than experts."""
    words = []
    for name, x in tree.items():
        if isinstance(x, dict):
            words += sizes(x, f"{place}.{name}")
        elif name in SMALL and x:  # none, or 0, is a choice
            words.append(f"{place}.{name}={SMALL[name] if name == 'vocab_size' else min(x, SMALL[name])}")
    return words


def drawn(seed: int, folder: Path) -> list[str]:
    """Overrides of seqzoo-train, with files that `corpus` has made in a folder."""
    r = Random(seed)
    words = composed(r) if r.random() < 0.75 else published(r)
    words += r.choice([["optimizer=adamw"], ["optimizer=muon", "optimizer.ns_steps=2"]])
    words += [f"scheduler={r.choice(['cosine', 'wsd'])}"]
    text = [f"data.files={folder / 'text'}/*.jsonl", "data.validation_share=0.3"]
    sources = [f"{place}={x}" for place, x in (("+data@data.sources.a", "stdlib"), ("+data@data.sources.b", "text"))]
    sources += [f"data.sources.a.folder={folder / 'python'}", f"data.sources.b.files={folder / 'text'}/*.jsonl"]
    sources += [
        "data.sources.a.validation_share=0.3",
        "data.sources.b.validation_share=0.3",
        "data.weights={a: 1, b: 3}",
    ]
    words += r.choice([
        ["data=stdlib", f"data.folder={folder / 'python'}", "data.validation_share=0.3"], ["data=text", *text],
        ["data=mixture", *sources], ["data=shards", f"data.folder={folder / 'shards'}"],
    ])  # fmt: skip
    trainer = dict(
        batch_size=r.choice([1, 3]), sequence_length=r.choice([9, 24]), accumulate=r.choice([1, 2]), steps=1,
        precision=r.choice(["fp32", "fp32", "bf16"]), clip=r.choice([None, 1.0]),
        gradient_checkpointing=r.choice([True, False, "selective"]),
        skip_spikes=r.choice([None, 5.0]), milestone_every=r.choice([None, 1]), shuffle_buffer=r.choice([1, 4]),
        device="cpu", tensorboard=False, validation_tokens=30, final_validation_bytes=150, prompt="a",
        sample_tokens=r.choice([0, 3]),
    )  # fmt: skip
    backend = [f"backend={r.choice(['null', 'torch', 'reference'])}"] if flip(r) else []
    return words + [f"trainer.{name}={said(x)}" for name, x in trainer.items()] + backend + [f"seed={r.randrange(9)}"]


def said(x: Any) -> str:
    """As Hydra reads it."""
    if isinstance(x, dict):
        return "{" + ", ".join(f"{name}: {said(value)}" for name, value in x.items()) + "}"
    if isinstance(x, list):
        return "[" + ", ".join(map(said, x)) + "]"
    return "null" if x is None else str(x).lower() if isinstance(x, bool) else str(x)


with initialize_config_module("seqzoo.configs", version_base=None):
    KNOWN = set(compose("train", ["model=transformer"]).model)
