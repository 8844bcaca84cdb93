"""Ultra-sparse mixture of experts: every token through k of E small gated MLPs and, where there is one, a shared one.

    p = softmax(W_r x), or sigmoid(W_r x)                the router, over all E experts, in fp32
    C = the k largest of p                               (of p + b with bias balancing)
    y = sum_{e in C} w_e expert_e(x) + sigmoid(w_s x) shared(x),   w_e = c p_e, or c p_e / sum_{C} p if renormalised

No capacity: no token is dropped, and what a token gets does not depend on its neighbours.
Balance, by a loss: E sum_e f_e P_e with f_e the share of tokens that chose e and P_e the mean of p_e (Fedus et al.
2021, arXiv 2101.03961, eq. 4-6), of p_e / sum p where p are sigmoids (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
Balance without a loss: b_e moves by a fixed step against e's load (Wang et al. 2024, arXiv 2408.15664, algorithm 1).
The router and the shared expert are Qwen3-Next's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from seqzoo.kernels.expert_mlp import expert_mlp
from seqzoo.layers.heads import Heads
from seqzoo.layers.linear import Linear
from seqzoo.layers.mlp import GatedMLP
from seqzoo.layers.precision import wide
from seqzoo.layers.span import Span
from seqzoo.layers.spike_linear import W8ASpikeExperts

LEAST = 1e-20  # of a sum of scores that is divided by: sigmoids can all be 0 in fp32


class MoE(nn.Module):
    """
    Args:
        num_experts: E, the experts a token chooses from.
        num_experts_per_token: k, how many it takes.
        expert_width: hidden units of one expert.
        shared_width: hidden units of the expert that every token passes through; 0 is none.
        shared_gate: scale the shared expert's output by a sigmoid of x.
        renormalise: make a token's k weights sum to 1.
        router_score: softmax, or sigmoid: one expert's score takes nothing from another's.
        routed_scale: c, of the routed experts' weights, the shared one aside.
        balance_coefficient: of the balance loss.
        bias_update_rate: step of the balancing bias per optimizer step; 0 is no bias.

    Raises:
        ValueError: a size or a rate out of its range.
    """

    BY_EXPERT = ("gate_up_proj", "down_proj")  # stacks of experts, which may be cut over processes between experts
    PRECISE = ("router", "shared_gate")  # see `layers/float8.py`
    SPIKES = {"gate_up_proj": "input_spikes", "down_proj": "hidden_spikes"}  # where an own matrix's input is spiked

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        num_experts_per_token: int,
        expert_width: int,
        shared_width: int = 0,
        shared_gate: bool = True,
        renormalise: bool = True,
        router_score: str = "softmax",
        routed_scale: float = 1.0,
        balance_coefficient: float = 0.001,
        bias_update_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_token <= num_experts:
            raise ValueError(
                f"num_experts_per_token: expected 1 to num_experts={num_experts}, got {num_experts_per_token}"
            )
        if not isinstance(expert_width, int) or expert_width < 1:
            raise ValueError(f"expert_width: expected a whole number, at least 1, got {expert_width!r}")
        for name, value in dict(
            shared_width=shared_width, balance_coefficient=balance_coefficient, bias_update_rate=bias_update_rate
        ).items():
            if not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if router_score not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score: expected softmax or sigmoid, got {router_score!r}")
        if not 0 < routed_scale < float("inf"):
            raise ValueError(f"routed_scale: expected a number above 0, and finite, got {routed_scale!r}")
        self.k, self.renormalise, self.router_score = num_experts_per_token, renormalise, router_score
        self.routed_scale = routed_scale
        self.balance_coefficient, self.bias_update_rate = balance_coefficient, bias_update_rate
        self.router = Linear(hidden_size, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_width))
        self.input_spikes = self.hidden_spikes = None
        self.experts = None  # in place of the two, where they are whole numbers
        self.shared = GatedMLP(hidden_size, shared_width) if shared_width else None
        self.shared_gate = Linear(hidden_size, 1, bias=False) if shared_width and shared_gate else None
        self.register_buffer("expert_bias", torch.zeros(num_experts) if bias_update_rate else None)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """The experts' own matrices ~ normal(0, std); the linear layers know themselves."""
        for own in (self.gate_up_proj, self.down_proj):
            if own is not None:
                nn.init.normal_(own, std=std)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def heads(self) -> Heads | None:
        """How it is dealt over processes: some hidden units of every expert."""
        if self.experts is not None:  # int8, scaled in groups
            return None
        width = self.down_proj.shape[2]
        return Heads(("expert_width", "shared_width"), {"gate_up_proj": [width, width]})

    def forward(self, x: Tensor, span: Span | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """x [B, T, D] -> y [B, T, D], and sums over the tokens that are not padding.

        Returns:
            y, and {"selected": [E] how often each expert was chosen, "probability": [E] the router's probabilities,
            "tokens": [] how many tokens}, fp32: additive over layers, micro-batches and ranks.
        """
        tokens = x.flatten(0, -2)  # [N, D]
        chosen, weight, probability = self._route(tokens)
        y = self._experts(tokens, chosen, weight)
        if self.shared is not None:
            shared = self.shared(tokens)
            y = y + (shared if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * shared)
        valid = None if span is None or span.valid is None else span.valid.flatten()
        return y.view_as(x), self._count(chosen, probability, valid)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D] -> chosen [N, k], weight [N, k] in x's dtype, probability [N, E] in fp32."""
        logits = self.router(x)
        score = wide(logits).softmax(dim=-1) if self.router_score == "softmax" else wide(logits).sigmoid()
        if self.expert_bias is None:
            weight, chosen = score.topk(self.k, dim=-1)
        else:
            chosen = (score + self.expert_bias).topk(self.k, dim=-1).indices
            weight = score.gather(-1, chosen)
        if self.renormalise:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=LEAST)
        if self.routed_scale != 1:
            weight = weight * self.routed_scale
        probability = score
        if self.router_score == "sigmoid":
            probability = score / score.sum(dim=-1, keepdim=True).clamp(min=LEAST)
        return chosen, weight.to(logits.dtype), probability

    def _experts(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Under autocast the op is a matrix product like any other: its operands take the lower precision."""
        if self.experts is not None:
            return self.experts(x, chosen, weight)
        gate_up, down = self.gate_up_proj, self.down_proj
        x = x if self.input_spikes is None else self.input_spikes(x)
        if torch.is_autocast_enabled(x.device.type):
            lower = torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(lower), gate_up.to(lower), down.to(lower)
        return expert_mlp(x, chosen, weight, gate_up, down, hidden=self.hidden_spikes)

    def quantise_experts(
        self, *, k: float, group: int, fill: bool, moments: Mapping[str, Tensor | None] = {}
    ) -> None:  # fmt: skip
        """The experts' matrices in int8 from now on (`W8ASpikeExperts`); `fill`: their numbers are those of now, with
        `moments` so rounded that errors make up for each other."""
        E, D, I = self.down_proj.shape
        experts = W8ASpikeExperts(E, D, I, k=k, group=group)
        if fill:
            experts.fill(self.gate_up_proj, self.down_proj, moments)
        self.gate_up_proj = self.down_proj = self.input_spikes = self.hidden_spikes = None
        self.experts = experts

    def _count(self, chosen: Tensor, probability: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        N, E = probability.shape
        selected = probability.new_zeros(E)
        if valid is None:
            selected.scatter_add_(0, chosen.flatten(), probability.new_ones(1).expand(chosen.numel()))
            return {"selected": selected, "probability": probability.sum(0), "tokens": probability.new_full((), N)}
        weight = valid.to(probability.dtype)  # [N]
        selected.scatter_add_(0, chosen.flatten(), weight[:, None].expand(chosen.shape).flatten())
        return {"selected": selected, "probability": weight @ probability, "tokens": weight.sum()}

    def loss(self, stats: dict[str, Tensor], earlier: dict[str, Tensor] | None = None) -> Tensor:
        """The balance loss, its coefficient included; k times the coefficient where the load is even. [nats/token]

        `earlier`: what other parts of the same batch counted. Loads are then the whole batch's, as in arXiv 2501.11873;
        probabilities, which carry the gradient, are those of `stats`.
        """
        mean = stats["probability"] / stats["tokens"]
        selected, tokens = stats["selected"], stats["tokens"]
        if earlier is not None:
            selected, tokens = selected + earlier["selected"], tokens + earlier["tokens"]
        return self.balance_coefficient * mean.numel() * (selected / tokens * mean).sum()

    def metrics(self, stats: dict[str, Tensor]) -> dict[str, float]:
        """How even the load is: its entropy as a share of the largest possible, the busiest expert's load over the
        mean load, and the share of experts that no token chose."""
        load = stats["selected"].double()
        load = load / load.sum()
        entropy = -torch.special.xlogy(load, load).sum() / torch.tensor(load.numel()).log()
        return {
            "load_entropy": entropy.item(),
            "load_max": (load.max() * load.numel()).item(),
            "unused_experts": (load == 0).double().mean().item(),
        }

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Move the choice towards the experts with less than the mean load, by `bias_update_rate` each."""
        if self.expert_bias is not None:
            selected = stats["selected"]
            self.expert_bias += self.bias_update_rate * (selected.mean() - selected).sign()

    def active_parameters(self) -> int:
        """Parameters a token passes through: the router, k experts, the shared expert and its gate."""
        whole = self.experts
        gate_up, down = (self.gate_up_proj, self.down_proj) if whole is None else whole.parameters()
        experts = gate_up[0].numel() + down[0].numel()
        others = sum(p.numel() for p in self.parameters()) - len(gate_up) * experts
        return others + self.k * experts

    def flops(self, context: int) -> int:
        """Forward FLOPs per token, 2 per multiply-add; `context` [tokens] does not matter to a channel."""
        return 2 * self.active_parameters()
