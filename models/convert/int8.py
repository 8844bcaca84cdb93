"""A planned conversion into one of ours, its projections' weights rounded to int8 on the way (`models/quantise.py`)."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from seqzoo.layers.rounding import quantised
from seqzoo.models import checkpoints
from seqzoo.models.checkpoints import Head
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.calibration import Seen
from seqzoo.models.convert.folders import CHUNK, Plan, Reader, index_of, metadata_of, shapes_of
from seqzoo.models.convert.origin import EXTRA, RECORD
from seqzoo.models.convert.report import Fate
from seqzoo.models.quantise import quantisation_spec

_SCALES, _WEIGHT = ".scales", ".weight"
_AT_ONCE = 4 * CHUNK  # [bytes] of a tensor that is rounded whole; in between it takes four times as much, in fp32


class Rounded:
    """Like `Reader`.

    Args:
        read: of the floats.
        table: tensor -> the float one that it and its partner are rounded from.
        floats: these.
        moments: what is known of their inputs, by the float's name.
    """

    def __init__(
        self, read: Reader, table: Mapping[str, str], floats: Mapping[str, Head], group: int,
        moments: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self._read, self._table, self._floats, self._group, self._moments = read, table, floats, group, moments

    def __call__(self, name: str) -> Tensor:
        source = self._table.get(name)
        if source is None:
            return self._read(name)
        return self._rounded(name, self._read(source), self._moments.get(source))

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's numbers from first to last, at most CHUNK bytes at a time."""
        source = self._table.get(name)
        if source is None:
            yield from self._read.chunks(name)
            return
        head = self._floats[source]
        if head.bytes > _AT_ONCE:  # read once for the weights and once for the scales, or both would be held
            known = self._moments.get(source)
            for matrix, rows in _whole_rows(self._read.chunks(source), *head.shape[-2:]):
                seen = known if known is None or len(head.shape) == 2 else known[matrix]
                yield self._rounded(name, rows, seen).reshape(-1)
            return
        x = self(name)
        yield from x.contiguous().reshape(-1).split(CHUNK // x.element_size())

    def _rounded(self, name: str, x: Tensor, seen: Tensor | None) -> Tensor:
        """Scales, which come first in a file, or weights; the former are the same whatever was seen."""
        if name.endswith(_SCALES):
            return quantised(x, self._group)[1]
        return quantised(x, self._group, seen)[0]


def _whole_rows(chunks: Iterator[Tensor], height: int, width: int) -> Iterator[tuple[int, Tensor]]:
    """What comes as it lies, of one matrix or many: which it is of, and some of its rows [.., width]. Every row is
    rounded by itself."""
    left, done = None, 0
    for chunk in chunks:
        x = chunk if left is None else torch.cat([left, chunk])
        end = len(x) - len(x) % width
        left = x[end:]
        rows = x[:end].view(-1, width)
        while len(rows):
            some = rows[: height - done % height]
            yield done // height, some
            rows, done = rows[len(some) :], done + len(some)


def rounded(
    plan: Plan, options: Mapping[str, Any], max_shard_size: int, seen: Seen
) -> Plan:  # fmt: skip
    """The plan with W8ASpike in the place of its projections.

    What leads back to an origin is left out: rounding has no way back.

    Args:
        plan: of a model of ours in floats.
        options: of `models/quantise.py`'s Quantisation; those left out are its defaults.
        max_shard_size: [bytes] of one file.
        seen: what the projections of the model that the plan makes are given; where that is nothing, weights are
            rounded to the nearest.

    Raises:
        ValueError: options that are none, or a model that cannot be rounded so.
    """
    spec = quantisation_spec(dict(options))
    floats = {name: head for name, head in plan.heads.items() if head.file != EXTRA}
    config = _config(plan, spec)
    shapes, table = shapes_of(config), {}
    for name in shapes:
        if name.endswith(_SCALES):
            weight = name.removesuffix(_SCALES) + _WEIGHT
            table[name] = table[weight] = weight if weight in floats else _stack(weight)
    heads = {
        name: Head(shape, "I8" if name in table and name.endswith(_WEIGHT) else floats[table.get(name, name)].dtype, "")
        for name, shape in shapes.items()
    }
    moments = {table[f"{name}{_WEIGHT}"]: x for name, x in seen.moments.items()}
    placed, made = checkpoints.place(heads, max_shard_size), {}
    for name, source in table.items():
        made.setdefault(source, {})[name] = placed[name]
    what = f"rounded on {seen.text}" if seen.text else "rounded"
    fates = [_fate(fate, made, what) for fate in plan.report.fates if fate.what != "kept"]
    fates += [Fate("dropped", fate.sources, {}) for fate in plan.report.fates if fate.what == "kept"]
    texts = {name: text for name, text in plan.texts.items() if name != RECORD}
    return plan._replace(
        heads=placed, read=Rounded(plan.read, table, floats, spec["group"], moments), metadata=metadata_of(placed),
        index=index_of(placed, placed), texts=texts | {"config.json": config.to_json_string()},
        report=plan.report._replace(target=f"{plan.report.target}, int8", fates=fates),
    )  # fmt: skip


def _config(plan: Plan, spec: dict[str, Any]) -> SeqZooConfig:
    fields = json.loads(plan.texts["config.json"])
    return SeqZooConfig(**{name: x for name, x in fields.items() if name != "model_type"} | dict(quantisation=spec))


def _stack(weight: str) -> str:
    """The float matrices that a mixture holds itself, by the name of the int8 ones."""
    return weight.removesuffix(_WEIGHT).replace(".experts.", ".")


def _fate(fate: Fate, made: Mapping[str, dict[str, Head]], what: str) -> Fate:
    if not any(name in made for name in fate.targets):
        return fate
    targets: dict[str, Head] = {}
    for name, head in fate.targets.items():
        targets |= made.get(name, {name: head})
    return fate._replace(what=f"{fate.what}, {what}", targets=targets)
