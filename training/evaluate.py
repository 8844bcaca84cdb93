"""A model on text that it was not trained on, and text that it makes."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from seqzoo.data.packing import Batch
from seqzoo.data.tokenizer import Tokenizer
from seqzoo.training.parallel import Ranks


def bits(nats: float, num_bytes: int) -> float:
    """Bits per byte of text."""
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], precision: AbstractContextManager, ranks: Ranks | None = None
) -> dict[str, float]:
    """Cross-entropy alone, without what the parts add to the loss.

    Args:
        model: left as it was, in training or not.
        batches: at least one.
        precision: entered for each call of the model.
        ranks: that share the work; None is this process alone.

    Returns:
        loss [nats/token], bits_per_byte.
    """
    was_training = model.training
    model.eval()
    nats, targets, num_bytes = 0.0, 0, 0
    for batch in batches:
        inputs = (batch if ranks is None else ranks.mine(batch)).inputs(next(model.parameters()).device)
        with precision, nullcontext() if ranks is None else ranks.together():
            out = model(**inputs, num_items_in_batch=1, return_logits=False, use_cache=False)
        lost = out.loss - out.aux_loss
        nats += (lost if ranks is None else ranks.sum(lost)).item()
        targets, num_bytes = targets + batch.num_targets, num_bytes + batch.num_bytes
    model.train(was_training)
    return {"loss": nats / targets, "bits_per_byte": bits(nats, num_bytes)}


def check_lengths(tokenizer: Tokenizer, longest: int | None, *, row: int, prompt: str, tokens: int) -> None:
    """That a model can read all that a run will give it; better known before training than after.

    Args:
        tokenizer: of the prompt.
        longest: tokens that the model can read; None is no limit.
        row: tokens of a row.
        prompt, tokens: of the sample.

    Raises:
        ValueError: a row or a sample that is longer.
    """
    if longest is None:
        return
    if row > longest:
        raise ValueError(
            f"trainer.sequence_length: expected at most model.max_position_embeddings={longest}, got {row}"
        )
    length = 1 + len(tokenizer.encode(prompt.encode())) + tokens  # 1: the document's start
    if tokens and length > longest:
        raise ValueError(
            f"trainer.sample_tokens: expected at most model.max_position_embeddings={longest} together with the "
            f"prompt's {length - tokens}, got {tokens}"
        )


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Tokenizer, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """The prompt, at the beginning of a document, and what the model makes of it.

    Args:
        model: with transformers' `generate`.
        tokenizer: its own.
        prompt: may be empty.
        tokens: to make at most; a model may end the document before.
        temperature: of the drawing; 0 takes the likeliest.
        seed: of the drawing; no other generator is touched.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.cat([torch.tensor([tokenizer.start]), tokenizer.encode(prompt.encode())])[None].to(device)
    drawing = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        # a compiled model would be compiled again for each of the lengths that it grows through
        with torch.compiler.set_stance("force_eager"):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **drawing)
    model.train(was_training)
    return tokenizer.decode(out[0].tolist())
