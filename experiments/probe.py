"""A small model that differs from another only in its layers: what an experiment on one layer's ability needs.

    x = embed(ids);  x = x + conv(x);  x = x + mixer(norm x) for every mixer, or block(LN x);  logits = embed^T norm(x)

No channel mixers: what is recalled was recalled by a mixer. The short convolution before the first layer is the same
for all, so that none has to spend a layer on telling a value which key it followed; as in Zoology (arXiv 2312.04927).
"""

import torch
from torch import Tensor, nn

from seqzoo.layers.conv import CausalConv
from seqzoo.layers.norm import LayerNorm, RMSNorm
from seqzoo.layers.registry import Spec, build
from seqzoo.layers.span import Span


class Probe(nn.Module):
    """Args:
    hidden_size, vocab_size: model width, number of tokens.
    layers: names of the mixers or blocks, bottom first; one named twice is built twice.
    mixers, blocks: the parts by name, each {"kind": file in layers/, **its arguments}.
    conv_width: [tokens] of the convolution before the first layer; 0 is none.
    embed_std: of the embedding at the start, which is the head's too.

    Raises:
        ValueError: a layer that names no part, or a part's bad arguments.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        layers: list[str],
        mixers: dict[str, Spec] | None = None,
        blocks: dict[str, Spec] | None = None,
        conv_width: int = 0,
        embed_std: float = 0.02,
    ) -> None:
        super().__init__()
        families = {"mixers": mixers or {}, "blocks": blocks or {}}
        parts = {name: (family, spec) for family, specs in families.items() for name, spec in specs.items()}
        for name in layers:
            if name not in parts:
                raise ValueError(f"layers: expected names of {sorted(parts)}, got {name!r}")
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.conv = CausalConv(hidden_size, conv_width) if conv_width else None
        self.layers = nn.ModuleList(build(*parts[name], hidden_size) for name in layers)
        mixed = [parts[name][0] == "mixers" for name in layers]
        self.norms = nn.ModuleList(RMSNorm(hidden_size) if mixer else LayerNorm(hidden_size) for mixer in mixed)
        self.norm = RMSNorm(hidden_size)
        self.mixed = mixed
        nn.init.normal_(self.embed_tokens.weight, std=embed_std)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, vocab], or [N, vocab] of the N places where `targets` [B, T] is 0 or more."""
        x = self.embed_tokens(ids)
        if self.conv is not None:
            x = x + self.conv(x)[0]
        span = Span.whole(x)
        for mixed, norm, layer in zip(self.mixed, self.norms, self.layers, strict=True):
            x = layer(norm(x), span)[0] + (x if mixed else 0)
        x = x if targets is None else x[targets >= 0]
        return self.norm(x) @ self.embed_tokens.weight.T

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.float32) -> int:
        """What one sequence of that many tokens keeps for decoding, the shared convolution left out."""
        return sum(layer.state_bytes(tokens, dtype) for layer in self.layers)
