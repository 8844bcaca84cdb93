"""What each mixer of a model is given and gives, in one pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from seqzoo.models.causal_lm import SeqZooForCausalLM


def mixer_calls(model: SeqZooForCausalLM, *args: Any, **inputs: Any) -> list[tuple[tuple, Tensor]]:
    """For each level: what its mixer was called with, (x, span), and its output [B, T, D]. Arguments: the model's."""
    found: list[tuple[tuple, Tensor]] = []
    levels = model.stack.levels()

    def note(module: nn.Module, given: tuple, gave: tuple) -> None:
        if not given[1].both_ways:  # of tokens, not of the sinks' own stream
            found.append((given[:2], gave[0]))

    hooks = [block.mixer.register_forward_hook(note) for block in dict.fromkeys(levels)]
    try:
        model(*args, **inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def called_as(module: nn.Module, forward: Callable[[], Any]) -> Any:
    """What `forward` gives, called as the module's own forward is: with the hooks of all who watch its calls, as those
    do that gather weights which are cut over processes."""
    module.forward = forward
    try:
        return module()
    finally:
        del module.forward
