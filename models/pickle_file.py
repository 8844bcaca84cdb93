"""One pickle file of weights, for those who ask for it: torch's reader of weights only runs nothing that is in it."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from seqzoo.models.tensor_file import CODES, Head

_MAPPED = 2**29  # [bytes] read before the file is mapped anew, so that what was read leaves memory


class PickleFile:
    """As `TensorFile`.

    Raises:
        ValueError: anything but tensors by name, or a file from before torch 1.6, which cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {"format": "pt"}
        self._tensors: dict[str, Tensor] | None = None
        self._read = 0
        self.heads = {
            name: Head(tuple(x.shape), CODES.get(x.dtype, str(x.dtype)), path.name) for name, x in self._load().items()
        }
        self.digest = hashlib.sha256(repr(self.heads).encode()).hexdigest()

    def read(self, name: str) -> Tensor:
        """Memory-mapped, not to be written to."""
        x = self._load()[name]
        self._read += x.numel() * x.element_size()
        return x

    def release(self) -> None:
        """Let go of the memory that was mapped in by reading, once it is much."""
        if self._read > _MAPPED:
            self._tensors, self._read = None, 0

    def _load(self) -> dict[str, Tensor]:
        if self._tensors is None:
            try:
                tensors = torch.load(self.path, weights_only=True, mmap=True, map_location="cpu")
            except Exception as error:  # what reading bytes of a stranger may raise is no short list
                why = " ".join(str(error).split())[:160]
                raise ValueError(f"{self.path}: expected a pickle file of weights only, got: {why}") from None
            named = isinstance(tensors, dict) and all(
                isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided
                for name, x in tensors.items()
            )
            if not named:
                raise ValueError(f"{self.path}: expected tensors by name, got {type(tensors).__name__} of other things")
            self._tensors = {name: x.detach() for name, x in tensors.items()}
        return self._tensors
