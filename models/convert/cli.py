"""seqzoo-convert SRC DST: a checkpoint folder of another architecture into one of ours, or back."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from seqzoo.models.convert import architectures, convert


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr where the input is at fault."""
    parser = argparse.ArgumentParser(prog="seqzoo-convert", description=__doc__)
    parser.add_argument(
        "src", metavar="SRC", help="folder with config.json and safetensors; its config says what it is"
    )
    parser.add_argument("dst", metavar="DST", help="folder to make; not there yet, or empty")
    parser.add_argument("--to", choices=[*architectures(), "seqzoo"], help="what to write, where SRC leaves a choice")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="of one file [5]")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, from the headers alone")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there too, as JSON")
    parser.add_argument(
        "--verify", action="store_true", help="load both models whole, in fp32, and compare their logits"
    )
    parser.add_argument(
        "--pickle", action="store_true", help="read pickle files (weights only) if there is nothing else"
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity in weights as they are")
    args = parser.parse_args(argv)
    try:
        report = convert(
            args.src, args.dst, to=args.to, max_shard_size=int(args.max_shard_size * 1e9), dry_run=args.dry_run,
            verify=args.verify, pickle=args.pickle, allow_nonfinite=args.allow_nonfinite,
        )  # fmt: skip
        print(report)
        if args.report is not None:
            args.report.write_text(json.dumps(report.json(), indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"seqzoo-convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
