"""torch's linear layer, on the zoo's own op: faster for the few rows of decoding. Same parameters, same names."""

from torch import Tensor, nn

from seqzoo.kernels.linear import linear


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]: x W^T + bias."""
        return linear(x, self.weight, self.bias)
