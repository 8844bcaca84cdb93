"""Checkpoint folders that are whole or not there.

    step-00000123/
        config.json, model.safetensors, tokenizer...    what `from_pretrained` opens
        training.safetensors, training.json             what a run needs to go on
        manifest.json                                   size and sha256 of each file above

A folder is written under another name, brought to the disk, and renamed. What a crash leaves is either the old state or
the new one.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from seqzoo.models.checkpoints import MANIFEST, RUN_FACTS, RUN_TENSORS

PARTIAL = ".partial"
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: holds them; made when the first is saved.
        keep: how many of the newest that are whole to keep.
        milestone: those of steps that are multiples of it are kept for good; None is no such step.

    Raises:
        ValueError: keep or milestone below 1.
    """

    def __init__(self, folder: Path, keep: int, milestone: int | None = None) -> None:
        if keep < 1:
            raise ValueError(f"trainer.keep: expected at least 1 checkpoint, got {keep}")
        if milestone is not None and milestone < 1:
            raise ValueError(f"trainer.milestone_every: expected at least 1 step or null, got {milestone}")
        self.folder, self.keep, self.milestone = folder, keep, milestone
        self._whole: set[Path] = set()  # found so here: a content is hashed once, not at every save

    def save(self, step: int, write_model: Callable[[str], None], tensors: dict[str, Tensor], facts: dict) -> Path:
        """Write the checkpoint of a step, then remove those beyond `keep`.

        Args:
            step: its name.
            write_model: writes into a folder what `from_pretrained` opens.
            tensors, facts: what the run needs to go on; facts are plain JSON.

        Raises:
            OSError: the disk is full or fails; the checkpoints that were there are untouched.
        """
        partial, final = self.places(step)
        try:
            self.open(partial)
            _write(partial, write_model, tensors, facts)
            self.commit(partial, final)
        except BaseException:
            self.drop(partial)
            raise
        return final

    def places(self, step: int) -> tuple[Path, Path]:
        """Where the checkpoint of a step is written, and where it then stands."""
        final = self.folder / f"step-{step:08d}"
        return final.with_name(final.name + PARTIAL), final

    def open(self, partial: Path) -> None:
        """Make the folder to write into; what earlier crashes left is removed. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left_over)
        partial.mkdir()

    def commit(self, partial: Path, final: Path) -> None:
        """Give what is sealed its name, then remove those beyond `keep`. Raises OSError."""
        if final.exists():  # a damaged one, or it would have been resumed
            os.replace(final, self.folder / f"damaged{PARTIAL}")
        os.replace(partial, final)
        _to_disk(self.folder)
        self._whole.add(final)
        self._remove_old()

    def drop(self, partial: Path) -> None:
        """Away with what could not be written."""
        shutil.rmtree(partial, ignore_errors=True)

    def all(self) -> list[Path]:
        """Oldest first, whole or not."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != PARTIAL)

    def newest(self) -> Path | None:
        """The newest that is whole; those passed over are named in the log. None where there is none.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        found = self.all()
        for path in reversed(found):
            damage = damage_of(path)
            if damage is None:
                self._whole.add(path)
                return path
            log.warning("%s is damaged (%s): looking for the one before", path, damage)
        if found:
            raise ValueError(f"{self.folder}: expected a whole checkpoint, got only damaged ones")
        return None

    def _remove_old(self) -> None:
        """All that is older than the oldest to keep. A damaged one is no checkpoint, so it does not count."""
        found = self.all()
        whole = [path for path in found if self._is_whole(path)]
        oldest = whole[-self.keep :][0]
        for path in found[: found.index(oldest)]:
            if self.milestone and int(path.name.removeprefix("step-")) % self.milestone == 0 and path in whole:
                continue
            try:
                shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole and damage_of(path) is None:
            self._whole.add(path)
        return path in self._whole and damage_of(path, content=False) is None


def damage_of(path: Path, *, content: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, by its manifest; None where nothing is. `content`: hash the files too."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name}: expected {expected['bytes']} bytes, got {file.stat().st_size}"
            if content and sha256(file) != expected["sha256"]:
                return f"{name}: its content has changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} is unreadable: {error}"
    return None


def load_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint that `choose` found whole."""
    return json.loads((path / RUN_FACTS).read_text())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that a run needs beside the weights, of a checkpoint that `choose` found whole."""
    from safetensors.torch import load_file

    return load_file(path / RUN_TENSORS)


def choose(checkpoints: Checkpoints, resume: str | None) -> Path | None:
    """The checkpoint that a run goes on from, found whole by its manifest; None to start.

    Args:
        checkpoints: those of the run's folder.
        resume: None starts, "auto" takes the newest whole one where there is any, a path that one.

    Raises:
        ValueError: a start in a folder with checkpoints, a path that is damaged or is older than the folder's newest:
            the run would write over what is there.
    """
    found = checkpoints.all()
    if resume is None:
        if found:
            raise ValueError(
                f"{checkpoints.folder}: expected no checkpoints, got {found[-1].name}; "
                "go on with trainer.resume=auto, or choose another run_dir"
            )
        return None
    if resume == "auto":
        return checkpoints.newest()
    path, newest = Path(resume), checkpoints.newest() if found else None
    if newest is not None and path.resolve() == newest.resolve():
        return path
    damage = damage_of(path)
    if damage is not None:
        raise ValueError(f"trainer.resume: expected a checkpoint folder, got {path}: {damage}")
    if newest is not None:
        raise ValueError(
            f"trainer.resume: expected the newest of {checkpoints.folder}, got {path}; "
            "choose another run_dir to go on from there"
        )
    return path


def require_same(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raises ValueError where two nested dicts of facts differ, naming each key that does.

    A key that one lacks is None: an option that came after a checkpoint was made changes nothing where it is not used.
    """
    old, new = _flat(then), _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        facts = "; ".join(f"{key}: expected {old.get(key)}, got {new.get(key)}" for key in changed)
        raise ValueError(f"{path} was made with another model or tokenizer: {facts}")


def _write(folder: Path, write_model: Callable[[str], None], tensors: dict[str, Tensor], facts: dict) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        write_model(str(folder))
        save_file(tensors, folder / RUN_TENSORS)
    except SafetensorError as error:  # an input or output error in other clothes
        raise OSError(str(error)) from error
    seal(folder, facts, {})


def seal(folder: Path, facts: dict, known: dict[str, str]) -> None:
    """Facts and manifest of a folder that has everything else, and all of it on the disk. Raises OSError.

    `known`: checksums that are not to be taken again, by name.
    """
    (folder / RUN_FACTS).write_text(json.dumps(facts))
    manifest = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _to_disk(file)
        name = file.relative_to(folder).as_posix()
        manifest[name] = {"bytes": file.stat().st_size, "sha256": known.get(name) or sha256(file)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _to_disk(folder / MANIFEST)
    _to_disk(folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Of its content, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
