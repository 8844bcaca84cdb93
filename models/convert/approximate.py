"""A Transformer into another layout: what it learned is used again where the new mixers have a place for it.

The source is seen as one of ours (exactly, whatever its architecture); rows then lead from its tensors to those of the
new model, so that a folder is converted tensor after tensor here too. What no row gives is fresh: drawn from a seed as
the part draws it for a new model, or as its adopter says. Idea and first recipe: SpikingBrain, arXiv 2509.05276.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.layers.norm import NORMS
from seqzoo.layers.registry import Spec, build, complete
from seqzoo.models import checkpoints
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.checkpoints import Head
from seqzoo.models.config import SeqZooConfig
from seqzoo.models.convert.adopt import adopter, one_way
from seqzoo.models.convert.folders import Plan, Reader, files_beside, index_of, metadata_of, open_as_ours, shapes_of
from seqzoo.models.convert.layouts import KEEP, Layout
from seqzoo.models.convert.origin import LAYOUT as RECORD
from seqzoo.models.convert.plain import Table
from seqzoo.models.convert.report import Fate, Report
from seqzoo.models.convert.rules import COPY, Row, Step, period
from seqzoo.models.upcycle import SCALES, gain


class Transfer(NamedTuple):
    """From one config of ours to another."""

    config: SeqZooConfig
    rows: list[Row]  # theirs: the source's names, ours: the new model's
    converted: list[int]  # layers whose mixer is another
    grown: list[int]  # layers whose gated MLP became experts
    chosen: Layout


def transfer(
    source: SeqZooConfig, chosen: Layout, *, keep: int | Collection[int] = (), scale: str = "each"
) -> Transfer:
    """What a layout makes of a source.

    Args:
        source: of blocks of a mixer and a channel, no block of its own kind.
        chosen: the layout; its pattern is repeated over the source's layers, and cut at their end. Where it grows
            experts and the source has some, the source's own stay, as many as they are.
        keep: layers that keep their mixer, whatever the pattern says; a number n is every n-th of them.
        scale: of experts that are copies of a gated MLP, as `models/upcycle.py` has it.

    Raises:
        ValueError: a source that is tied, quantised or of blocks; a mixer that is no attention; layers that are not
            there; or what an adopter refuses.
    """
    depth = source.num_hidden_layers
    cannot = dict(tied=source.tied, quantisation=source.quantisation, blocks=source.blocks, mtp=source.mtp)
    for what, found in cannot.items():
        if found:
            raise ValueError(f"layout: expected a source without {what}, got {found!r}")
    if not depth:
        raise ValueError("layout: expected a source with layers, got none")
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"keep: expected every n-th layer, n at least 1, or a list of layers, got {keep}")
        keep = range(keep - 1, depth, keep)
    if not set(keep) <= set(range(depth)):
        raise ValueError(f"keep: expected layers of 0 to {depth - 1}, got {sorted(keep)}")
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {list(SCALES)}, got {scale!r}")
    made: dict[str, dict[str, Spec]] = {"mixers": {}, "channels": {}}
    entries, rows, converted, grown = [], [], [], []
    for i in range(depth):
        old_mixer, _, old_channel = source.pattern[i % len(source.pattern)].partition("/")
        new_mixer, new_channel = chosen.pattern[i % len(chosen.pattern)]
        new_mixer = KEEP if i in keep else new_mixer
        attention, mlp = source.mixers[old_mixer], source.channels[old_channel]
        mixer = attention if new_mixer == KEEP else _mixer(i, attention, chosen.mixers[new_mixer])
        if new_channel != KEEP and chosen.channels[new_channel]["kind"] == mlp["kind"] == "moe":
            new_channel = KEEP  # there are experts already
        channel = mlp if new_channel == KEEP else _channel(i, mlp, chosen.channels[new_channel])
        names = (
            _named(made["mixers"], old_mixer if new_mixer == KEEP else new_mixer, mixer),
            _named(made["channels"], old_channel if new_channel == KEEP else new_channel, channel),
        )
        entries.append("/".join(names))
        block: Table = [(f"{x}_norm.weight", f"{x}_norm.weight", COPY) for x in _norms(source)]
        block += _under("mixer.", _kept("mixers", source, mixer) if new_mixer == KEEP
                        else adopter(mixer["kind"]).rows(attention, mixer))  # fmt: skip
        block += _under("channel.", _kept("channels", source, channel) if new_channel == KEEP
                        else _experts(source, channel, scale))  # fmt: skip
        prefix = f"stack.blocks.{i}."
        for those, these, how in block:
            those = (those,) if isinstance(those, str) else those
            these = (these,) if isinstance(these, str) else these
            rows.append(Row(tuple(prefix + x for x in those), tuple(prefix + x for x in these), how))
        if mixer != attention:
            converted.append(i)
        if new_channel != KEEP:
            grown.append(i)
    sinks = source.num_sink_tokens if chosen.num_sink_tokens is None else chosen.num_sink_tokens
    fields = {name: value for name, value in source.to_dict().items() if name not in ("model_type", "_name_or_path")}
    config = SeqZooConfig(**fields | dict(pattern=period(entries), **made, num_sink_tokens=sinks))
    outside = [name for name in shapes_of(source) if not name.startswith("stack.blocks.")]
    kept = [name for name in outside if name != "sink_tokens" or sinks == source.num_sink_tokens]
    return Transfer(config, [*(Row((x,), (x,), COPY) for x in kept), *rows], converted, grown, chosen)


def plan(
    src: Path, kind: str, chosen: Layout, *, keep: int | Collection[int], scale: str, seed: int, max_shard_size: int,
    pickle: bool,
) -> Plan:  # fmt: skip
    """A folder's conversion. Arguments and errors: `convert`, `transfer`."""
    opened = open_as_ours(src, kind, pickle=pickle)
    moved = transfer(opened.config, chosen, keep=keep, scale=scale)
    steps = [Step(row, to_ours=True, heads=opened.heads, recorded={}) for row in moved.rows]
    given = {name: head for step in steps for name, head in step.heads.items()}
    code = opened.heads["embed_tokens.weight"].dtype
    heads = {name: given.get(name) or Head(shape, code, "") for name, shape in shapes_of(moved.config).items()}
    wrong = [f"{x}: {list(heads[x].shape)}" for x, shape in shapes_of(moved.config).items() if heads[x].shape != shape]
    if wrong or not set(given) <= set(heads):
        raise ValueError(f"layout: tensors that fit no place: {wrong or sorted(set(given) - set(heads))}")
    new = Fresh(moved.config, seed)
    dtype = checkpoints.DTYPES[code]
    read = Reader(steps, Reader(opened.steps, opened.source.read), lambda name: new(name).to(dtype))
    placed = checkpoints.place(heads, max_shard_size)
    texts = {"config.json": moved.config.to_json_string(), RECORD: record(moved, kind, seed)}
    fates = _fates(opened.steps, opened.source.heads, steps, {n: h for n, h in placed.items() if n not in given})
    fates += [Fate("dropped", {name: head}, {}) for name, head in opened.kept.items()]
    report = Report(kind, f"seqzoo, {chosen.name}", fates, *files_beside(opened.source))
    return Plan(placed, read, metadata_of(placed), index_of(placed, placed), texts, opened.source, report)


def to_layout(
    model: SeqZooForCausalLM, chosen: Layout, *, keep: int | Collection[int] = (), scale: str = "each", seed: int = 0
) -> SeqZooForCausalLM:
    """The same in memory. Tensors that are only copied are shared with the model.

    Raises:
        ValueError: as `transfer`.
    """
    moved, have = transfer(model.config, chosen, keep=keep, scale=scale), dict(model.state_dict())
    with torch.device("meta"):
        new = SeqZooForCausalLM(moved.config)
    values = {name: x for row in moved.rows for name, x in zip(row.ours, row.how.there(*(have[n] for n in row.theirs)),
                                                               strict=True)}  # fmt: skip
    fresh, like = Fresh(moved.config, seed), model.get_input_embeddings().weight
    tied = set(new._tied_weights_keys) if moved.config.tie_word_embeddings else set()
    values |= {name: fresh(name).to(like) for name in new.state_dict() if name not in values and name not in tied}
    new.load_state_dict({name: x.detach() for name, x in values.items()}, assign=True, strict=False)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.train(model.training)


class Fresh:
    """The values of tensors that come from no source: the same for one seed, whichever are asked for, in any order."""

    def __init__(self, config: SeqZooConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        with torch.device("meta"):
            self._model = SeqZooForCausalLM(config)
        self._made: tuple[str, nn.Module, dict[str, Tensor]] | None = None  # of the mixer last asked for

    def __call__(self, name: str) -> Tensor:
        """fp32."""
        head, _, own = name.partition(".mixer.")
        if own:
            return self._mixer(head, own)
        owner, _, last = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if last in module._buffers:  # what is counted, not learned
            return torch.zeros(module._buffers[last].shape)
        with self._drawing(name):
            alone = deepcopy(module).to_empty(device="cpu", recurse=False)
            self._model._init_weights(alone)
        return getattr(alone, last).detach()

    def _mixer(self, head: str, own: str) -> Tensor:
        if self._made is None or self._made[0] != head:
            entry = self.config.pattern[int(head.rpartition(".")[2]) % len(self.config.pattern)]
            spec = self.config.mixers[entry.partition("/")[0]]
            with self._drawing(head):
                mixer = build("mixers", spec, self.config.hidden_size)
                mixer.apply(self._model._init_weights)
            self._made = head, mixer, getattr(adopter(spec["kind"]), "fresh", lambda _: {})(spec)
        _, mixer, special = self._made
        return special[own] if own in special else mixer.state_dict()[own]

    @contextmanager
    def _drawing(self, name: str) -> Iterator[None]:
        """Random numbers of the seed and the name, and the old ones afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "big"))
            yield


def record(moved: Transfer, kind: str, seed: int) -> str:
    """What RECORD says."""
    layers = range(moved.config.num_hidden_layers)
    return json.dumps(
        dict(
            source=kind, layout=moved.chosen.name, seed=seed, converted=moved.converted, grown=moved.grown,
            kept=[i for i in layers if i not in moved.converted],
        )
    )  # fmt: skip


def _mixer(i: int, attention: Spec, wanted: Spec) -> Spec:
    if attention["kind"] != "attention":
        raise ValueError(f"layer {i}: expected attention to be converted, or {KEEP!r}, got {attention['kind']!r}")
    return complete("mixers", adopter(wanted["kind"]).complete(attention, wanted))


def _channel(i: int, mlp: Spec, wanted: Spec) -> Spec:
    if mlp["kind"] != "swiglu" or mlp["bias"] or wanted["kind"] != "moe":
        bias = " with biases" if mlp.get("bias") else ""
        raise ValueError(
            f"layer {i}: expected a gated MLP to become a moe, got {mlp['kind']!r}{bias} to {wanted['kind']!r}"
        )
    clash = sorted({"expert_width"} & set(wanted))
    shared = wanted.get("shared_width", mlp["width"])
    if clash or shared not in (0, mlp["width"]):
        raise ValueError(f"layer {i}: moe: expected experts of the MLP's width {mlp['width']}, and a shared one or 0")
    return complete("channels", {**wanted, "expert_width": mlp["width"], "shared_width": shared})


def _experts(source: SeqZooConfig, spec: Spec, scale: str) -> Table:
    """Every expert is a copy of the gated MLP, scaled so that together they do what it did."""
    with torch.device("meta"):
        c = gain(build("channels", spec, source.hidden_size))
    inner, last = SCALES[scale](c)
    E = spec["num_experts"]
    each = lambda x, by: (by * x).expand(E, *x.shape)
    table: Table = [
        (("gate_proj.weight", "up_proj.weight"), "gate_up_proj",
         one_way("upcycled", lambda gate, up: (each(torch.cat([gate, up]), inner),))),
        ("down_proj.weight", "down_proj", one_way("upcycled", lambda x: (each(x, last),))),
    ]  # fmt: skip
    if spec["shared_width"]:
        for x, by in (("gate", inner), ("up", inner), ("down", last)):
            table.append(
                (f"{x}_proj.weight", f"shared.{x}_proj.weight", one_way("upcycled", lambda x, by=by: (by * x,)))
            )
        if spec["shared_gate"]:
            table.append(("gate_proj.weight", "shared_gate.weight", one_way("zero", lambda x: (0 * x[:1],))))
    return table


def _kept(family: str, source: SeqZooConfig, spec: Spec) -> Table:
    with torch.device("meta"):
        names = build(family, spec, source.hidden_size).state_dict()
    return [(name, name, COPY) for name in names]


def _under(prefix: str, table: Table) -> Table:
    put = lambda x: prefix + x if isinstance(x, str) else tuple(prefix + name for name in x)
    return [(put(those), put(these), how) for those, these, how in table]


def _norms(source: SeqZooConfig) -> list[str]:
    """The norms in front of a block's parts, where they have weights."""
    with torch.device("meta"):
        norm = NORMS[source.norm](source.hidden_size, source.norm_eps)
    return ["mixer", "channel"] if list(norm.parameters()) else []


def _named(specs: dict[str, Spec], name: str, spec: Spec) -> str:
    """The name under which the spec is in the table, where it is put if it was not; others of the name are counted."""
    names = [name, *(f"{name}_{n}" for n in range(2, len(specs) + 3))]
    found = next(x for x in names if specs.get(x, spec) == spec)
    specs[found] = spec
    return found


def _fates(
    first: list[Step], theirs: Mapping[str, Head], second: list[Step], fresh: Mapping[str, Head]
) -> list[Fate]:  # fmt: skip
    """Through both conversions: what was only copied on the way to ours has the second step's fate."""
    before = {name: step for step in first for name in step.targets}
    fates = []
    for step in second:
        steps = list({id(before[name]): before[name] for name in step.sources}.values())
        sources = {name: theirs[name] for each in steps for name in each.sources}
        whats = [each.fate for each in steps if each.fate != COPY.fate] + [step.fate] * (step.fate != COPY.fate)
        fates.append(Fate(whats[-1] if whats else COPY.fate, sources, step.heads))
    used = {name for step in second for name in step.sources}
    fates += [
        Fate("dropped", {n: theirs[n] for n in step.sources}, {}) for step in first if not used & set(step.targets)
    ]
    return fates + [Fate("fresh", {}, {name: head}) for name, head in fresh.items()]
