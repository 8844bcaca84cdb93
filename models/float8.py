"""A model that is trained with products of eight bits: which of its matrices, and which not."""

import torch

from seqzoo.kernels.dispatch import forced
from seqzoo.kernels.float8_linear import UNIT, has_float8
from seqzoo.layers.float8 import Float8Linear
from seqzoo.layers.linear import Linear
from seqzoo.models.causal_lm import SeqZooForCausalLM


def use_float8(model: SeqZooForCausalLM, device: torch.device) -> tuple[list[str], list[str]]:
    """From now on the blocks' linear layers multiply as `layers/float8.py` has it.

    Left as they are: the embedding, the head, experts' stacks, what a part calls PRECISE, layers that are of another
    kind already (spiked, whole numbers), and sizes that are no multiples of 16.

    Args:
        model: cut over processes or whole; its parameters, and so its checkpoints, do not change.
        device: that it runs on.

    Returns:
        Names of the layers that do, and of those of the blocks that do not.

    Raises:
        ValueError: a device without such products, no backend being forced that emulates them; or no layer that fits.
    """
    if not forced() and not has_float8(device):
        raise ValueError(
            "trainer.float8: expected a GPU that multiplies numbers of eight bits (NVIDIA's from sm_89 on, AMD's "
            f"gfx950), or backend=torch, which emulates them, got {device}"
        )
    precise = {id(getattr(part, name)) for part in model.modules() for name in getattr(part, "PRECISE", ())}
    used, left = [], []
    for name, layer in model.stack.blocks.named_modules(prefix="stack.blocks"):
        if not isinstance(layer, torch.nn.Linear):
            continue
        fits = type(layer) is Linear and "forward" not in vars(layer) and not any(n % UNIT for n in layer.weight.shape)
        if fits and id(layer) not in precise:
            layer.__class__ = Float8Linear  # in place: whoever has cut its weights knows this very module
            used.append(name)
        else:
            left.append(name)
    if not used:
        raise ValueError(f"trainer.float8: expected linear layers whose sizes are multiples of {UNIT}, got none")
    return used, left
