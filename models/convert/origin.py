"""What a converted folder remembers of the one it came from, so that the way back loses nothing.

seqzoo_origin.json holds the architecture, the text of config.json and where every tensor stood;
seqzoo_extra.safetensors the tensors that ours has no room for.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from seqzoo.models.checkpoints import DTYPES, INDEX, Folder, Head, read_json, some

RECORD, EXTRA = "seqzoo_origin.json", "seqzoo_extra.safetensors"
LAYOUT = "seqzoo_layout.json"  # what an approximate conversion says of itself, and no other hands on


class Origin(NamedTuple):
    architecture: str
    config: str  # the text of config.json
    tensors: dict[str, list[str]]  # name -> file, dtype; in the order in which they stood
    metadata: dict[str, dict[str, str]]  # file -> what its header said beside the tensors
    index: str | dict[str, Any] | None  # its text; of pickles what it said beside the tensors; None: there was none

    @classmethod
    def of(cls, architecture: str, folder: Folder) -> "Origin":
        """Raises ValueError: config.json is no UTF-8."""
        try:
            config = (folder.path / "config.json").read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder.path / 'config.json'}: expected UTF-8: {error}") from None
        places = {name: [_as_safetensors(head.file), head.dtype] for name, head in folder.heads.items()}
        metadata = {_as_safetensors(file): said for file, said in folder.metadata.items()}
        index = folder.index and folder.index.get("metadata", {})
        if (folder.path / INDEX).is_file():
            text = (folder.path / INDEX).read_bytes().decode(errors="replace")
            with suppress(ValueError):  # in another code than UTF-8
                json.loads(text)
                index = text
        return cls(architecture, config, places, metadata, index)

    @classmethod
    def load(cls, folder: Path) -> "Origin | None":
        """None where the folder was made by training, not by conversion. Raises ValueError: an unreadable record."""
        path = folder / RECORD
        if not path.is_file():
            return None
        content = read_json(path)
        if set(content) != set(cls._fields):
            raise ValueError(f"{path}: expected {sorted(cls._fields)}, got {sorted(content)}")
        _check(path, **content)
        return cls(**content)

    def text(self) -> str:
        """What RECORD says."""
        return json.dumps(self._asdict())

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: dtype for name, (_, dtype) in self.tensors.items()}

    def place(self, folder: Path, heads: Mapping[str, Head]) -> dict[str, Head]:
        """The same in the order and the files they once stood in.

        Raises:
            ValueError: other tensors than there were, or an index of other files.
        """
        if set(heads) != set(self.tensors):
            missing, new = set(self.tensors) - set(heads), set(heads) - set(self.tensors)
            raise ValueError(
                f"{folder / RECORD}: tensors it names are gone: {some(missing)}; it does not name: {some(new)}"
            )
        files = {name: file for name, (file, _) in self.tensors.items()}
        if isinstance(self.index, str):
            try:
                said = json.loads(self.index)["weight_map"]
            except (ValueError, LookupError, TypeError):
                said = None
            if said != files:
                raise ValueError(f"{folder / RECORD}: index: expected the files that tensors has, got others")
        return {name: heads[name]._replace(file=file) for name, file in files.items()}


def _check(path: Path, architecture: Any, config: Any, tensors: Any, metadata: Any, index: Any) -> None:
    """Raises ValueError: what nobody wrote here; places of tensors become names of files."""
    texts = lambda content: isinstance(content, dict) and all(isinstance(x, str) for x in content.values())
    for name, fits in (
        ("architecture", isinstance(architecture, str)),
        ("config", isinstance(config, str)),
        ("tensors", isinstance(tensors, dict) and all(_is_place(place) for place in tensors.values())),
        ("metadata", isinstance(metadata, dict) and all(texts(said) for said in metadata.values())),
        ("index", index is None or isinstance(index, str | dict)),
    ):
        if not fits:
            raise ValueError(f"{path}: {name}: expected what a conversion writes, got something else")
    files = {file for file, _ in tensors.values()}
    outside = sorted(file for file in files if Path(file).name != file or not file.endswith(".safetensors"))
    if outside:
        raise ValueError(f"{path}: expected names of .safetensors files, got {outside}")


def _is_place(place: Any) -> bool:
    return isinstance(place, list) and len(place) == 2 and isinstance(place[0], str) and place[1] in list(DTYPES)


def _as_safetensors(file: str) -> str:
    """The name that it will have on the way back, which writes no pickles."""
    return file if file.endswith(".safetensors") else f"{Path(file).stem.removeprefix('pytorch_')}.safetensors"
