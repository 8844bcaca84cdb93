"""Linear layers whose products are of numbers of eight bits, for training. Definition: `kernels/float8_linear`.

Parameters stay as they are, and so do their names: it is a way to multiply, not another model. Parts say which of their
linear layers are not for that, in an attribute PRECISE: names of those whose few outputs decide much, as gates, decays
and routers do.
"""

from torch import Tensor

from seqzoo.kernels.float8_linear import float8_linear
from seqzoo.layers.linear import Linear


class Float8Linear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return float8_linear(x, self.weight, self.bias)
