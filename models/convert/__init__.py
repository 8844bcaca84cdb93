"""Checkpoint folders of other architectures into ours, and back.

An architecture is a file here: its name is the `model_type` of a config.json. It has
    to_ours(config.json) -> SeqZooConfig        to_theirs(SeqZooConfig) -> config.json
    rows(SeqZooConfig, their names) -> rows     KEPT, a regex of their tensors that ours has no room for
and, where some of those follow from the config,
    added(SeqZooConfig) -> name: tensor         for a folder that has not kept them
    check_kept(SeqZooConfig, name: tensor)      raises ValueError where a folder's own are others
"""

import pkgutil
from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from seqzoo.models.checkpoints import check_links, read_json

if TYPE_CHECKING:
    from seqzoo.models.convert.report import Report

_HOUSE = {  # the files here that are no architecture
    *("adopt", "approximate", "calibration", "cli", "folders", "int8", "layouts", "loading", "origin", "plain"),
    *("qwen3_hybrid", "report", "rules", "verify", "writing"),
}


def architectures() -> list[str]:
    """All that can be converted from and to."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _HOUSE)


def architecture(name: Any) -> ModuleType:
    """The module of one. Raises ValueError: no such one, or one that the transformers that is installed lacks."""
    if name not in architectures():
        raise ValueError(f"architecture: expected one of {architectures()}, got {name!r}")
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise ValueError(
            f"architecture {name}: expected a transformers that has it, got {version('transformers')}: {error}"
        ) from None


def kind_of(folder: Path) -> str:
    """The architecture that its config.json names. Raises ValueError: none that is known."""
    config, known = read_json(folder / "config.json"), architectures()
    kind = config.get("model_type")
    if kind not in (*known, "seqzoo"):
        named = f" ({config['architectures']})" if "architectures" in config else ""
        raise ValueError(
            f"{folder / 'config.json'}: model_type: expected one of {known} or 'seqzoo', got {kind!r}{named}"
        )
    return kind


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str | Path | Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
    dry_run: bool = False,
    verify: bool = False,
    pickle: bool = False,
    allow_nonfinite: bool = False,
    keep: int | Collection[int] = (),
    scale: str = "each",
    seed: int = 0,
    quantise: Mapping[str, Any] | None = None,
    calibrate: str | Path | None = None,
) -> "Report":
    """A checkpoint folder of another architecture into one of ours, or back; SRC's config says which. Or, where `to` is
    a layout, a Transformer of any architecture (ours too) into that layout, approximately.

    Tensor after tensor, memory-mapped; DST appears when it is complete, and the same call goes on where one was
    interrupted. What ours has no room for is kept in DST, so that the way back gives every tensor of SRC as it was:
    name, shape, dtype, bytes and file.

    Args:
        src: a folder with config.json and safetensors.
        dst: the folder to make; it may exist if it is empty.
        to: the architecture to write; None is ours, or for one of ours what it came from or the only one that fits. Or
            a layout, as `models/convert/layouts` has them: a name, a YAML file, or a mapping.
        max_shard_size: [bytes] of one file, where no origin says how the files were.
        dry_run: only look at the headers, write nothing.
        verify: load both models, one after the other, whole and in fp32, and compare their logits; DST appears if they
            agree. Where transformers has no class for one of them, the report says so.
        pickle: read pickle files where SRC has no safetensors; nothing in them is run.
        allow_nonfinite: take NaN and infinity in weights as they are.
        keep: of a layout, layers whose mixers stay as they are, whatever its pattern says; a number n is every n-th.
        scale: of a layout with experts, what their copies of a gated MLP are multiplied by: each, down or none.
        seed: of a layout, what new tensors are drawn from.
        quantise: round the projections' weights to int8 (W8ASpike): the options of `models/quantise.py`'s Quantisation,
            {} for its defaults. Into ours alone, and with no way back.
        calibrate: of `quantise`, a text file: SRC's tokenizer makes up to 128 rows of 512 tokens of it, and weights are
            rounded so that their errors make up for each other there. For this the source and the new model are held
            whole in memory, before anything is written. None rounds to the nearest.

    Returns:
        The report: every tensor's fate. `str()` of it is a table.

    Raises:
        ValueError: an unknown architecture or feature, a folder that is damaged, tensors that do not fit the config,
            a DST that is not empty or in SRC, weights that are not finite, logits that differ, no space left, a file
            that cannot be read or written, a text that is too short.
    """
    from seqzoo.models.convert import (  # they need transformers, a list does not
        approximate,
        calibration,
        folders,
        int8,
        layouts,
        loading,
        writing,
    )
    from seqzoo.models.convert import verify as verifying

    src, dst = Path(src), Path(dst)
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size: expected 1 byte or more, got {max_shard_size}")
    try:
        writing.check_target(src, dst)
        check_links(src)
        how: dict[str, Any] = dict(max_shard_size=max_shard_size, pickle=pickle)
        exact = to is None or to in ("seqzoo", *architectures())
        chosen = None if exact else layouts.layout(to)
        moved = dict(keep=keep, scale=scale)
        if exact and (keep, scale, seed) != ((), "each", 0):
            raise ValueError(f"keep, scale, seed: expected with a layout alone, got them with {to!r}")
        if calibrate is not None and quantise is None:
            raise ValueError("calibrate: expected with quantise alone, got it without")
        if chosen is None:
            plan = folders.plan(src, kind_of(src), to, **how)
        else:
            plan = approximate.plan(src, kind_of(src), chosen, seed=seed, **moved, **how)
        if quantise is not None:
            if exact and (kind_of(src) == "seqzoo" or verify):
                what = "verify" if verify else "a folder of ours"
                raise ValueError(f"quantise: expected a conversion into ours, or a layout, and got {what}")
            if calibrate is not None and not Path(calibrate).is_file():
                raise ValueError(f"calibrate: expected a text file, got {calibrate}")

            def floats():
                opened: dict[str, Any] = dict(dtype=None, device=None, revision=None, pickle=pickle)
                model = loading.load(src, allow_nonfinite=allow_nonfinite, **opened)
                with writing.one_thread():  # as when tensors are written
                    return model if chosen is None else approximate.to_layout(model, chosen, seed=seed, **moved)

            seen = calibration.NOTHING
            if calibrate is not None and not dry_run:
                seen = calibration.projections_on(floats(), src, Path(calibrate), quantise)
            plan = int8.rounded(plan, quantise, max_shard_size, seen)
        if dry_run and verify:
            return plan.report._replace(verification=verifying.NOTHING_WRITTEN)
        if dry_run:
            return plan.report
        compare = verifying.compare_logits if exact else verifying.compare_layers
        check = (lambda folder: compare(src, folder)) if verify else None
        return plan.report._replace(verification=writing.write(plan, dst, allow_nonfinite=allow_nonfinite, check=check))
    except OSError as error:
        raise ValueError(f"{error.filename or dst}: {error.strerror or error}") from error
