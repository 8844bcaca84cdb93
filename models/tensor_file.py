"""One safetensors file, read as what a stranger wrote: its header is checked in full, its tensors are memory-mapped.

A file is a length (8 bytes, little end first), a header of that length in JSON and the tensors' bytes, one tensor after
the other. Source: the format's description in safetensors 0.4's README.
"""

import hashlib
import json
import math
import mmap
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WRITTEN = DTYPES | {"I8": torch.int8}  # what files of ours may hold, the widest first
CODES = {dtype: code for code, dtype in DTYPES.items()}
_OTHERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}  # fmt: skip
_AHEAD = 512 * 2**20  # [bytes] that the disk is asked for at a read, from the tensor on
_LONGEST = 100_000_000  # [bytes] of a header; safetensors' own reader has the same bound


class Head(NamedTuple):
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # in safetensors' words, as BF16
    file: str

    @property
    def bytes(self) -> int:
        return (DTYPES | _OTHERS)[self.dtype].itemsize * math.prod(self.shape)


class TensorFile:
    """`heads` by name, in the order in which the tensors lie; `read(name)`; `metadata`, what else the header says.

    Raises:
        ValueError: truncated, or no safetensors file: a header that is too long, no JSON, names one thing twice, or
            places tensors over each other, apart from each other or outside the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                self.start, header = self._header(file, size)
            self.digest = hashlib.sha256(header).hexdigest()
            content = json.loads(header, object_pairs_hook=_once)
            self.metadata = _metadata(content.pop("__metadata__", {}))
            self._offsets = {name: _entry(name, entry) for name, entry in content.items()}
            self._check_places(size - self.start)
        except OSError as error:
            raise ValueError(f"{path}: not readable: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: truncated or no safetensors file: {error}") from None
        self.heads = {name: Head(tuple(content[name]["shape"]), content[name]["dtype"], path.name) for name in content}
        self.heads = {name: self.heads[name] for name in sorted(self.heads, key=self._offsets.__getitem__)}
        self._map: mmap.mmap | None = None
        self._asked = 0  # up to here the disk has been asked for

    def read(self, name: str) -> Tensor:
        """Memory-mapped, not to be written to. Raises ValueError: a dtype that is not known here.

        The disk is asked for it and for what follows, for those who read on: a touch of mapped memory waits for it.
        """
        head, start = self.heads[name], self.start + self._offsets[name][0]
        dtype = (DTYPES | _OTHERS).get(head.dtype)
        if dtype is None:
            raise ValueError(f"{self.path}: {name}: expected dtype {', '.join(DTYPES | _OTHERS)}, got {head.dtype}")
        count = math.prod(head.shape)
        if count == 0:
            return torch.empty(head.shape, dtype=dtype)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ask(start)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
        if start % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(head.shape)

    def release(self) -> None:
        """Let go of the memory that was mapped in by reading; tensors still in use are mapped in again when touched."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _ask(self, start: int) -> None:
        """Have the disk read from there on, without waiting; what it was asked for before it is not asked for again."""
        first = max(start, self._asked) // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(start + _AHEAD, len(self._map))
        if first < last:
            self._map.madvise(mmap.MADV_WILLNEED, first, last - first)
            self._asked = last

    @staticmethod
    def _header(file: Any, size: int) -> tuple[int, bytes]:
        """Where the tensors' bytes begin, and the header."""
        if size < 8:
            raise ValueError(f"expected 8 bytes or more, got {size}")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _LONGEST):
            raise ValueError(f"expected a header of at most {min(size - 8, _LONGEST)} bytes, got {length}")
        header = file.read(length)
        if header[:1] != b"{":
            raise ValueError("expected a header that begins with {")
        return 8 + length, header

    def _check_places(self, size: int) -> None:
        end = 0
        for name, (first, last) in sorted(self._offsets.items(), key=lambda item: item[1]):
            if first != end:
                raise ValueError(f"{name}: expected offset {end}, where the tensor before it ends, got {first}")
            end = last
        if end != size:
            raise ValueError(f"expected {end} bytes of tensors, got {size}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError: a key that is there twice, of which readers would take different ones."""
    content = dict(pairs)
    if len(content) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"expected every name once, got twice: {name[:80]!r}")
    return content


def _metadata(content: Any) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(x, str) for x in content.values()):
        raise ValueError(f"__metadata__: expected texts by name, got {str(content)[:80]}")
    return content


def _entry(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets, got {str(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: expected a dtype, a shape and two offsets, got {str(entry)[:80]}")
    known = (DTYPES | _OTHERS).get(dtype)
    if offsets[0] > offsets[1] or (known is not None and math.prod(shape) * known.itemsize != offsets[1] - offsets[0]):
        raise ValueError(f"{name}: {dtype} {shape} does not take the bytes from {offsets[0]} to {offsets[1]}")
    return offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
