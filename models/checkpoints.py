"""Folders of safetensors: what is in one, from its headers alone, and how one is written without holding it in memory.

A folder holds config.json and either model.safetensors or several shards with model.safetensors.index.json.
"""

import json
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from seqzoo.models.pickle_file import PickleFile
from seqzoo.models.tensor_file import DTYPES, WRITTEN, Head, TensorFile

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
RUN_FILES = MANIFEST, RUN_TENSORS, RUN_FACTS = "manifest.json", "training.safetensors", "training.json"  # a run's own
_SYNCED = _HELD = 64 * 2**20  # [bytes] written between two syncs, and of a tensor that the next has to wait for
TEMPLATES = "additional_chat_templates"  # a tokenizer's folder of .jinja files
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Folder:
    """A checkpoint folder that is only looked at: `heads` by name, `read(name)` for one tensor, memory-mapped.

    `files`: only these; None is those that are the checkpoint. `pickle`: where there are no safetensors, pickle files
    are read, and nothing in them is run.

    Raises:
        ValueError: no such folder, no safetensors in it, a shard that is missing, truncated or no safetensors, or an
            index that says other than the shards.
    """

    def __init__(self, path: str | Path, files: list[str] | None = None, *, pickle: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder")
        self._pickle = pickle and not any((self.path / file).is_file() for file in (SINGLE, INDEX))
        single, index = (PICKLE_SINGLE, PICKLE_INDEX) if self._pickle else (SINGLE, INDEX)
        self.index = self._read_index(single, index) if files is None else None
        if files is None:
            files = [single] if self.index is None else sorted(set(self.index["weight_map"].values()))
        opener = PickleFile if self._pickle else TensorFile
        self._open = {file: opener(self.path / file) for file in files}
        self.metadata = {file: opened.metadata for file, opened in self._open.items()}
        self.heads: dict[str, Head] = {}
        for opened in self._open.values():
            for name, head in opened.heads.items():
                self._add(name, head)
        if self.index is not None:
            self._check_index()

    def read(self, name: str) -> Tensor:
        """Not to be written to: it is the file."""
        return self._open[self.heads[name].file].read(name)

    def release(self) -> None:
        """Let go of the memory that was mapped in by reading; tensors still in use are mapped in again when touched."""
        for opened in self._open.values():
            opened.release()

    @property
    def digests(self) -> dict[str, str]:
        """Of every file's header."""
        return {file: opened.digest for file, opened in self._open.items()}

    @property
    def files(self) -> list[str]:
        return list(self._open)

    def _read_index(self, single_name: str, index_name: str) -> dict[str, Any] | None:
        single, index, suffix = self.path / single_name, self.path / index_name, Path(single_name).suffix
        if single.is_file() and index.is_file():
            raise ValueError(f"{self.path}: expected one of {single_name} and {index_name}, got both")
        if single.is_file():
            return None
        if not index.is_file():
            pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLES)
            if pickles and not self._pickle:
                raise ValueError(
                    f"{self.path}: expected safetensors, got pickle files, which are not read unless asked "
                    f"(--pickle): {pickles}"
                )
            raise ValueError(f"{self.path}: expected {single_name} or {index_name}, got neither")
        content = read_json(index)
        places = content.get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
            raise ValueError(f"{index}: expected weight_map to be names to file names, got {str(places)[:80]}")
        for file in sorted(set(places.values())):
            if Path(file).name != file or not file.endswith(suffix):
                raise ValueError(f"{index}: expected names of {suffix} files beside it, got {file!r}")
            if not (self.path / file).is_file():
                raise ValueError(f"{index}: shard {file} is missing from the folder")
        return content

    def _add(self, name: str, head: Head) -> None:
        if name in self.heads:
            raise ValueError(f"{self.path}: tensor {name} is in two shards, {self.heads[name].file} and {head.file}")
        self.heads[name] = head

    def _check_index(self) -> None:
        places = self.index["weight_map"]
        absent = [name for name, file in places.items() if name not in self.heads or self.heads[name].file != file]
        unlisted = [name for name in self.heads if name not in places]
        if absent or unlisted:
            index = self.path / (PICKLE_INDEX if self._pickle else INDEX)
            raise ValueError(
                f"{index}: names tensors its shards do not hold: {some(absent)}; "
                f"shards hold tensors it does not name: {some(unlisted)}"
            )


def check_heads(where: str | Path, heads: Mapping[str, Head], expected: Mapping[str, Iterable[int]], kept: str) -> None:
    """That a folder holds what a model needs. `expected`: name to shape; `kept`: regex of others that may be there.

    Raises:
        ValueError: tensors missing, not expected, of another shape, or of a dtype that is no plain float.
    """
    missing = [name for name in expected if name not in heads]
    extra = [name for name in heads if name not in expected and not re.fullmatch(kept, name)]
    refuse(where, missing, extra)
    for name, shape in expected.items():
        if heads[name].shape != tuple(shape):
            raise ValueError(f"{where}: {name}: expected shape {list(shape)}, got {list(heads[name].shape)}")
    for name, head in heads.items():
        if head.dtype not in DTYPES:
            raise ValueError(f"{where}: {name}: expected dtype {', '.join(DTYPES)}, got {head.dtype}")


def check_readable(where: str | Path | None, subfolder: str | None) -> None:
    """Where it is a folder here and not a name on a hub: that its files are whole, and int8 what has scales.

    Raises:
        ValueError: as `Folder`; floats beside scales, of which transformers would cut the fractions off in silence.
    """
    if where is not None and Path(where).is_dir():
        heads = Folder(Path(where, subfolder or "")).heads
        for name in heads:
            weight = name.removesuffix("scales") + "weight"
            if name.endswith(".scales") and weight in heads and heads[weight].dtype != "I8":
                raise ValueError(f"{where}: {weight}: expected dtype I8 beside scales, got {heads[weight].dtype}")


def check_links(folder: Path) -> None:
    """That a folder's links stay in it, or lead to where the hub's cache keeps the files of the same model.

    Raises:
        ValueError: one leads elsewhere; a folder that was unpacked could so make another file of this machine its own.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in homes):
            raise ValueError(f"{path}: expected a file, or a link within {folder}, got one to {path.resolve()}")


def check_loaded(where: str, info: Mapping[str, Any], *, shapes: bool) -> None:
    """That transformers filled a model from a folder completely; it only warns. `shapes`: whether they must fit too.

    Raises:
        ValueError: tensors missing, not expected or of another shape.
    """
    refuse(where, info["missing_keys"], info["unexpected_keys"])
    for name, got, expected in sorted(info["mismatched_keys"]) if shapes else ():
        raise ValueError(f"{where}: {name}: expected shape {list(expected)}, got {list(got)}")


def refuse(where: str | Path, missing: Iterable[str], extra: Iterable[str]) -> None:
    """Raises ValueError where either is not empty."""
    said = [f"{what}: {some(names)}" for what, names in (("missing", missing), ("not expected", extra)) if names]
    if said:
        raise ValueError(f"{where}: tensors {'; '.join(said)}")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError: no such file, or not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_tensors(
    path: Path, heads: Mapping[str, Head], chunks: Callable[[str], Iterable[Tensor]], metadata: Mapping[str, str]
) -> None:
    """One safetensors file of these tensors, each asked for when its turn has come; on the disk when this returns.

    The wide dtypes come first, so that every tensor is aligned to its own size, in the order that safetensors' own
    writer has; otherwise the order is that of `heads`. `chunks(name)`: a tensor in pieces that lie one after the other.
    """
    names = sorted(heads, key=lambda name: list(WRITTEN).index(heads[name].dtype))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + heads[name].bytes
        header[name] = {
            "dtype": heads[name].dtype, "shape": list(heads[name].shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        with _Behind(file) as behind:
            for name in names:
                written = sum(behind.write(_bytes(x, heads[name])) for x in chunks(name))
                assert written == heads[name].bytes, name
                if written > _HELD:  # let go before the next is made
                    behind.catch_up()


class _Behind:
    """A file that is written while what comes next is being made, and brought to the disk while more is written; it is
    there in full when this ends. Otherwise the disk would rest while a file is made, and all else while it is synced.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._new = file, 0
        self._writer, self._disk = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._writes: deque[Future] = deque()
        self._sync: Future | None = None

    def __enter__(self) -> "_Behind":
        return self

    def write(self, data: memoryview) -> int:
        """Soon; data must stay as it is. Raises what writing raised, of this or of what came before."""
        self._writes.append(self._writer.submit(self._write, data))
        self.catch_up(most=2)
        return len(data)

    def catch_up(self, most: int = 0) -> None:
        """Wait until at most so many writes are left."""
        while len(self._writes) > most:
            self._writes.popleft().result()

    def _write(self, data: memoryview) -> None:
        self._file.write(data)
        self._new += len(data)
        if self._new >= _SYNCED and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()  # or its error would be lost
            self._sync, self._new = self._disk.submit(os.fsync, self._file.fileno()), 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.shutdown()
        self._disk.shutdown()
        if kind is None:
            self.catch_up()
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._sync is not None:
                self._sync.result()


def _bytes(x: Tensor, head: Head) -> memoryview:
    assert x.dtype == WRITTEN[head.dtype]
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().data


def place(heads: Mapping[str, Head], max_shard_size: int) -> dict[str, Head]:
    """The same, with file names: in order, a new shard begins where one would exceed `max_shard_size` [bytes]."""
    shard, filled, numbers = 1, 0, {}
    for name, head in heads.items():
        if filled and filled + head.bytes > max_shard_size:
            shard, filled = shard + 1, 0
        numbers[name], filled = shard, filled + head.bytes
    file = "model-{:05d}-of-{:05d}.safetensors".format if shard > 1 else lambda number, of: SINGLE
    return {name: head._replace(file=file(numbers[name], shard)) for name, head in heads.items()}


def write_index(folder: Path, heads: Mapping[str, Head], metadata: Mapping[str, Any]) -> None:
    content = {"metadata": dict(metadata), "weight_map": {name: head.file for name, head in heads.items()}}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def some(names: Iterable[str], most: int = 8) -> str:
    """As many names as a message should hold."""
    names = sorted(names)
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more]) or "none"
