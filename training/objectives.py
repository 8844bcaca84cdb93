"""What a run learns: the `objective=` choices.

An objective is called with (model, inputs, targets, stats) for each micro-batch and returns a `Result`. It may say
which parameters learn (`learns(name)`), and whether its loss is in nats per token (`in_nats`), so that bits mean
something.

A converted model is recovered by all three, one after the other (`configs/recover.yaml`): its new mixers are aligned
with the teacher's attention, then its predictions are distilled, then it is trained on. Alignment of mixers on the
teacher's own hidden states: the first stage of arXiv 2410.10254 (LoLCATs) and 2408.10189 (MOHAWK); distillation: Hinton
et al. 2015, arXiv 1503.02531.
"""

import hashlib
import logging
import math
import os
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqzoo.data.packing import IGNORED
from seqzoo.kernels.across import anywhere, joined, pooled, ranks
from seqzoo.models.calls import called_as, mixer_calls, sinks_seen
from seqzoo.models.causal_lm import SeqZooForCausalLM, Stats
from seqzoo.models.convert.calibration import changed_layers
from seqzoo.models.convert.loading import load
from seqzoo.training.sharded import local, whole
from seqzoo.training.split import splits_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
log = logging.getLogger(__name__)


class Result(NamedTuple):
    loss: Tensor  # [] what is learned from
    shown: Tensor  # [] what the log has of it, per token
    stats: Stats  # what the model's blocks counted; empty where they did not run
    beside: dict[str, Tensor] = {}  # [] each, per token: what else the log has, by name


class Objective(Protocol):
    name: str
    in_nats: bool
    teacher: SeqZooForCausalLM | None

    def learns(self, name: str) -> bool: ...

    def __call__(self, model: SeqZooForCausalLM, inputs: dict, targets: int, stats: Stats | None) -> Result: ...


class NextToken:
    """Cross-entropy of the next token, and what the blocks add to it."""

    name, in_nats, teacher = "next_token", True, None

    def learns(self, name: str) -> bool:
        return not name.startswith("mtp.")

    def __call__(self, model: SeqZooForCausalLM, inputs: dict, targets: int, stats: Stats | None) -> Result:
        out = model(**inputs, num_items_in_batch=targets, stats=stats, use_cache=False, return_logits=False)
        return Result(out.loss, out.loss - out.aux_loss, out.stats)


class MultiToken:
    """Cross-entropy of the next token, + weight times that of the token after it, and what the blocks add.

    What is shown is the next token's alone, and beside it `mtp_loss`, in nats over as many tokens.
    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.

    Args:
        model: with a module for it (`mtp` in its config).
        weight: of the token after the next, above 0.

    Raises:
        ValueError: a model without that module, or a weight out of range.
    """

    name, in_nats, teacher = "mtp", True, None

    def __init__(self, model: SeqZooForCausalLM, *, weight: float) -> None:
        if model.config.mtp is None:
            raise ValueError("objective: mtp: expected a model with mtp in its config, got one without")
        if not 0 < weight < math.inf:
            raise ValueError(f"objective.weight: expected a number above 0, got {weight!r}")
        self.weight = weight

    def learns(self, name: str) -> bool:
        return True

    def __call__(self, model: SeqZooForCausalLM, inputs: dict, targets: int, stats: Stats | None) -> Result:
        out = model(
            **inputs, num_items_in_batch=targets, stats=stats, use_cache=False, return_logits=False,
            mtp_weight=self.weight,
        )  # fmt: skip
        told = out.loss - out.aux_loss - self.weight * out.mtp_loss
        return Result(out.loss, told, out.stats, dict(mtp_loss=out.mtp_loss))


class Distil:
    """The teacher's predictions: (1 - weight) cross-entropy + weight temperature^2 KL(teacher || student).

    Args:
        model: the student, on its device.
        teacher: folder or hub id, of any architecture that is known.
        temperature: of both predictions in the divergence.
        weight: of the divergence, 0 to 1.
        top: the teacher's likeliest tokens that are looked at, their probabilities made to sum to 1; None is all.
        cache: folder of the teacher's predictions, one file for each batch that was asked for once; None keeps none. A
            damaged file is made again, and the log says so.
        precision: of the teacher's weights, fp32 or bf16.

    Raises:
        ValueError: a teacher of another vocabulary, or numbers out of range.
    """

    name, in_nats = "distil", True

    def __init__(
        self, model: SeqZooForCausalLM, *, teacher: str, temperature: float, weight: float, top: int | None,
        cache: str | None, precision: str,
    ) -> None:  # fmt: skip
        if not temperature > 0:
            raise ValueError(f"objective.temperature: expected a number above 0, got {temperature!r}")
        if not 0 <= weight <= 1:
            raise ValueError(f"objective.weight: expected 0 to 1, got {weight!r}")
        vocab = model.config.vocab_size
        if top is not None and not 1 <= top <= vocab:
            raise ValueError(f"objective.top: expected 1 to {vocab} tokens or null, got {top!r}")
        self.teacher = load_teacher(teacher, model, precision)
        self.temperature, self.weight, self.top = temperature, weight, top
        self.cache = None if cache is None else Path(cache)
        self._key: bytes | None = None  # all weights are read for it: not before it is wanted

    def learns(self, name: str) -> bool:
        return not name.startswith("mtp.")

    def __call__(self, model: SeqZooForCausalLM, inputs: dict, targets: int, stats: Stats | None) -> Result:
        tokens, wanted = self.predictions(inputs)
        out = model(**inputs, num_items_in_batch=targets, stats=stats, use_cache=False)
        logits = out.logits.float()
        near = logits if tokens is None else logits.gather(-1, tokens)
        wanted = (wanted / self.temperature).log_softmax(-1)
        # what is not looked at is no part of either prediction
        got = (near / self.temperature).log_softmax(-1)
        there = inputs["shift_labels"] != IGNORED
        divergence = (wanted.exp() * (wanted - got)).sum(-1)[there].sum() / targets
        told = out.loss - out.aux_loss
        loss = (1 - self.weight) * told + self.weight * self.temperature**2 * divergence + out.aux_loss
        return Result(loss, told, out.stats)

    @torch.no_grad()
    def predictions(self, inputs: dict) -> tuple[Tensor | None, Tensor]:
        """Tokens [R, T, top], or None for all, and the teacher's logits of them, fp32."""
        path = None if self.cache is None else self.cache / f"{self._name(inputs)}.safetensors"
        kept = None if path is None else _read(path)
        if anywhere(kept is None, inputs["input_ids"].device):  # its weights may be cut: all processes ask, or none
            given = {name: x for name, x in inputs.items() if name != "shift_labels"}
            logits = self.teacher(**given, use_cache=False).logits.float()
            kept = dict(logits=logits) if self.top is None else _likeliest(logits, self.top)
            if path is not None:
                _write(path, kept)
        device = inputs["input_ids"].device
        return kept["tokens"].to(device) if "tokens" in kept else None, kept["logits"].to(device)

    def _name(self, inputs: dict) -> str:
        if self._key is None:
            self._key = _identity(self.teacher, self.top).encode()
        digest = hashlib.sha256(self._key)
        if torch.is_autocast_enabled(inputs["input_ids"].device.type):  # which rounds what the teacher says
            digest.update(b"autocast")
        split = ranks()
        for name in ("input_ids", "position_ids"):  # of whole rows: what is said of a stretch depends on what is before
            x = inputs[name] if split is None else joined(inputs[name])
            digest.update(f"{list(x.shape)}".encode() + x.cpu().contiguous().numpy().tobytes())
        digest.update(b"" if split is None else f"stretch {split.rank} of {split.size}".encode())
        return digest.hexdigest()


class Align:
    """Every mixer that is not the teacher's gives what the teacher's gives, on the teacher's own hidden states.

    The loss is the mean over those layers of ||student - teacher||^2 / ||teacher||^2; only their mixers learn,
    and see the student's own sink tokens, as they do when it runs.

    Args:
        model: the student, on its device.
        teacher: folder or hub id, of any architecture that is known.
        precision: of the teacher's weights, fp32 or bf16.

    Raises:
        ValueError: a teacher of another depth, width or vocabulary, or one whose mixers are all the student's.
    """

    name, in_nats = "align", False

    def __init__(self, model: SeqZooForCausalLM, *, teacher: str, precision: str) -> None:
        self.teacher = load_teacher(teacher, model, precision)
        self.layers = changed_layers(self.teacher.config, model.config)
        if not self.layers:
            raise ValueError(
                f"objective.teacher: expected mixers that are not the student's, got {teacher} with the same"
            )

    def learns(self, name: str) -> bool:
        return any(name.startswith(f"stack.blocks.{i}.mixer.") for i in self.layers)

    def __call__(self, model: SeqZooForCausalLM, inputs: dict, targets: int, stats: Stats | None) -> Result:
        given = {name: x for name, x in inputs.items() if name != "shift_labels"}
        with torch.no_grad():
            calls = mixer_calls(self.teacher, **given)
        levels, own = model.stack.levels(), sinks_seen(model)

        def error(i: int) -> Tensor:
            (x, span), wanted = calls[i]
            mixer = levels[i].mixer
            dtype = next(mixer.parameters()).dtype  # the teacher's may be another
            sinks = None if own[i] is None else own[i].to(dtype)
            got = called_as(levels[i], lambda: mixer(x.to(dtype), span._replace(sinks=sinks))[0])
            return (got.float() - wanted.float()).square().sum()

        errors = called_as(model, lambda: torch.stack([error(i) for i in self.layers]))
        sizes = torch.stack([calls[i][1].float().square().sum() for i in self.layers])
        there = (inputs["shift_labels"] != IGNORED).sum().float()
        (whole,) = pooled([dict(sizes=sizes, there=there)])  # of all processes, where there are several
        loss = (errors / whole["sizes"]).mean() * whole["there"] / targets  # of several micro-batches, each its share
        return Result(loss, loss, [{} for _ in levels])


def next_token(model: SeqZooForCausalLM) -> Objective:
    return NextToken()


def mtp(model: SeqZooForCausalLM, **options) -> Objective:
    return MultiToken(model, **options)


def distil(model: SeqZooForCausalLM, **options) -> Objective:
    return Distil(model, **options)


def align(model: SeqZooForCausalLM, **options) -> Objective:
    return Align(model, **options)


def load_teacher(teacher: str, student: SeqZooForCausalLM, precision: str) -> SeqZooForCausalLM:
    """In eval mode, without gradients, where the student is.

    Raises:
        ValueError: a teacher that cannot be opened, of another vocabulary, or an unknown precision.
    """
    if precision not in DTYPES:
        raise ValueError(f"objective.precision: expected one of {[*DTYPES]}, got {precision!r}")
    how = dict(revision=None, pickle=False, allow_nonfinite=False)
    model = load(teacher, dtype=DTYPES[precision], device=next(student.parameters()).device, **how)
    if model.config.vocab_size != student.config.vocab_size:
        sizes = f"{student.config.vocab_size}, got {model.config.vocab_size}"
        raise ValueError(f"objective.teacher: expected the student's vocab_size, {sizes}")
    return model.requires_grad_(False)


def _likeliest(logits: Tensor, top: int) -> dict[str, Tensor]:
    values, tokens = logits.topk(top)
    return dict(logits=values, tokens=tokens)


def _identity(teacher: SeqZooForCausalLM, top: int | None) -> str:
    """Of what predicts: the weights, and what is kept of a prediction."""
    digest = hashlib.sha256(teacher.config.to_json_string().encode())
    splits = splits_of(teacher)
    for name, x in teacher.state_dict().items():
        x = whole(local(x), x, splits.get(name))
        digest.update(name.encode() + x.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{digest.hexdigest()} {top}"


def _read(path: Path) -> dict[str, Tensor] | None:
    """None where there is no such file, or a damaged one."""
    try:
        kept = load_file(path)
        if kept.pop("check").tolist() == _sum(kept):
            return kept
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError):
        pass
    log.warning("%s is damaged: the teacher is asked again", path)
    return None


def _write(path: Path, kept: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    kept = {name: x.cpu().contiguous() for name, x in kept.items()}
    save_file({**kept, "check": torch.tensor(_sum(kept))}, partial)
    os.replace(partial, path)


def _sum(kept: dict[str, Tensor]) -> list[int]:
    """The first bytes of a checksum."""
    digest = hashlib.sha256()
    for name in sorted(kept):
        digest.update(kept[name].cpu().contiguous().numpy().tobytes())
    return list(digest.digest()[:8])
