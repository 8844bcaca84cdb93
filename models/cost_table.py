"""seqzoo-cost MODEL: what a model costs, part by part, and what decoding keeps, layer by layer, without building it."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from seqzoo.models.checkpoints import read_json
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert import architecture, architectures
from seqzoo.models.cost import CONTEXTS, cost, state_table


def main(argv: Sequence[str] | None = None, *, named: Mapping[str, Callable[[], SeqZooConfig]] | None = None) -> int:
    """Prints both tables. `named`: models that are known by a name.

    Returns the exit status: 0, or 2 with one line on stderr where the input is at fault.
    """
    named = named or {}
    parser = argparse.ArgumentParser(prog="seqzoo-cost", description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL",
        help=f"a config.json or its folder, ours or of {', '.join(architectures())}; or one of {', '.join(named)}",
    )  # fmt: skip
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=list(CONTEXTS), metavar="TOKENS",
        help=f"lengths of a sequence; FLOPs are at the first {list(CONTEXTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of what decoding keeps"
    )
    args = parser.parse_args(argv)
    try:
        if min(args.contexts) < 1:
            raise ValueError(f"contexts: expected at least 1 token, got {min(args.contexts)}")
        dtype = getattr(torch, args.dtype)
        if args.model not in named and not Path(args.model).exists():
            raise ValueError(f"expected a config.json, its folder, or one of {list(named)}, got {args.model!r}")
        config = named[args.model]() if args.model in named else load_config(Path(args.model))
        print(cost_text(config, args.contexts[0], dtype), state_text(config, args.contexts, dtype), sep="\n\n")
    except (ValueError, OSError) as error:
        print(f"seqzoo-cost: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def load_config(path: Path) -> SeqZooConfig:
    """A config.json, or that of a folder. Raises ValueError: unreadable, or of no architecture that is known."""
    path = path / "config.json" if path.is_dir() else path
    raw = read_json(path)
    kind = raw.get("model_type")
    return SeqZooConfig.from_dict(raw) if kind == "seqzoo" else architecture(kind).to_ours(raw)


def cost_text(config: SeqZooConfig, context: int, dtype: torch.dtype) -> str:
    """Part by part."""
    counted = cost(config, context=context, dtype=dtype)
    head = ["part", "layers", "parameters", "active", "FLOPs/token", f"state at {context:,}"]
    lines = [[part.name, *(f"{n:,}" for n in part[1:])] for part in counted.parts]
    return _text([head, *lines, ["all", "", *(f"{n:,}" for n in counted[:4])]])


def state_text(config: SeqZooConfig, contexts: Sequence[int] = CONTEXTS, dtype: torch.dtype = torch.bfloat16) -> str:
    """Layer by layer, in bytes per sequence at each context."""
    rows = state_table(config, contexts=contexts, dtype=dtype)
    head = ["layer", "bytes at", *(f"{n:,}" for n in contexts)]
    lines = [[str(row.layer), row.part, *(f"{n:,}" for n in row.bytes)] for row in rows]
    sums = [f"{sum(row.bytes[i] for row in rows):,}" for i in range(len(contexts))]
    return _text([head, *lines, ["all", "", *sums]])


def _text(lines: list[list[str]]) -> str:
    """Words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = [column[1][:1].isdigit() for column in zip(*lines, strict=True)]
    pads = [str.rjust if number else str.ljust for number in numbers]
    rows = ([pad(x, n) for pad, x, n in zip(pads, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)
