"""Made sequences whose answers are known: recall of pairs, recall by age, induction.

Every task returns ids [B, T] and targets [B, T]: at a place where something is asked, what the next token should be;
-1 elsewhere. Tokens 0 .. V/2 - 1 are keys and V/2 .. V - 1 values where a task has both; 0 asks nothing.
"""

import torch
from torch import Generator, Tensor

NOTHING = -1


def recall(
    batch: int, pairs: int, tokens: int, vocab: int, *, power: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (MQAR): k1 v1 ... kn vn, then every key once more, with its value behind it.

    The gaps before the queries are even, drawn without replacement with p(i) ~ i^(power - 1): most come soon. What
    stands between them is random tokens. Keys differ, and so do values. Task: Arora et al. 2023, arXiv 2312.04927.

    Raises:
        ValueError: sequences too short, or too few tokens.
    """
    room = (tokens - 2 * pairs) // 2
    if tokens % 2 or room < pairs:
        raise ValueError(f"recall: tokens: expected an even number of at least {4 * pairs}, got {tokens}")
    keys, values = _distinct(batch, pairs, vocab, generator)
    ids = torch.randint(vocab, (batch, tokens), generator=generator)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    weights = torch.arange(1, room + 1, dtype=torch.float64).pow(power - 1).expand(batch, -1)
    place = 2 * pairs + 2 * torch.multinomial(weights, pairs, generator=generator)  # the i-th key's, in random order
    targets = torch.full_like(ids, NOTHING)
    targets.scatter_(1, place, values)
    ids.scatter_(1, place, keys).scatter_(1, place + 1, values)
    return ids, targets


def stream(batch: int, pairs: int, vocab: int, *, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs and queries mixed: 2n slots of key and value, each key in two of them, the second of which asks.

    Which two is drawn evenly, so a pair's age when it is asked for runs from 1 to 2n - 1 slots.

    Returns:
        ids [B, 4n], targets [B, 4n], age [B, 4n] in tokens since the key came first (0 where nothing is asked).
    """
    keys, values = _distinct(batch, pairs, vocab, generator)
    slots = torch.rand(batch, 2 * pairs, generator=generator).argsort(1).view(batch, pairs, 2).sort(-1).values
    first, second = 2 * slots[..., 0], 2 * slots[..., 1]  # [B, n] where the keys stand
    ids = torch.zeros(batch, 4 * pairs, dtype=torch.int64)
    targets, age = torch.full_like(ids, NOTHING), torch.zeros_like(ids)
    for place in (first, second):
        ids.scatter_(1, place, keys).scatter_(1, place + 1, values)
    targets.scatter_(1, second, values)
    age.scatter_(1, second, second - first)
    return ids, targets, age


def repeat(batch: int, length: int, vocab: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Induction: different tokens in random order, and then the same again, all but one, from another of them on.

    Asked is what followed each the first time, so not of the last. Where the second round begins is drawn for each row:
    if it were always the first token, every answer would stand at one distance, and positions alone would find it.

    Raises:
        ValueError: more places than tokens.
    """
    if length > vocab - 1:
        raise ValueError(f"length: expected at most vocab - 1 = {vocab - 1}, got {length}")
    once = 1 + torch.rand(batch, vocab - 1, generator=generator).argsort(1)[:, :length]
    place = (torch.randint(length, (batch, 1), generator=generator) + torch.arange(length - 1)) % length
    again, followers = once.gather(1, place), once.gather(1, (place + 1) % length)
    ids = torch.cat([once, again], 1)
    targets = torch.full_like(ids, NOTHING)
    targets[:, length:] = followers.masked_fill(place == length - 1, NOTHING)
    return ids, targets


def apart(ids: Tensor, targets: Tensor, spacing: int) -> tuple[Tensor, Tensor]:
    """The same sequences with spacing - 1 times token 0 behind each token, so that a neighbour says nothing."""
    B, T = ids.shape
    wide_ids, wide_targets = ids.new_zeros(B, T * spacing), targets.new_full((B, T * spacing), NOTHING)
    wide_ids[:, ::spacing], wide_targets[:, ::spacing] = ids, targets
    return wide_ids, wide_targets


def _distinct(batch: int, pairs: int, vocab: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Keys of 1 .. V/2 - 1 and values of V/2 .. V - 1, [B, n] each, none twice in a row."""
    half = vocab // 2
    if pairs > half - 1:
        raise ValueError(f"pairs: expected at most vocab / 2 - 1 = {half - 1}, got {pairs}")
    draw = lambda n: torch.rand(batch, n, generator=generator).argsort(1)[:, :pairs]
    return 1 + draw(half - 1), half + draw(half)
