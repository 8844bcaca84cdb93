"""What is measured of a conversion on a text: how far its layers are from the source's, which of the source's layers
matter most, and what projections are given whose weights are to be rounded.

Layers are measured on the source's own hidden states, one at a time, so that no layer pays for another.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from seqzoo.models.calls import mixer_calls, sinks_seen
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.quantise import moments, quantisation_spec

ROWS, LENGTH = 128, 512  # of a text that weights are rounded on, at most


class Seen(NamedTuple):
    """What projections were given on a text."""

    text: str  # its name, and what tells it from others
    moments: dict[str, Tensor]  # as `models/quantise.py` has them


NOTHING = Seen("", {})


def calibration_ids(folder: Path, text: Path, *, rows: int = 4, length: int = 512, most: int = 4) -> Tensor:
    """The beginning of a text as ids [rows, length] of the folder's own tokenizer, shorter where the text is; of a long
    one as many rows as there are, up to `most`.

    Raises:
        ValueError: a folder without a tokenizer, a text that cannot be read or is too short.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(text.read_text(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibration: {text} with the tokenizer of {folder}: {' '.join(str(error).split())}"
        ) from None
    rows = max(rows, min(most, len(ids) // length))
    length = min(length, len(ids) // rows)
    if length < 2:
        raise ValueError(f"calibration: {text}: expected at least {2 * rows} tokens, got {len(ids)}")
    return torch.tensor(ids[: rows * length]).view(rows, length)


def projections_on(model: SeqZooForCausalLM, folder: Path, text: Path, options: Mapping[str, Any]) -> Seen:
    """What a model's projections will be given on a text.

    Args:
        model: of float weights.
        folder: with the tokenizer.
        options: of `models/quantise.py`'s Quantisation.

    Raises:
        ValueError: as `calibration_ids`, or options that are none.
    """
    length = min(LENGTH, model.config.max_position_embeddings or LENGTH)
    ids = calibration_ids(folder, text, length=length, most=ROWS)
    found = moments(model, quantisation_spec(dict(options)), ids)
    return Seen(f"{text.name} ({hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8]})", found)


def most_important(losses: dict[int, float], count: int) -> list[int]:
    """The `count` layers whose replacement loses most. Raises ValueError: more than there are."""
    if not 0 <= count <= len(losses):
        raise ValueError(f"keep: expected 0 to {len(losses)} layers to stay attention, got {count}")
    return sorted(sorted(losses, key=losses.__getitem__)[len(losses) - count :])


def changed_layers(source: SeqZooConfig, made: SeqZooConfig) -> list[int]:
    """The layers whose mixers differ. Raises ValueError: models of other sizes."""
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        one, other = getattr(source, name), getattr(made, name)
        if one != other:
            raise ValueError(f"{name}: expected that of the source, {one}, got {other}")
    spec = lambda c, i: c.mixers.get(c.pattern[i % len(c.pattern)].partition("/")[0])
    return [i for i in range(source.num_hidden_layers) if spec(source, i) != spec(made, i)]


@torch.no_grad()
def layer_errors(source: SeqZooForCausalLM, made: SeqZooForCausalLM, ids: Tensor) -> dict[int, float]:
    """Of each layer whose mixer is another: ||made(x) - source(x)|| / ||source(x)||, x what comes into the source's.

    The made model's mixers see its own sink tokens, as they do when it runs.

    Args:
        source, made: of one depth and width.
        ids: [B, T].
    """
    changed, errors = changed_layers(source.config, made.config), {}
    own = sinks_seen(made)
    for i, ((x, span), expected) in enumerate(mixer_calls(source, ids)):
        if i in changed:
            got = made.stack.levels()[i].mixer(x, span._replace(sinks=own[i]))[0]
            errors[i] = ((got - expected).norm() / expected.norm()).item()
    return errors


@torch.no_grad()
def importance(source: SeqZooForCausalLM, made: SeqZooForCausalLM, ids: Tensor) -> dict[int, float]:
    """Of each layer: what the source's predictions lose when this one mixer alone is replaced by the made model's
    [nats/token, the divergence of the new predictions from the old].

    Args:
        source, made: of one depth and width; `made` with every layer converted that may be.
        ids: [B, T].
    """
    changed = changed_layers(source.config, made.config)
    wanted, lost = source(ids, use_cache=False).logits.log_softmax(-1), {}
    for i in changed:
        theirs, ours = source.stack.levels()[i], made.stack.levels()[i]
        kept, theirs.mixer = theirs.mixer, ours.mixer
        try:
            got = source(ids, use_cache=False).logits.log_softmax(-1)
        finally:
            theirs.mixer = kept
        lost[i] = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
    return lost
