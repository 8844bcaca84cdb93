"""How fast a run is, of what its devices could do."""

import torch

from seqzoo.models.config import SeqZooConfig
from seqzoo.models.cost import cost

PEAKS = {  # dense bf16 products of a device [FLOP/s], of its data sheet, by what its name has
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "MI300X": 1307e12,
    "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


def training_flops(config: SeqZooConfig, context: int) -> int:
    """Per token of sequences of `context` tokens: forward, and twice that for backward; nothing computed again."""
    return 3 * cost(config, context=context).flops_per_token


def peak_flops(device: torch.device) -> float | None:
    """[FLOP/s] of bf16 products; None where the device is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def shares(tokens: float, seconds: float, flops: int, devices: int, peak: float | None) -> dict[str, float]:
    """Of a window of training: speed of each of the devices, and the share of what it could do where that is known."""
    each = tokens / seconds / devices
    found = dict(tokens_per_second_per_device=each, model_flops_per_second_per_device=each * flops)
    return found if peak is None else found | dict(model_flops_utilisation=each * flops / peak)
