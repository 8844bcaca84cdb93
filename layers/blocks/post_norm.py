"""A block that norms what its parts give, not what they get, as OLMo 2 has it:

    x <- x + norm mixer(x),   x <- x + norm channel(x)

Source: OLMo 2, arXiv 2501.00656.
"""

from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.layers.span import Span
from seqzoo.layers.two_parts import TwoParts


class PostNorm(TwoParts):
    """Arguments and errors: `TwoParts`, the norms of both parts' outputs."""

    def __init__(
        self, hidden_size: int, *, mixer: Spec, channel: Spec, norm: str = "rms", norm_eps: float = 1e-6
    ) -> None:
        super().__init__(hidden_size, kind="post_norm", mixer=mixer, channel=channel, norm=norm, norm_eps=norm_eps)

    def forward(
        self, x: Tensor, span: Span | None = None, state: tuple | None = None
    ) -> tuple[Tensor, tuple | None, dict[str, Tensor]]:
        """x [B, T, D] -> x [B, T, D], the next state, and the channel's statistics: sums over tokens, by name."""
        h, state = self.mixer(x, span, state)
        x = x + self.mixer_norm(h)
        h, stats = self.channel(x, span)
        return x + self.channel_norm(h), state, stats
