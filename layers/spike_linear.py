"""Linear layers on spikes: float weights, or int8 weights and a product of whole numbers (W8ASpike).

Formulas and source: `kernels/spike`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.spike import spike_linear
from seqzoo.layers.linear import Linear
from seqzoo.layers.rounding import quantised
from seqzoo.layers.spike import AdaptiveSpike


class SpikingLinear(Linear):
    """y = W spike(x) + b. Parameters and names are the linear layer's."""

    def __init__(self, linear: nn.Linear, spike: AdaptiveSpike) -> None:
        """On the layer's own parameters."""
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.spike = spike

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return super().forward(self.spike(x))


class W8ASpike(nn.Module):
    """y = V sum_g scale_g (W_g s_g) + b, with int8 weights and whole spike counts s of x under the threshold V.

    Weights and scales are frozen, and a bias learns; the gradient goes straight through the counts to x. The scales
    follow the model's dtype: cast down, they are rounded, and so is what the weights stand for.

    Args:
        k: of the spikes, as in `AdaptiveSpike`.
        group: input channels that share a scale; the last group may be short.

    Raises:
        ValueError: a group of no channels.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, k: float = 3.0, group: int = 128
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.k, self.group = in_features, out_features, float(k), group
        self.weight, scales = _room(out_features, in_features, group=group)
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nothing: what a weight is comes from `fill` or from a file."""
        _reset(self.weight, self.scales, self.bias)

    @torch.no_grad()
    def fill(self, linear: nn.Linear, moments: Tensor | None = None) -> None:
        """Take over a layer's weight, rounded, and its bias. `moments`: as `quantised` takes them.

        Raises:
            ValueError: another shape, a bias where there is none or the reverse, or a weight that is not finite.
        """
        for name in ("weight", "bias"):
            ours, given = (None if x is None else tuple(x.shape) for x in (getattr(self, name), getattr(linear, name)))
            if ours != given:
                raise ValueError(f"fill: {name}: expected shape {ours}, got {given}")
        weight, self.scales = quantised(linear.weight, self.group, moments)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        return spike_linear(x, self.weight, self.scales, self.bias, k=self.k, group=self.group)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, k={self.k}, group={self.group}"


class W8ASpikeStack(nn.Module):
    """As many of these without bias as there are experts: weight [E, out, in]."""

    def __init__(self, experts: int, in_features: int, out_features: int, *, k: float, group: int) -> None:
        super().__init__()
        self.k, self.group = float(k), group
        self.weight, scales = _room(experts, out_features, in_features, group=group)
        self.register_buffer("scales", scales)
        self.reset_parameters()

    reset_parameters = W8ASpike.reset_parameters
    bias = None

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [rows, in] -> y [rows, out], by one of them."""
        return spike_linear(x, self.weight[expert], self.scales[expert], k=self.k, group=self.group)


class W8ASpikeExperts(nn.Module):
    """`kernels/expert_mlp` with int8 weights, spikes before either matrix: expert by expert, on the host's count."""

    def __init__(self, experts: int, hidden_size: int, width: int, *, k: float, group: int) -> None:
        super().__init__()
        self.gate_up_proj = W8ASpikeStack(experts, hidden_size, 2 * width, k=k, group=group)
        self.down_proj = W8ASpikeStack(experts, width, hidden_size, k=k, group=group)

    @torch.no_grad()
    def fill(self, gate_up: Tensor, down: Tensor, moments: Mapping[str, Tensor | None] = {}) -> None:
        """Take over the experts' matrices, rounded. `moments`: of either by its name, as `quantised` takes them.

        Raises:
            ValueError: a weight that is not finite.
        """
        for name, weight in dict(gate_up_proj=gate_up, down_proj=down).items():
            stack = getattr(self, name)
            whole, stack.scales = quantised(weight, stack.group, moments.get(name))
            stack.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """x [N, D], chosen [N, k], weight [N, k] -> y [N, D]."""
        expert, order = chosen.flatten().sort(stable=True)
        token, weight = order // chosen.shape[1], weight.flatten()[order, None]
        ends = torch.bincount(expert, minlength=len(self.gate_up_proj.weight)).cumsum(0).tolist()
        y = x.new_zeros(x.shape)
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < end:
                rows = slice(start, end)
                gate, up = self.gate_up_proj(x[token[rows]], e).chunk(2, dim=-1)
                out = self.down_proj(F.silu(gate) * up, e) * weight[rows]
                y = y.index_add(0, token[rows], out.to(y.dtype))
        return y


def _room(*shape: int, group: int) -> tuple[nn.Parameter, Tensor]:
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"group: expected a whole number of channels, at least 1, got {group!r}")
    weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
    return weight, torch.empty(*shape[:-1], -(-shape[-1] // group))


def _reset(weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    nn.init.zeros_(weight)
    nn.init.ones_(scales)
    if bias is not None:
        nn.init.zeros_(bias)
