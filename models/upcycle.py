"""A dense model as a mixture of experts: every expert, and the shared one, starts as a copy of the MLP it replaces.

Experts being equal, a mixture gives, with w the weights of a token's k of N experts and s the shared one's,

    y = (s + sum_C w) mlp(x)          s: 1, 0 without a shared expert, 1/2 with a gate on it (the gate starts at zero)

whatever the choice. Where nothing is learned yet a router that is about zero gives about

    c = s + k/N (softmax), s + k/2 (sigmoid), s + 1 (renormalised: this one exactly)

and what is to undo c is put on the copies:
    each    c^(-1/3) on each of an expert's three matrices (SpikingBrain): near, and not exact, for silu(a g) is not
            a silu(g); a few thousandths of the output's size
    down    1/c on the last matrix alone: exact as far as c is
    none    nothing

Exact at the start are thus `down` with renormalised weights, and `down` with a router of zero, where the choice among
equals is arbitrary but of no consequence. A random router chooses the largest weights, and sum_C w is above k/N: for
SpikingBrain's N = 16, k = 1 a mean of 1.1/N where the logits have a standard deviation of 0.05, but 4.5/N where it is
1.2, as weights of 0.02 on 3584 normed channels give it: y is then 1.2 mlp(x). test_upcycle.py measures all this.
Source: SpikingBrain 2025, arXiv 2509.05276 (S + k/N and its cube root); the idea: Komatsuzaki et al. 2022,
arXiv 2212.05055.
"""

from collections.abc import Collection
from copy import deepcopy

import torch

from seqzoo.layers.channels.moe import MoE
from seqzoo.layers.channels.swiglu import SwiGLU
from seqzoo.layers.registry import Spec
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.rules import period

SCALES = {  # name -> what gate and up, and what down is multiplied by
    "each": lambda c: (c ** (-1 / 3), c ** (-1 / 3)),
    "down": lambda c: (1.0, 1 / c),
    "none": lambda c: (1.0, 1.0),
}


def gain(moe: MoE) -> float:
    """c: the weights of the experts that a token passes through, summed, where the router says nothing."""
    shared = 0.0 if moe.shared is None else 1.0 if moe.shared_gate is None else 0.5
    if moe.renormalise:
        return shared + 1.0
    experts = moe.router.out_features
    return shared + moe.k * (1 / experts if moe.router_score == "softmax" else 0.5)


@torch.no_grad()
def fill(moe: MoE, mlp: SwiGLU, *, scale: str = "each") -> None:
    """Make a mixture's experts copies of a gated MLP, and its shared expert's gate zero. The router stays as it is.

    Raises:
        ValueError: experts of another width than the MLP, an MLP with biases, or an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {list(SCALES)}, got {scale!r}")
    if mlp.gate_proj.bias is not None:
        raise ValueError("upcycle: expected an MLP without biases, which experts have not, got one with them")
    width = mlp.gate_proj.out_features
    widths = dict(expert_width=moe.down_proj.shape[-1])
    if moe.shared is not None:
        widths["shared_width"] = moe.shared.gate_proj.out_features
    for name, got in widths.items():
        if got != width:
            raise ValueError(f"{name}: expected the width of the MLP, {width}, got {got}")
    inner, last = SCALES[scale](gain(moe))
    gate, up, down = inner * mlp.gate_proj.weight, inner * mlp.up_proj.weight, last * mlp.down_proj.weight
    moe.gate_up_proj.copy_(torch.cat([gate, up]).expand_as(moe.gate_up_proj))
    moe.down_proj.copy_(down.expand_as(moe.down_proj))
    if moe.shared is not None:
        for projection, weight in (
            (moe.shared.gate_proj, gate),
            (moe.shared.up_proj, up),
            (moe.shared.down_proj, down),
        ):
            projection.weight.copy_(weight)
    if moe.shared_gate is not None:
        moe.shared_gate.weight.zero_()


def upcycle(
    model: SeqZooForCausalLM,
    moe: Spec,
    *,
    blocks: Collection[int] | None = None,
    scale: str = "each",
    name: str = "moe",
) -> SeqZooForCausalLM:
    """A new model with mixtures in place of gated MLPs, all else copied.

    Args:
        model: the dense one; it stays as it is.
        moe: the mixture, {"kind": "moe", ...}, its widths those of the MLPs.
        blocks: which of model.stack.blocks (each layer's own, or of a tied model the pattern's); None is all that have
            a gated MLP.
        scale: each, down or none.
        name: of the mixture in the new config.

    Returns:
        The new model, of the same dtype and on the same device. Its routers are drawn at random.

    Raises:
        ValueError: a block without a gated MLP, a name that is taken, widths that do not fit, or weights of int8.
    """
    if model.config.quantisation is not None:
        raise ValueError(f"upcycle: expected a model with float weights, got {model.config.quantisation}")
    dense = [i for i, block in enumerate(model.stack.blocks) if isinstance(getattr(block, "channel", None), SwiGLU)]
    if blocks is not None and not isinstance(blocks, Collection):
        raise ValueError(f"blocks: expected numbers of blocks, such as [0, 2], got {blocks!r}")
    chosen = dense if blocks is None else sorted(set(blocks))
    if not chosen or not set(chosen) <= set(dense):
        raise ValueError(f"blocks: expected some of {dense}, which have a gated MLP, got {chosen}")
    new = SeqZooForCausalLM(_config(model, moe, chosen, name)).to(device=model.device, dtype=model.dtype)
    replaced = tuple(f"stack.blocks.{i}.channel." for i in chosen)
    kept = {key: x for key, x in model.state_dict().items() if not key.startswith(replaced)}
    absent, _ = new.load_state_dict(kept, strict=False)
    assert all(key.startswith(replaced) for key in absent)
    for i in chosen:
        fill(new.stack.blocks[i].channel, model.stack.blocks[i].channel, scale=scale)
    new.generation_config = deepcopy(model.generation_config)
    return new.train(model.training)


def _config(model: SeqZooForCausalLM, moe: Spec, chosen: Collection[int], name: str) -> SeqZooConfig:
    ours = model.config.to_dict()
    if not name or "/" in name:
        raise ValueError(f"name: expected one without a slash, got {name!r}")
    if isinstance(moe, dict) and moe.get("kind", "moe") != "moe":
        raise ValueError(f"moe: expected kind moe, got {moe['kind']!r}")
    if name in ours["channels"]:
        raise ValueError(f"name: expected one that no channel has, got {name!r}; there are {sorted(ours['channels'])}")
    old = [ours["pattern"][i % len(ours["pattern"])] for i in range(len(model.stack.blocks))]
    entries = [f"{entry.split('/')[0]}/{name}" if i in chosen else entry for i, entry in enumerate(old)]
    used = {entry.rpartition("/")[2] for entry in entries}
    channels = {key: spec for key, spec in ours["channels"].items() if key in used} | {name: moe}
    ours |= dict(pattern=entries if ours["tied"] else period(entries), channels=channels)
    return SeqZooConfig.from_dict(ours)
