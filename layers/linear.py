"""torch's linear layer, on the zoo's own op: faster for the few rows of decoding. Same parameters, same names."""

from torch import Tensor, nn

from seqzoo.kernels.linear import linear


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]: x W^T + bias."""
        own = self._parameters  # read past the module's own look-up, which takes as long as a small product
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:  # parametrised or sharded: computed, or kept elsewhere
            weight, bias = self.weight, self.bias
        return linear(x, weight, bias)
