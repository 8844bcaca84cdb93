"""Multi-token prediction: a module beside the stack that predicts the token after the next.

    u_t = W [norm e_{t+1} | norm h_t]      e embeddings   h what the stack gives, after its last norm
    p_t = norm blocks(u)_t                 from which the model's head makes the logits of token t + 2

It shares the embedding and the head. Decoding does not look at it; a draft of the token after the next, for speculative
decoding, is the same call with e of the token just chosen.
Source: the released Qwen3-Next-80B-A3B (tensors mtp.*), after DeepSeek-V3, arXiv 2412.19437, section 2.2, where h
stands first.
"""

import torch
from torch import Tensor, nn

from seqzoo.kernels.across import gathered, ranks
from seqzoo.layers.linear import Linear
from seqzoo.layers.norm import NORMS
from seqzoo.layers.span import Span
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.losses import IGNORED
from seqzoo.models.stack import Stack


class MultiToken(nn.Module):
    def __init__(self, config: SeqZooConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.embed_norm, self.hidden_norm = (NORMS[config.norm](D, config.norm_eps) for _ in range(2))
        self.proj = Linear(2 * D, D, bias=False)
        self.stack = Stack(_own(config))

    def forward(
        self, embeds: Tensor, hidden: Tensor, span: Span, states: list[tuple] | None = None
    ) -> tuple[Tensor, list[tuple] | None, list[dict[str, Tensor]]]:
        """What the head is given, and the rest as of `Stack`.

        Args:
            embeds: [B, T, D] of the token after each place.
            hidden: [B, T, D] what the model's stack gives.
            span: of the hidden states.
            states: of the module's own stack.
        """
        x = self.proj(torch.cat([self.embed_norm(embeds), self.hidden_norm(hidden)], dim=-1))
        return self.stack(x, span, states)


def one_on(embeds: Tensor, targets: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """What stands one place on: embeddings [B, T, D] and targets [B, T]; at a document's end IGNORED."""
    after = lambda x, none: torch.cat([x[:, 1:], _first_of_next(x, none)], dim=1)
    same = after(span.positions, -1) == span.positions + 1
    if span.valid is not None:
        same = same & span.valid
    return after(embeds, 0), torch.where(same, after(targets, IGNORED), IGNORED)


def _first_of_next(x: Tensor, none: int) -> Tensor:
    """[B, 1, ...] what follows x [B, T, ...]: the next rank's first place where the sequence is split, else `none`."""
    split = ranks()
    if split is None:
        return torch.full_like(x[:, :1], none)
    first = gathered(x[:, :1])[(split.rank + 1) % split.size]  # the last rank's too: all meet in the backward pass
    return first.masked_fill(torch.tensor(split.rank + 1 == split.size, device=x.device), none)


def _own(config: SeqZooConfig) -> SeqZooConfig:
    """Of the module's own stack."""
    pattern = config.mtp["pattern"]
    shared = ("hidden_size", "mixers", "channels", "blocks", "norm", "norm_eps")
    return SeqZooConfig(pattern=pattern, num_hidden_layers=len(pattern), **{x: getattr(config, x) for x in shared})
