"""Target layouts of approximate conversions: what takes the place of a Transformer's attention, layer by layer.

A layout is a YAML file here, one of yours, or a mapping:
    mixers              name -> {kind: file in layers/mixers, **its options}; sizes come from the source's attention
    channels            name -> {kind: moe, **its options}, grown from the source's gated MLPs; perhaps none
    pattern             one period, bottom first: "mixer" or "mixer/channel"; `keep` in either place is the source's own
    num_sink_tokens     of the new model; the source's where it is left out
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from seqzoo.layers.registry import Spec

KEEP = "keep"
_FOLDER = Path(__file__).parent


class Layout(NamedTuple):
    name: str
    mixers: dict[str, Spec]
    channels: dict[str, Spec]
    pattern: list[tuple[str, str]]  # mixer and channel
    num_sink_tokens: int | None


def layouts() -> list[str]:
    """The names there are."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def layout(what: str | Path | Mapping[str, Any]) -> Layout:
    """A layout by its name, from a YAML file, or from a mapping.

    Raises:
        ValueError: no such name or file, or words that a layout does not have.
    """
    if isinstance(what, Mapping):
        return _checked("layout", what)
    path = _FOLDER / f"{what}.yaml" if what in layouts() else Path(what)
    if path.suffix != ".yaml" or not path.is_file():
        raise ValueError(f"layout: expected one of {layouts()} or a YAML file, got {str(what)!r}")
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return _checked(path.stem, content)


def _checked(name: str, content: Any) -> Layout:
    known = {"mixers", "channels", "pattern", "num_sink_tokens"}
    if not isinstance(content, Mapping) or not {"pattern"} <= set(content) <= known:
        got = sorted(content) if isinstance(content, Mapping) else content
        raise ValueError(f"{name}: expected pattern and others of {sorted(known)}, got {got}")
    parts = {family: content.get(family) or {} for family in ("mixers", "channels")}
    for family, specs in parts.items():
        if not isinstance(specs, Mapping) or not all(isinstance(x, Mapping) and "kind" in x for x in specs.values()):
            raise ValueError(f"{name}: {family}: expected name -> {{kind: ..., **options}}, got {specs!r}")
        if KEEP in specs:
            raise ValueError(f"{name}: {family}: expected other names than {KEEP!r}, which is the source's own")
    pattern, sinks = content["pattern"], content.get("num_sink_tokens")
    if not isinstance(pattern, list) or not pattern or not all(isinstance(x, str) for x in pattern):
        raise ValueError(f"{name}: pattern: expected a list of names, got {pattern!r}")
    entries = [(mixer, channel or KEEP) for mixer, _, channel in (x.partition("/") for x in pattern)]
    for entry in entries:
        for part, (family, specs) in zip(entry, parts.items(), strict=True):
            if part not in (KEEP, *specs):
                raise ValueError(
                    f"{name}: pattern: expected {KEEP!r} or one of {sorted(specs)} ({family}), got {part!r}"
                )
    if sinks is not None and (not isinstance(sinks, int) or isinstance(sinks, bool) or sinks < 0):
        raise ValueError(f"{name}: num_sink_tokens: expected 0 or more, got {sinks!r}")
    mixers, channels = ({x: dict(spec) for x, spec in specs.items()} for specs in parts.values())
    return Layout(name, mixers, channels, entries, sinks)
