"""seqzoo-convert SRC DST: a checkpoint folder of another architecture into one of ours, or back."""

import argparse
import sys
from collections.abc import Sequence

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
    args = parser.parse_args(argv)
    try:
        size = int(args.max_shard_size * 1e9)
        print(convert(args.src, args.dst, to=args.to, max_shard_size=size, dry_run=args.dry_run))
    except (ValueError, OSError) as error:
        print(f"seqzoo-convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
