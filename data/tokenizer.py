"""From bytes to token ids. A byte is its own id, unless a tokenizer is named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BOUNDARY = "<|document|>"  # begins and ends a document, and fills what is left of a row


class Tokenizer:
    """What training needs of a tokenizer; `save` leaves one that `AutoTokenizer` opens, without seqzoo too.

    Attributes:
        start, end: the id before a document's first token, and the id to predict after its last.
        vocab_size: ids are below it.

    Args:
        inner: a tokenizer of transformers.
        raw: an id is a byte: text needs no encoding, and need not be UTF-8.

    Raises:
        ValueError: a tokenizer that has no token for the start or end of a text.
    """

    def __init__(self, inner: Any, *, raw: bool) -> None:
        marks = [mark for mark in (inner.bos_token_id, inner.eos_token_id) if mark is not None]
        if not marks:
            raise ValueError(f"tokenizer: expected a bos or eos token, got neither in {type(inner).__name__}")
        self.inner, self.raw = inner, raw
        self.start, self.end = marks[0], marks[-1]
        self.vocab_size = len(inner)

    def encode(self, document: bytes) -> Tensor:
        """A document's ids, [n] int64, without marks."""
        if self.raw:
            return torch.frombuffer(bytearray(document), dtype=torch.uint8).long()
        text = document.decode("utf-8", "replace")
        return torch.tensor(self.inner.encode(text, add_special_tokens=False, verbose=False), dtype=torch.long)

    def decode(self, ids: list[int]) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD."""
        return self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: str) -> None:
        self.inner.save_pretrained(folder)

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption; plain JSON."""
        vocabulary = json.dumps(self.inner.get_vocab(), sort_keys=True).encode()
        digest = hashlib.sha256(vocabulary).hexdigest()
        return dict(vocab_size=self.vocab_size, start=self.start, end=self.end, vocabulary=digest)


def load_tokenizer(name: str | None) -> Tokenizer:
    """The byte tokenizer for None, or any that `AutoTokenizer` opens, by name or folder.

    Raises:
        ValueError: nothing of that name, or a tokenizer without marks.
    """
    if name is None:
        return Tokenizer(_byte_level(), raw=True)
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: expected what AutoTokenizer opens, got {name!r}: {error}") from error
    return Tokenizer(inner, raw=False)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError where a model of `vocab_size` ids cannot take every id of the tokenizer."""
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size: expected at least {tokenizer.vocab_size} (the tokenizer's), got {vocab_size}"
        )


def check_same_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises ValueError where a model's folder holds another tokenizer: its ids would mean other words."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return
    own, got = load_tokenizer(str(folder)).identity(), tokenizer.identity()
    if own["vocabulary"] != got["vocabulary"]:
        sizes = f"{own['vocab_size']} ids", f"one of {got['vocab_size']}"
        raise ValueError(f"data.tokenizer: expected that of init_from, {folder}, which has {sizes[0]}, got {sizes[1]}")


def hide_bars() -> None:
    """Transformers draws a bar for each file that it reads or writes, through that of whoever calls it."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _byte_level() -> Any:
    """Byte b has id b; there are no merges, so text is its UTF-8 bytes and any bytes decode."""
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline = Pipeline(models.BPE(vocab=_visible(), merges=[]))
    pipeline.pre_tokenizer, pipeline.decoder = level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        pad_token=BOUNDARY,
        clean_up_tokenization_spaces=False,
    )


def _visible() -> dict[str, int]:
    """The characters by which the byte-level format writes bytes: a visible Latin-1 byte by itself, others from 256."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
