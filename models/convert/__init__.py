"""Checkpoint folders of other architectures into ours, and back.

An architecture is a file here: its name is the `model_type` of a config.json. It has
    to_ours(config.json) -> SeqZooConfig        to_theirs(SeqZooConfig) -> config.json
    rows(SeqZooConfig, their names) -> rows     KEPT, a regex of their tensors that ours has no room for
and, where some of those follow from the config,
    added(SeqZooConfig) -> name: tensor         for a folder that has not kept them
    check_kept(SeqZooConfig, name: tensor)      raises ValueError where a folder's own are others
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from seqzoo.models.checkpoints import check_links, read_json

if TYPE_CHECKING:
    from seqzoo.models.convert.report import Report

_HOUSE = {  # the files here that are no architecture
    *("cli", "folders", "loading", "origin", "plain", "report", "rules", "verify", "writing"),
}


def architectures() -> list[str]:
    """All that can be converted from and to."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _HOUSE)


def architecture(name: Any) -> ModuleType:
    """The module of one. Raises ValueError: no such one."""
    if name not in architectures():
        raise ValueError(f"architecture: expected one of {architectures()}, got {name!r}")
    return import_module(f"{__name__}.{name}")


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
    to: str | None = None,
    max_shard_size: int = 5 * 10**9,
    dry_run: bool = False,
    verify: bool = False,
    pickle: bool = False,
    allow_nonfinite: bool = False,
) -> "Report":
    """A checkpoint folder of another architecture into one of ours, or back; SRC's config says which.

    Tensor after tensor, memory-mapped; DST appears when it is complete, and the same call goes on where one was
    interrupted. What ours has no room for is kept in DST, so that the way back gives every tensor of SRC as it was:
    name, shape, dtype, bytes and file.

    Args:
        src: a folder with config.json and safetensors.
        dst: the folder to make; it may exist if it is empty.
        to: the architecture to write; None is ours, or for one of ours what it came from or the only one that fits.
        max_shard_size: [bytes] of one file, where no origin says how the files were.
        dry_run: only look at the headers, write nothing.
        verify: load both models, one after the other, whole and in fp32, and compare their logits; DST appears if they
            agree. Where transformers has no class for one of them, the report says so.
        pickle: read pickle files where SRC has no safetensors; nothing in them is run.
        allow_nonfinite: take NaN and infinity in weights as they are.

    Returns:
        The report: every tensor's fate. `str()` of it is a table.

    Raises:
        ValueError: an unknown architecture or feature, a folder that is damaged, tensors that do not fit the config,
            a DST that is not empty or in SRC, weights that are not finite, logits that differ, no space left, a file
            that cannot be read or written.
    """
    from seqzoo.models.convert import folders, writing  # they need transformers, a list does not
    from seqzoo.models.convert import verify as verifying

    src, dst = Path(src), Path(dst)
    try:
        writing.check_target(src, dst)
        check_links(src)
        plan = folders.plan(src, kind_of(src), to, max_shard_size=max_shard_size, pickle=pickle)
        if dry_run and verify:
            return plan.report._replace(verification=verifying.NOTHING_WRITTEN)
        if dry_run:
            return plan.report
        check = (lambda folder: verifying.compare_logits(src, folder)) if verify else None
        return plan.report._replace(verification=writing.write(plan, dst, allow_nonfinite=allow_nonfinite, check=check))
    except OSError as error:
        raise ValueError(f"{error.filename or dst}: {error.strerror or error}") from error
