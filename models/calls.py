"""What each mixer of a model is given and gives, in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which is imported with all that compiles

from seqzoo.kernels.across import split_sequence
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


@torch.no_grad()
def sinks_seen(model: SeqZooForCausalLM) -> list[Tensor | None]:
    """For each level: the model's sinks [N, D] as they stand in front of its mixer, None where it has none.

    They are the same for any tokens. Where the model is cut over processes, all call this."""
    if model.sink_tokens is None:
        return [None] * model.stack.depth
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.sink_tokens.device)
    with split_sequence(None), torch.compiler.set_stance("force_eager"):  # compiled parts do not tell of their calls
        return [span.sinks for (_, span), _ in mixer_calls(model, token)]


@_disable_dynamo(recursive=False)  # a compiler loses track of a forward that comes and goes
def called_as(module: nn.Module, forward: Callable[[], Any]) -> Any:
    """What `forward` gives, called as the module's own forward is: with the hooks of all who watch its calls, as those
    do that gather weights which are cut over processes."""
    module.forward = forward
    try:
        return module()
    finally:
        del module.forward
