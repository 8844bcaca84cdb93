"""The loop: batches in, steps, and everything that must survive a crash."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from seqzoo.data.packing import Batch, TrainingBatches, ValidationRows
from seqzoo.data.source import Corpus
from seqzoo.data.tokenizer import Tokenizer
from seqzoo.models.causal_lm import SeqZooForCausalLM, Stats
from seqzoo.models.config import SeqZooConfig
from seqzoo.training.again import SELECTIVE, compute_again
from seqzoo.training.checkpoint import Checkpoints, load_facts, load_tensors, require_same
from seqzoo.training.closing import peak_bytes
from seqzoo.training.evaluate import bits, evaluate
from seqzoo.training.logbook import Logbook
from seqzoo.training.objectives import Objective
from seqzoo.training.parallel import Ranks
from seqzoo.training.profile import profiled
from seqzoo.training.progress import Progress
from seqzoo.training.schedules import Schedule
from seqzoo.training.settings import Settings
from seqzoo.training.sharded import clip_norm
from seqzoo.training.sharded_checkpoint import Saving, load_optimizers, run_splits, run_tensors
from seqzoo.training.shards import Shards, is_sharded
from seqzoo.training.speed import peak_flops, shares, training_flops
from seqzoo.training.split import mark_splits
from seqzoo.training.state import (
    RNG,
    load_optimizer_tensors,
    load_random_state,
    optimizer_kinds,
    optimizer_tensors,
    random_state,
)

log = logging.getLogger(__name__)
LOSS, BESIDE = "loss", "beside/"  # of sums, the whole loss, and what others are named with
TRACES = "traces"  # folder in a run's
MEMORY, SETTLED = 0.02, 20  # of the running mean, the weight of a step; steps before it is trusted
VERSION_KEYS = {"transformers_version", "_name_or_path", "architectures", "dtype"}  # say how a config was written


class Trainer:
    """A run from its first step, or from a checkpoint's, to its last.

    Args:
        model: on its device.
        tokenizer, corpus: of the data.
        optimizers, schedule: step the model's parameters.
        settings: see there.
        folder: of the run.
        seed: of the order of the documents.
        objective: what is learned, see `training/objectives.py`.
        ranks: the processes that train it together, see `training/parallel.py`.
    """

    def __init__(
        self,
        model: SeqZooForCausalLM,
        tokenizer: Tokenizer,
        corpus: Corpus,
        optimizers: list[Optimizer],
        schedule: Schedule,
        settings: Settings,
        folder: Path,
        *,
        seed: int,
        objective: Objective,
        ranks: Ranks,
    ) -> None:
        self.objective, self.ranks = objective, ranks
        self.model, self.tokenizer, self.optimizers, self.schedule = model, tokenizer, optimizers, schedule
        self.settings, self.folder = settings, folder
        length = settings.sequence_length
        ranks.check(rows=settings.batch_size, length=length)
        self.batches = TrainingBatches(
            corpus.train, tokenizer, rows=settings.batch_size, length=length, seed=seed,
            shuffle_buffer=settings.shuffle_buffer, here=ranks.rows_here(settings.batch_size),
        )  # fmt: skip
        limit = settings.final_validation_bytes
        self.validation = ValidationRows(corpus.validation, tokenizer, length=length, limit=limit)
        self.checkpoints = Checkpoints(folder / "checkpoints", settings.keep, settings.milestone_every)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        mark_splits(model)  # not before the model is where it stays: a move makes new parameters
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.step = self.skips = 0
        self.tokens = 0  # read in steps, also in skipped ones
        self.seconds = 0.0  # spent in steps
        self.window = _new_window()
        self.last_good: Path | None = None
        self.saving: Saving | None = None
        self.usual: float | None = None  # norm of the gradient, a running mean over the steps that were taken
        self.flops, self.peak = training_flops(model.config, length), peak_flops(ranks.device)
        compute_again(model, settings.gradient_checkpointing)
        if settings.compile:
            for part in model.stack.blocks if ranks.sharded else [model]:  # between blocks weights are gathered
                part.compile()

    def restore(self, path: Path) -> None:
        """Go on where a checkpoint stands; the model has its weights already.

        Raises:
            ValueError: it is of another model, tokenizer, objective, optimizer or data.
        """
        facts = load_facts(path)
        then = facts.get("objective", "next_token")  # what there was before there were others
        if then != self.objective.name:
            raise ValueError(f"objective: expected that of {path}, {then}, got {self.objective.name}")
        self.batches.load_state_dict(facts["data"])
        if is_sharded(path):
            load_optimizers(path, self.model, self.optimizers, facts["optimizers"])
            tensors = {name: Shards(path).read(name) for name in Shards(path).index if name.startswith(RNG)}
        else:
            tensors = load_tensors(path)
            load_optimizer_tensors(self.model, self.optimizers, tensors, facts["optimizers"])
        self.step, self.tokens, self.seconds = facts["step"], facts["tokens"], facts["seconds"]
        self.skips, self.window, self.last_good = facts["skips"], _new_window() | facts["window"], path
        self.usual = facts.get("usual")
        load_random_state(tensors, facts["random"])

    def fit(self, logbook: Logbook, stop: Any, progress: Progress) -> None:
        """Train until the last step, or until `stop.received` or the clock says so; the last step is saved.

        Raises:
            RuntimeError: too many steps in a row that were not finite, or no checkpoint of the last step; the message
                names the last good one.
        """
        settings, began = self.settings, time.monotonic()
        self.model.train()
        ended = self.step >= settings.steps
        with self.ranks.watched(self.folder) as alive:
            self._fit(logbook, stop, progress, ended, began, alive)
        if stop.received is not None:
            progress.say(f"{signal.Signals(stop.received).name}: stopped after step {self.step:,}; {self._saved()}")

    def _fit(
        self, logbook: Logbook, stop: Any, progress: Progress, ended: bool, began: float, alive: Callable[[], None]
    ) -> None:
        settings = self.settings
        while not ended:
            alive()
            start = time.perf_counter()
            every = settings.profile_every
            with profiled() if every and (self.step + 1) % every == 0 else nullcontext() as seen:
                record = self._step(progress)
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.window["seconds"] += seconds
            progress.step(self.step, seconds, **self._shown())
            if seen is not None:
                try:
                    seen.save(self.folder / TRACES / f"step-{self.step:08d}.rank-{self.ranks.rank:05d}.json.gz")
                except OSError as error:
                    log.warning("no trace of step %d could be written (%s)", self.step, error)
                logbook.write("profile", self.step, tokens=self.tokens, **seen.shares)
            out_of_time = settings.max_minutes is not None and time.monotonic() - began >= 60 * settings.max_minutes
            asked, out_of_time = self.ranks.most(stop.received or 0, int(out_of_time))
            stop.received = asked or stop.received
            ended = self.step >= settings.steps or stop.received is not None or bool(out_of_time)
            if self.step % settings.log_every == 0 or self.step >= settings.steps:
                self._log(logbook, record)
            if self.step % settings.validate_every == 0 and self.step < settings.steps:
                values = self.validate(settings.validation_tokens)
                logbook.write("validation", self.step, tokens=self.tokens, **values)
                progress.say(f"step {self.step:,}  validation {values['bits_per_byte']:.4f} bits/byte")
            due = self.step % settings.checkpoint_every == 0 and not self.skips  # else what is saved may be at fault
            if self.saving is not None and not self.ranks.any(not self.saving.is_done()):
                self._finish_saving(must=False)
            if ended or due:
                logbook.to_disk()
                self._save(must=ended)

    def validate(self, tokens: int | None = None) -> dict[str, float]:
        """loss [nats/token] and bits_per_byte on the validation set, or on so many tokens of it."""
        batches = self.validation.batches(self.settings.batch_size, tokens)
        values = evaluate(self.model, batches, self._precision(), self.ranks if self.ranks.sharded else None)
        self.ranks.settle(self.model)
        return values

    def _step(self, progress: Progress) -> dict[str, Any]:
        """One optimizer step, or a skipped one; what there is to log of it."""
        factor = self.schedule(self.step)
        began = time.perf_counter()
        batches = [next(self.batches) for _ in range(self.settings.accumulate)]
        self.window["waited"] += time.perf_counter() - began
        stats, sums = self._backward(batches)
        self.ranks.finish_gradients(self.model)
        norm = clip_norm(self.params, self.settings.clip)
        sums, norm = dict(zip(sums, self.ranks.sum(torch.stack([*sums.values()])).tolist(), strict=True)), norm.item()
        loss = sums.pop(LOSS)
        self.step += 1
        read = sum(batch.num_targets for batch in batches)  # what only fills a row is no token
        self.tokens += read
        self.window["tokens"] += read
        if self._is_usual(loss, norm):
            for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                optimizer.step()
            self.model.after_step(stats)
            self.skips = 0
            self.usual = norm if self.usual is None else (1 - MEMORY) * self.usual + MEMORY * norm
            self.window["steps"] += 1
            for name, value in sums.items():
                self.window[name] = self.window.get(name, 0.0) + value
            for name in ("num_targets", "num_bytes"):
                self.window[name] += sum(getattr(batch, name) for batch in batches)
        else:
            self._skip(loss, norm, progress)
        for p in self.params:
            p.grad = None
        return dict(lr=self.rates[0][0] * factor, grad_norm=norm if math.isfinite(norm) else None, stats=stats)

    def _backward(self, batches: list[Batch]) -> tuple[Stats, dict[str, Tensor]]:
        """Gradients of all micro-batches -> their counts; sums: the whole loss, what is shown, what is beside it."""
        model, device = self.model, self.params[0].device
        targets = sum(batch.num_targets for batch in batches)
        stats, sums = None, {}
        for i, batch in enumerate(batches):
            self.ranks.sync_gradients(model, i + 1 == len(batches))
            with self.ranks.together():
                with self._precision():
                    out = self.objective(model, self.ranks.stretch(batch).inputs(device), targets, stats)
                (out.loss * self.ranks.size if self.ranks.size > 1 else out.loss).backward()  # means are taken of them
            with torch.no_grad():
                found = dict(nats=out.shown, **{f"{BESIDE}{name}": value for name, value in out.beside.items()})
                found = {LOSS: out.loss, **{name: value * targets for name, value in found.items()}}
                sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
                stats = _pooled(stats, out.stats)
        return stats, sums

    def _is_usual(self, loss: float, norm: float) -> bool:
        """Whether a step is to be taken: finite, and its gradient not far beyond those before, where that is asked."""
        spike, usual = self.settings.skip_spikes, self.usual
        known = spike is not None and usual is not None and self.step > SETTLED
        return math.isfinite(loss) and math.isfinite(norm) and not (known and norm > spike * usual)

    def _skip(self, loss: float, norm: float, progress: Progress) -> None:
        self.skips += 1
        progress.say(f"step {self.step:,} skipped: loss {loss}, gradient norm {norm}; {self.skips} in a row")
        if self.skips >= self.settings.max_skips:
            what = "not finite, or spikes" if self.settings.skip_spikes else "not finite"
            raise RuntimeError(f"{self.skips} steps in a row were {what}, the last is {self.step}; {self._saved()}")

    def _log(self, logbook: Logbook, record: dict[str, Any]) -> None:
        window, stats = self.window, record.pop("stats")
        if window["steps"]:
            values = self._shown()
            speed = values.pop("tokens_per_second")
            values |= self.model.metrics(stats)
            logbook.write(
                "train",
                self.step,
                tokens=self.tokens,
                **values,
                **record,
                tokens_per_second=speed,
                **shares(window["tokens"], window["seconds"], self.flops, self.ranks.size, self.peak),
                data_share=window["waited"] / window["seconds"],
                peak_bytes=peak_bytes(self.ranks.device),
                seconds=self.seconds,
            )
        self.window = _new_window()

    def _shown(self) -> dict[str, float]:
        """Means since the last record; nothing is known where all its steps were skipped."""
        window = self.window
        if not window["steps"]:
            unknown = dict(bits_per_byte=math.nan) if self.objective.in_nats else {}
            return dict(loss=math.nan, **unknown, tokens_per_second=0.0)
        loss, speed = window["nats"] / window["num_targets"], window["tokens"] / window["seconds"]
        shown = dict(bits_per_byte=bits(window["nats"], window["num_bytes"])) if self.objective.in_nats else {}
        beside = {name: value for name, value in window.items() if name.startswith(BESIDE)}
        beside = {name.removeprefix(BESIDE): value / window["num_targets"] for name, value in beside.items()}
        return dict(loss=loss, **shown, **beside, tokens_per_second=speed)

    def _save(self, *, must: bool) -> None:
        tensors, generators = random_state()
        facts = dict(
            step=self.step, tokens=self.tokens, seconds=self.seconds, skips=self.skips, window=self.window,
            usual=self.usual, data=self.batches.state_dict(), random=generators, objective=self.objective.name,
            made_of=made_of(self.model.config, self.tokenizer),
            optimizers=optimizer_kinds(self.model, self.optimizers),
        )  # fmt: skip
        if self.ranks.sharded:
            if self.saving is not None:
                self._finish_saving(must=False)
            tensors |= run_tensors(self.model, self.optimizers)
            splits, whole = run_splits(self.model, tensors), dict(rank=self.ranks.rank, writers=self.ranks.writers)
            self.saving = Saving(self.checkpoints, self.step, tensors, splits, facts, self._write_config, **whole)
            if must:
                self._finish_saving(must=True)
            return
        tensors |= optimizer_tensors(self.model, self.optimizers)
        try:
            self.last_good = self.checkpoints.save(self.step, self._write_model, tensors, facts)
        except OSError as error:
            self._not_saved(self.step, error, must=must)

    def _finish_saving(self, *, must: bool) -> None:
        saving, self.saving = self.saving, None
        try:
            self.last_good = saving.finish()
        except OSError as error:
            self._not_saved(saving.step, error, must=must)

    def _not_saved(self, step: int, error: OSError, *, must: bool) -> None:
        message = f"no checkpoint of step {step} could be written ({error}); {self._saved()}"
        if must:
            raise RuntimeError(message) from error
        log.warning(message)

    def _write_model(self, folder: str) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save(folder)

    def _write_config(self, folder: str) -> None:
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save(folder)

    def _saved(self) -> str:
        return f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint"

    def _precision(self) -> AbstractContextManager:
        if self.settings.precision == "fp32":
            return nullcontext()
        # weights that were cast once are not to be found again: what is computed again would make fewer casts
        cached = self.settings.gradient_checkpointing != SELECTIVE
        return torch.autocast(self.params[0].device.type, dtype=torch.bfloat16, cache_enabled=cached)


def made_of(config: SeqZooConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The facts that a checkpoint and the run that resumes it must share."""
    model = json.loads(config.to_json_string(use_diff=False))
    model = {key: value for key, value in model.items() if key not in VERSION_KEYS}
    return {"model": model, "tokenizer": tokenizer.identity()}


def require_same_model(path: Path, config: SeqZooConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError naming every key in which a checkpoint's model or tokenizer differs from these."""
    require_same(load_facts(path)["made_of"], made_of(config, tokenizer), path)


def _pooled(before: Stats | None, now: Stats) -> Stats:
    now = [{name: value.detach() for name, value in block.items()} for block in now]
    if before is None:
        return now
    return [{name: old[name] + new[name] for name in new} for old, new in zip(before, now, strict=True)]


def _new_window() -> dict[str, float]:
    return dict(nats=0.0, num_targets=0, num_bytes=0, steps=0, tokens=0, seconds=0.0, waited=0.0)
