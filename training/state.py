"""What a run must remember beside the weights, as tensors by name and plain JSON: no pickle."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OPTIMIZER, RNG = "optimizer/", "rng/"


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Each optimizer's memory of each parameter, as optimizer/<parameter>/<what>."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{OPTIMIZER}{names[p]}/{what}": tensor.detach().cpu().contiguous()
        for optimizer in optimizers
        for p, memory in optimizer.state.items()
        for what, tensor in memory.items()
    }


def optimizer_kinds(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, str]:
    """The class of the optimizer that steps each parameter, by the parameter's name."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: type(optimizer).__name__
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: list[Optimizer], tensors: dict[str, Tensor], kinds: dict[str, str]
) -> None:
    """Give it back; rates and decays stay those of the configuration.

    Args:
        model: its parameters have the names.
        optimizers: of the run that goes on.
        tensors, kinds: what `optimizer_tensors` and `optimizer_kinds` once gave.

    Raises:
        ValueError: a parameter that is stepped by another kind of optimizer than it was.
    """
    now = optimizer_kinds(model, optimizers)
    for name in sorted(kinds.keys() | now.keys()):
        if kinds.get(name) != now.get(name):
            raise ValueError(f"optimizer: expected {kinds.get(name)} for {name}, got {now.get(name)}")
    names = {p: name for name, p in model.named_parameters()}
    memories: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(OPTIMIZER):
            name, _, what = key.removeprefix(OPTIMIZER).rpartition("/")
            memories.setdefault(name, {})[what] = tensor
    for optimizer in optimizers:
        state = optimizer.state_dict()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        mine = {i: memories[names[p]] for i, p in enumerate(params) if names[p] in memories}
        optimizer.load_state_dict({"state": mine, "param_groups": state["param_groups"]})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The generators of torch (tensors), python and numpy (JSON)."""
    tensors = {f"{RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"{RNG}cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": [version, list(words), gauss], "numpy": [kind, keys.tolist(), *rest]}


def load_random_state(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Set them; a device that was not there keeps its own."""
    torch.set_rng_state(tensors[f"{RNG}cpu"])
    for i in range(torch.cuda.device_count()):
        if f"{RNG}cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{RNG}cuda{i}"], i)
    version, words, gauss = facts["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(facts["numpy"]))
