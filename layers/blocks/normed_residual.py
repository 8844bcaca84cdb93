"""A block whose residual is normed too, as MiniMax has it: every part's input is what it is added to.

    x <- norm x,   x <- a x + b mixer(x);   x <- norm x,   x <- c x + d channel(x)

Source: MiniMax-01, arXiv 2501.08313 (DeepNorm, arXiv 2203.00555, for the weights).
"""

from torch import Tensor

from seqzoo.layers.registry import Spec
from seqzoo.layers.span import Span
from seqzoo.layers.two_parts import TwoParts


class NormedResidual(TwoParts):
    """Args:
    mixer, channel, norm: as of `TwoParts`.
    mixer_weights, channel_weights: [a, b] and [c, d].

    Raises:
        ValueError: weights that are not two numbers, or what `TwoParts` refuses.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        mixer: Spec,
        channel: Spec,
        mixer_weights: list[float],
        channel_weights: list[float],
        norm: str = "rms",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            hidden_size, kind="normed_residual", mixer=mixer, channel=channel, norm=norm, norm_eps=norm_eps
        )
        for name, pair in dict(mixer_weights=mixer_weights, channel_weights=channel_weights).items():
            if len(pair) != 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in pair):
                raise ValueError(f"normed_residual: {name}: expected two numbers, got {pair!r}")
        self.mixer_weights, self.channel_weights = mixer_weights, channel_weights

    def forward(
        self, x: Tensor, span: Span | None = None, state: tuple | None = None
    ) -> tuple[Tensor, tuple | None, dict[str, Tensor]]:
        """x [B, T, D] -> x [B, T, D], the next state, and the channel's statistics: sums over tokens, by name."""
        if span is not None and span.sinks is not None:
            span = span._replace(sinks=self.mixer_norm(span.sinks))
        (a, b), (c, d) = self.mixer_weights, self.channel_weights
        x = self.mixer_norm(x)
        h, state = self.mixer(x, span, state)
        x = self.channel_norm(a * x + b * h)
        h, stats = self.channel(x, span)
        return c * x + d * h, state, stats
