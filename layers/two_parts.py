"""What blocks of a token mixer and a channel mixer share: all but how the two are put together."""

import torch
from torch import Tensor, nn

from seqzoo.layers.norm import NORMS
from seqzoo.layers.registry import Spec, build


class TwoParts(nn.Module):
    """
    Args:
        kind: the block's name, for messages.
        mixer, channel: {"kind": file in layers/mixers, layers/channels, **its arguments}.
        norm: of each part's own norm: rms, zero_centred, or layer (no parameters).

    Raises:
        ValueError: an unknown norm, or what a part refuses.
    """

    def __init__(
        self, hidden_size: int, *, kind: str, mixer: Spec, channel: Spec, norm: str, norm_eps: float
    ) -> None:  # fmt: skip
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"{kind}: norm: expected one of {sorted(NORMS)}, got {norm!r}")
        self.mixer_norm, self.mixer = NORMS[norm](hidden_size, norm_eps), build("mixers", mixer, hidden_size)
        self.channel_norm, self.channel = NORMS[norm](hidden_size, norm_eps), build("channels", channel, hidden_size)

    def init_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self.mixer.init_state(batch, device=device, dtype=dtype)

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What one sequence of that many tokens keeps."""
        return self.mixer.state_bytes(tokens, dtype)

    def flops(self, context: int) -> int:
        """Forward, per token, at the mean over `context` tokens, norms left out; a multiply-add is 2."""
        return self.mixer.flops(context) + self.channel.flops(context)

    def loss(self, stats: dict[str, Tensor], earlier: dict[str, Tensor] | None = None) -> Tensor:
        return self.channel.loss(stats, earlier)

    def metrics(self, stats: dict[str, Tensor]) -> dict[str, float]:
        return self.channel.metrics(stats)

    def after_step(self, stats: dict[str, Tensor]) -> None:
        self.channel.after_step(stats)
