"""seqzoo-convert SRC DST: a checkpoint folder of another architecture into one of ours, or back; or, with the name of a
layout, a Transformer into an efficient hybrid."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from seqzoo.models.convert import architectures, convert
from seqzoo.models.convert.layouts import layout, layouts


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr where the input is at fault."""
    parser = argparse.ArgumentParser(prog="seqzoo-convert", description=__doc__)
    parser.add_argument(
        "src", metavar="SRC", help="folder with config.json and safetensors; its config says what it is"
    )
    parser.add_argument("dst", metavar="DST", help="folder to make; not there yet, or empty")
    parser.add_argument(
        "--to", metavar="WHAT", help=f"where SRC leaves a choice, an architecture: {', '.join(architectures())} or "
        f"seqzoo; or a layout: {', '.join(layouts())} or a YAML file",
    )  # fmt: skip
    stay = parser.add_mutually_exclusive_group()
    stay.add_argument("--keep", metavar="I,J,...", help="of a layout: layers that stay attention, counted from 0")
    stay.add_argument("--keep-every", type=int, metavar="N", help="of a layout: every Nth layer stays attention")
    stay.add_argument(
        "--keep-important",
        type=int,
        metavar="N",
        help="of a layout: the N layers that --calibrate finds to matter most",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXT",
        help="what importance is measured on, and what --quantise makes its errors make up for each other on",
    )
    parser.add_argument("--scale", default="each", help="of experts that are copies: each, down or none [each]")
    parser.add_argument("--quantise", action="store_true", help="round the projections' weights to int8 (W8ASpike)")
    parser.add_argument("--group", type=int, help="of --quantise: channels that share a scale [128]")
    parser.add_argument("--skip", action="append", metavar="REGEX", help="of --quantise: projections left as they are")
    parser.add_argument("--seed", type=int, default=0, help="of a layout's new tensors [0]")
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
        _check(args)
        rounding = dict(group=128 if args.group is None else args.group, skip=args.skip or [])
        report = convert(
            args.src, args.dst, to=args.to, max_shard_size=int(args.max_shard_size * 1e9), dry_run=args.dry_run,
            verify=args.verify, pickle=args.pickle, allow_nonfinite=args.allow_nonfinite, keep=_keep(args),
            scale=args.scale, seed=args.seed,
            quantise=rounding if args.quantise else None, calibrate=args.calibrate if args.quantise else None,
        )  # fmt: skip
        print(report)
        if args.report is not None:
            args.report.write_text(json.dumps(report.json(), indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"seqzoo-convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"seqzoo-convert: {args.dst}: interrupted: the same call goes on from what is complete", file=sys.stderr)
        return 130
    return 0


def _check(args: argparse.Namespace) -> None:
    """What would be found out too late. Raises ValueError: words that fit no conversion, a report with no folder."""
    if not 0 < args.max_shard_size < math.inf:
        raise ValueError(f"--max-shard-size: expected a size above 0, got {args.max_shard_size}")
    if not args.quantise and (args.group is not None or args.skip):
        raise ValueError("--group and --skip: expected with --quantise alone")
    if args.report is not None and (args.report.is_dir() or not args.report.absolute().parent.is_dir()):
        raise ValueError(f"--report: expected a file in a folder that is there, got {args.report}")


def _keep(args: argparse.Namespace) -> int | Sequence[int]:
    """The layers that stay, measured if asked for.

    Raises:
        ValueError: words that are no layers, or no text to measure on.
    """
    if args.keep_important is not None and args.calibrate is None:
        raise ValueError("--keep-important: expected with --calibrate, got it without")
    if args.calibrate is not None and args.keep_important is None and not args.quantise:
        raise ValueError("--calibrate: expected with --keep-important or --quantise, got it with neither")
    if args.keep_important is not None and args.to is None:
        raise ValueError("--keep-important: expected with a layout, got it without --to")
    if args.keep_every is not None:
        return args.keep_every
    if args.keep is not None:
        if not all(x.strip().isdecimal() for x in args.keep.split(",")):
            raise ValueError(f"--keep: expected numbers of layers such as 3,7, got {args.keep!r}")
        return [int(x) for x in args.keep.split(",")]
    if args.keep_important is None:
        return ()
    from seqzoo.models.convert import calibration
    from seqzoo.models.convert.approximate import to_layout
    from seqzoo.models.convert.loading import load

    how = dict(dtype=None, device=None, revision=None, pickle=args.pickle, allow_nonfinite=args.allow_nonfinite)
    source = load(args.src, **how)
    made = to_layout(source, layout(args.to), scale=args.scale, seed=args.seed).eval()
    length = min(512, source.config.max_position_embeddings or 512)
    ids = calibration.calibration_ids(Path(args.src), args.calibrate, length=length)
    losses = calibration.importance(source, made, ids)
    kept = calibration.most_important(losses, args.keep_important)
    for layer, loss in losses.items():
        print(f"layer {layer}: {loss:.4f} nats/token lost with its new mixer{', stays' if layer in kept else ''}")
    return kept
