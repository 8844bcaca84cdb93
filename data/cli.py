"""seqzoo-tokenize FOLDER data=... : documents to memory-mapped shards of tokens, once, for data=shards
data.folder=FOLDER. The words are those of a training run: any source of text, and data.tokenizer. Cut off, or killed,
the same command goes on from the shards that are done."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from seqzoo.data.shards import shards
from seqzoo.data.source import Corpus
from seqzoo.data.tokenizing import tokenize

Configured = Callable[[Sequence[str]], tuple[Corpus, str | None, dict[str, Any]]]


def main(argv: Sequence[str] | None = None, *, configured: Configured) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr where the input is at fault, 1 where a worker died.

    Args:
        argv: the command line's words; None is this process's.
        configured: from the words after FOLDER to a corpus, the tokenizer's name, and what the corpus was made of.
    """
    parser = argparse.ArgumentParser(prog="seqzoo-tokenize", description=__doc__)
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="not there yet, empty, or begun by the same command"
    )
    parser.add_argument("words", metavar="data=...", nargs="*", help="what the shards are made of [data=stdlib]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes [one a core]")
    parser.add_argument("--shard-megabytes", type=float, default=64, metavar="MB", help="of text in a shard [64]")
    parser.add_argument("--check", action="store_true", help="only compare all that is in FOLDER with its checksums")
    args = parser.parse_intermixed_args(argv)
    began = time.perf_counter()
    try:
        if args.check:
            if args.words:
                raise ValueError(f"--check: expected FOLDER alone, got {' '.join(args.words)}")
            shards(folder=str(args.folder), checksums=True)
            print(f"{args.folder}: all is as it was written")
            return 0
        corpus, tokenizer, source = configured(args.words)
        manifest = tokenize(
            corpus, tokenizer, args.folder, source=source, shard_bytes=int(args.shard_megabytes * 1e6),
            workers=args.workers, say=partial(print, flush=True),
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError) as error:
        print(f"seqzoo-tokenize: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    seconds = time.perf_counter() - began
    for side, facts in manifest["sides"].items():
        documents, tokens, size = (sum(x[key] for x in facts) for key in ("documents", "tokens", "bytes"))
        print(f"{side}: {documents:,} documents, {tokens:,} tokens, {size:,} bytes of text in {len(facts)} shards")
    print(f"{args.folder}: done in {seconds:.1f} s; train with data=shards data.folder={args.folder}")
    return 0
