"""Monotone MLP: what rises in its input falls nowhere in its output. a <= b, channel by channel, gives y(a) <= y(b).

    z = U x + b_u             U = f(raw_u) / sqrt(D E f^2) >= 0       f(raw) = softplus(raw - 2) or raw^2
    y = g (W (s(z) - c)) + b  W = f(raw_w) / (width E f) >= 0         s a monotone activation, g = exp(log_gain) > 0

D model width; E f, E f^2 the mean and mean square of f at its draw; c = E s(z) for z ~ normal(0, 1).

Why these scales. A matrix of non-negative entries multiplies what its inputs share by about fan_in times its mean entry
and the rest by sqrt(fan_in) times the root mean square. Channels of a normed x share little: U is scaled by the second,
and z begins with variance 1. Hidden units share much, as all of them add up the same x: W is scaled by the first, a
weighted mean of hidden units, and c takes out what they have in common for every x. What is left of the output is still
mostly one number added to all channels, so g begins small, for y at the scale of a model's embeddings, and is learned.

The channel is monotone; the model is not: the block norms x before it (x / rms(x) is not monotone in x), and attention
knows no order. That is the setting reported: Cooper et al. 2026, arXiv 2602.02686, make the feed-forward sublayers of
pretrained sequence-to-sequence transformers monotone, leave attention as it is, and report that attacks on a summariser
succeed in 19 % of cases, down from 69 %. In a small causal model taught from scratch it did not help: see
experiments/README.md. The scales above are ours.
With relu or softplus y is also convex in x (Amos et al. 2016, arXiv 1609.07152), with sigmoid or tanh it need not be.
Monotone by the signs of weights: Sill 1998, "Monotonic networks". Order holds up to rounding: in 16 bits, nearly.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.linear import linear
from seqzoo.layers.span import Span


def shifted_softplus(raw: Tensor) -> Tensor:
    """Weight decay, which draws raw to 0, makes weights smaller: f(0) is 0.36 E f. Unshifted, it would double them."""
    return F.softplus(raw - 2.0)


WEIGHTS = {  # name -> f, mean and standard deviation of the draw of raw, E f, E f^2
    "softplus": (shifted_softplus, 0.0, 2.0, 0.35632, 0.44391),
    "square": (torch.square, 0.0, 1.0, 1.0, 3.0),
}
ACTIVATIONS = {  # name -> s, its mean over normal(0, 1)
    "relu": (F.relu, 0.39894),
    "softplus": (F.softplus, 0.80606),
    "sigmoid": (torch.sigmoid, 0.5),
    "tanh": (torch.tanh, 0.0),
}


class MonotoneMLP(nn.Module):
    """Args:
    width: hidden units.
    weights: what makes them non-negative, softplus or square (a weight that reaches 0 has no gradient there).
    activation: relu, softplus, sigmoid or tanh.

    Raises:
        ValueError: a width below 1, a name that is not among these.
    """

    def __init__(self, hidden_size: int, *, width: int, weights: str = "softplus", activation: str = "relu") -> None:
        super().__init__()
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"monotone_mlp: width: expected a whole number, at least 1, got {width!r}")
        for name, value, known in (("weights", weights, WEIGHTS), ("activation", activation, ACTIVATIONS)):
            if value not in list(known):
                raise ValueError(f"monotone_mlp: {name}: expected one of {sorted(known)}, got {value!r}")
        self.positive, *self.draw, mean, square = WEIGHTS[weights]
        self.activation, self.centre = ACTIVATIONS[activation]
        self.scales = (hidden_size * square) ** -0.5, 1 / (width * mean)
        self.up_raw = nn.Parameter(torch.empty(width, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(width))
        self.down_raw = nn.Parameter(torch.empty(hidden_size, width))
        self.down_bias = nn.Parameter(torch.empty(hidden_size))
        self.log_gain = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Own parameters only; `nn.init.*` only, so a checkpoint just loaded is never overwritten."""
        for raw in (self.up_raw, self.down_raw):
            nn.init.normal_(raw, *self.draw)
        nn.init.zeros_(self.up_bias)
        nn.init.zeros_(self.down_bias)
        nn.init.constant_(self.log_gain, math.log(1 / 16))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """U [width, D] and W [D, width], no entry below 0."""
        return self.positive(self.up_raw) * self.scales[0], self.positive(self.down_raw) * self.scales[1]

    def forward(self, x: Tensor, span: Span | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B, T, D] -> y [B, T, D], and sums over tokens for training: none here."""
        up, down = self.matrices()
        hidden = self.activation(linear(x, up, self.up_bias)) - self.centre
        y = linear(hidden, down, None)
        return self.log_gain.exp().to(y.dtype) * y + self.down_bias.to(y.dtype), {}

    def active_parameters(self) -> int:
        """Parameters a token passes through: all of them."""
        return sum(p.numel() for p in self.parameters())

    def flops(self, context: int) -> int:
        """Forward FLOPs per token, 2 per multiply-add; `context` [tokens] does not matter to a channel."""
        return 2 * self.active_parameters()
