"""Several corpora as one: each document is drawn from one of them, by their weights."""

import hashlib
import math
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

from seqzoo.data.shard_files import facts_of
from seqzoo.data.source import Corpus, Document, Position, Source
from seqzoo.data.tokenizer import Tokenizer, load_tokenizer


class Mixture(Source):
    """Document k is of the source that a hash of seed and k says. So a position is k, and where each source stands.

    Args:
        sources: by their names.
        weights: of each name, above 0; a document is of the source with a probability of its weight over their sum.
        seed: of the drawing.
        tokenizers: of each name what its configuration says; the mixture's own is used for all.
        endless: a source that has ended begins anew, in the same order; else those that are left go on without it.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        weights: dict[str, float],
        *,
        seed: int,
        tokenizers: dict[str, str | None],
        endless: bool,
    ) -> None:
        self.sources, self.weights, self.seed, self.endless = sources, weights, seed, endless
        self.tokenizers = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}

    def documents(self, tokenizer: Tokenizer, position: Position = None) -> Iterator[tuple[Document, Position]]:
        self._check(tokenizer)
        begin = dict(drawn=0, places={name: [0, None] for name in self.sources})
        position = begin if position is None else position
        drawn, places = position["drawn"], dict(position["places"])  # of each: its epoch, its position in it
        read = lambda name: self.sources[name].documents(tokenizer, places[name][1])
        streams = {name: read(name) for name in self.sources}
        while names := [name for name in self.sources if self.endless or places[name][0] == 0]:
            name = self._draw(drawn, names)
            epoch, before = places[name]
            found = next(streams[name], None)
            if found is None and before is None and self.endless:
                raise ValueError(f"data.sources.{name}: expected documents, got none")
            if found is None:
                places[name] = [epoch + 1, None]
                streams[name] = read(name)
            else:
                document, after = found
                drawn, places[name] = drawn + 1, [epoch, after]
                yield document, dict(drawn=drawn, places=dict(places))

    def identity(self) -> dict[str, Any]:
        identities = {name: source.identity() for name, source in self.sources.items()}
        return dict(mixture=dict(weights=self.weights, seed=self.seed, sources=identities))

    def _draw(self, drawn: int, names: list[str]) -> str:
        digest = hashlib.blake2b(f"{self.seed} {drawn}".encode(), digest_size=8).digest()
        point = int.from_bytes(digest, "big") / 2**64 * sum(self.weights[name] for name in names)
        for name in names:
            point -= self.weights[name]
            if point < 0:
                return name
        return names[-1]  # rounding

    def _check(self, tokenizer: Tokenizer) -> None:
        for name, said in self.tokenizers.items():
            if facts_of(load_tokenizer(said)) != facts_of(tokenizer):
                raise ValueError(
                    f"data.sources.{name}.tokenizer: expected null or the mixture's, data.tokenizer, got {said}"
                )


def mixture(*, sources: dict[str, dict[str, Any]], weights: dict[str, float] | None, seed: int) -> Corpus:
    """A corpus of corpora. To train on, it has no end; to validate on, each document once.

    Args:
        sources: name -> what configs/data says of a source, each with its own choices.
        weights: name -> its weight, above 0; None is the same for all.
        seed: of the drawing.

    Raises:
        ValueError: no sources, weights of other names or not above 0, and what a source raises.
    """
    weights = dict.fromkeys(sources, 1) if weights is None else weights
    if not sources or weights.keys() != sources.keys():
        raise ValueError(
            f"data.weights: expected one for each of data.sources={sorted(sources)}, got {sorted(weights)}"
        )
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"data.weights.{name}: expected a number above 0, got {weight!r}")
    corpora = {name: _corpus(name, said) for name, said in sources.items()}
    tokenizers = {name: said.get("tokenizer") for name, said in sources.items()}
    options = dict(seed=seed, tokenizers=tokenizers)
    sides = ({name: getattr(corpus, side) for name, corpus in corpora.items()} for side in Corpus._fields)
    return Corpus(*(Mixture(side, weights, endless=i == 0, **options) for i, side in enumerate(sides)))


def _corpus(name: str, said: dict[str, Any]) -> Corpus:
    if not isinstance(said, dict) or "_target_" not in said:
        raise ValueError(f"data.sources.{name}: expected what a file of configs/data says, got {said!r}")
    make = resolve_name(said["_target_"])
    return make(**{key: value for key, value in said.items() if key not in ("_target_", "tokenizer")})
