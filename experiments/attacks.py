"""Attacks on what a causal model reads: what a small change of it costs, chosen by gradients, blindly or by chance.

The text to predict stays the true one. Every function gives bits per target, [W] by window. Changes of the embeddings
are within `size` times their root mean square in every channel: by chance, along the gradient's signs (FGSM, Goodfellow
et al. 2014, arXiv 1412.6572), or climbing in steps (PGD, Madry et al. 2017, arXiv 1706.06083). Changes of the text swap
single bytes, one after the other, each the worst of a few candidates: drawn, or those of which the gradient promises
most (HotFlip, Ebrahimi et al. 2017, arXiv 1712.06751). Candidates are bytes that the windows contain.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from seqzoo.data.packing import IGNORED

BYTES = 256  # ids below are bytes; a mark is never swapped
Candidates = tuple[Tensor, Tensor]  # places, ids: [W, C] each
Propose = Callable[[nn.Module, "Windows", Tensor, Tensor], Candidates]  # from the model, windows, ids, free [W, T]


class Windows(NamedTuple):
    """W pieces of held-out text, [W, T] int64 each."""

    ids: Tensor
    position_ids: Tensor
    targets: Tensor

    def alphabet(self) -> Tensor:
        """[A] the bytes that occur."""
        found = self.ids.unique()
        return found[found < BYTES]


def bits(model: nn.Module, windows: Windows, embeds: Tensor) -> Tensor:
    """Bits per target where these embeddings [W, T, D] are read."""
    logits = model(inputs_embeds=embeds, position_ids=windows.position_ids, use_cache=False).logits
    nats = F.cross_entropy(logits.mT.float(), windows.targets, ignore_index=IGNORED, reduction="none").sum(1)
    return nats / (windows.targets != IGNORED).sum(1) / math.log(2)


def clean(model: nn.Module, windows: Windows) -> Tensor:
    """Nothing is changed."""
    return _read(model, windows, windows.ids)


def noise(model: nn.Module, windows: Windows, size: float, *, draws: int, generator: Generator) -> Tensor:
    """By chance: each channel up or down by all that is allowed. The mean of so many draws."""
    embeds, radius = _embeds(model, windows, size)
    signs = (torch.randint(2, embeds.shape, generator=generator) * 2 - 1 for _ in range(draws))
    with torch.no_grad():
        return torch.stack([bits(model, windows, embeds + radius * sign) for sign in signs]).mean(0)


def fgsm(model: nn.Module, windows: Windows, size: float) -> Tensor:
    """One step along the signs of the gradient, as far as is allowed."""
    embeds, radius = _embeds(model, windows, size)
    _, slope = _slope(model, windows, embeds)
    with torch.no_grad():
        return bits(model, windows, embeds + radius * slope.sign())


def pgd(model: nn.Module, windows: Windows, size: float, *, steps: int, generator: Generator) -> Tensor:
    """From a drawn point in so many steps of 2.5 / steps of what is allowed. The worst point on the way."""
    embeds, radius = _embeds(model, windows, size)
    change = radius * (2 * torch.rand(embeds.shape, generator=generator) - 1)
    worst = torch.full((len(embeds),), -math.inf)
    for step in range(steps + 1):
        found, slope = _slope(model, windows, embeds + change)
        worst = worst.maximum(found)
        if step < steps:
            change = (change + 2.5 / steps * radius * slope.sign()).clamp(-radius, radius)
    return worst


def swaps(model: nn.Module, windows: Windows, counts: list[int], propose: Propose) -> dict[int, Tensor]:
    """Swap bytes greedily, in each window for itself, no place twice -> after each number of swaps.

    Raises:
        ValueError: more swaps than bytes in a window.
    """
    ids, free, row = windows.ids.clone(), windows.ids < BYTES, torch.arange(len(windows.ids))
    if max(counts) > free.sum(1).min():
        raise ValueError(f"swaps: expected at most {free.sum(1).min()}, the bytes of a window, got {max(counts)}")
    found = {}
    for count in range(1, max(counts) + 1):
        places, new = propose(model, windows, ids, free)
        tried = [
            _read(model, windows, ids.scatter(1, p[:, None], n[:, None])) for p, n in zip(places.T, new.T, strict=True)
        ]
        worst, best = torch.stack(tried).max(0)
        place = places[row, best]
        ids[row, place], free[row, place] = new[row, best], False
        if count in counts:
            found[count] = worst
    return found


def guided(tries: int) -> Propose:
    """The places, each with its byte, where the loss rises most if it goes on as its gradient begins."""

    def propose(model: nn.Module, windows: Windows, ids: Tensor, free: Tensor) -> Candidates:
        alphabet, table = windows.alphabet(), model.embed_tokens.weight.detach()
        embeds = table[ids]
        _, slope = _slope(model, windows, embeds)
        rise = slope @ table[alphabet].T - (slope * embeds).sum(-1, keepdim=True)  # [W, T, A]
        rise = rise.masked_fill(ids[..., None] == alphabet, -math.inf)
        rise, new = rise.max(-1)
        places = rise.masked_fill(~free, -math.inf).topk(_possible(tries, free)).indices
        return places, alphabet[new.gather(1, places)]

    return propose


def blind(tries: int, generator: Generator) -> Propose:
    """Drawn places with drawn bytes; of a single one nothing is chosen: chance."""

    def propose(model: nn.Module, windows: Windows, ids: Tensor, free: Tensor) -> Candidates:
        alphabet = windows.alphabet()
        places = torch.multinomial(free.double(), _possible(tries, free), generator=generator)
        step = torch.randint(1, len(alphabet), places.shape, generator=generator)
        return places, alphabet[(torch.searchsorted(alphabet, ids.gather(1, places)) + step) % len(alphabet)]

    return propose


def _possible(tries: int, free: Tensor) -> int:
    return min(tries, int(free.sum(1).min()))


@torch.no_grad()
def _read(model: nn.Module, windows: Windows, ids: Tensor) -> Tensor:
    return bits(model, windows, model.embed_tokens(ids))


def _embeds(model: nn.Module, windows: Windows, size: float) -> tuple[Tensor, Tensor]:
    embeds = model.embed_tokens(windows.ids).detach()
    return embeds, size * embeds.square().mean().sqrt()


def _slope(model: nn.Module, windows: Windows, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """bits [W], and how each window's changes with its embeddings [W, T, D]."""
    embeds = embeds.detach().requires_grad_()
    found = bits(model, windows, embeds)
    return found.detach(), torch.autograd.grad(found.sum(), embeds)[0]
