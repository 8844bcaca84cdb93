"""Teaches a probe a task by fresh sequences until it knows it, or for so many steps."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.experiments.probe import Probe
from seqzoo.train import call

Batch = tuple[Tensor, Tensor]  # ids [B, T], targets [B, T], of which those below 0 ask nothing


def learn(
    model: Probe,
    draw: Callable[[int], Batch],
    held_out: list[Batch],
    *,
    steps: int,
    optimizer: dict[str, Any],
    scheduler: dict[str, Any],
    clip: float,
    check_every: int,
    enough: float,
) -> dict[str, Any]:
    """Train in place.

    Args:
        model: the probe.
        draw: step -> the batch that it is taught in that step.
        held_out: batches; when the worst is at `enough`, training stops.
        steps: the most it takes.
        optimizer, scheduler: what the zoo's `optimizer=` and `scheduler=` configs say.
        clip: the largest norm of the gradient.
        check_every: steps between two looks at `held_out`.
        enough: accuracy, 0 to 1.

    Returns:
        steps taken, CPU seconds spent in them, and `seen`: accuracies on the held-out batches at each look.

    Raises:
        ValueError: no steps.
        RuntimeError: the loss is not finite.
    """
    if steps < 1 or check_every < 1:
        raise ValueError(f"training: expected at least 1, got steps={steps}, check_every={check_every}")
    optimizers, schedule = call(optimizer, model), call(scheduler, steps)
    rates = [(group, group["lr"]) for one in optimizers for group in one.param_groups]
    start, seen = time.process_time(), []
    for step in range(steps):
        for group, rate in rates:
            group["lr"] = rate * schedule(step)
        loss = _step(model, draw(step), optimizers, clip)
        if (step + 1) % check_every == 0 or step + 1 == steps:
            if not torch.isfinite(loss):
                raise RuntimeError(f"the loss of step {step + 1} is {loss.item()}")
            seen.append([step + 1, *(accuracy(model, batch) for batch in held_out)])
            if min(seen[-1][1:]) >= enough:
                break
    return dict(steps=step + 1, seconds=time.process_time() - start, seen=seen)


def accuracy(model: Probe, batch: Batch) -> float:
    """Part of what is asked that the model answers right."""
    return answers(model, batch).float().mean().item()


@torch.no_grad()
def answers(model: Probe, batch: Batch) -> Tensor:
    """[N] bool for the N places where something is asked, row by row: whether the model is right."""
    ids, targets = batch
    model.eval()
    right = model(ids, targets).argmax(-1) == targets[targets >= 0]
    model.train()
    return right


def _step(model: Probe, batch: Batch, optimizers: list[torch.optim.Optimizer], clip: float) -> Tensor:
    ids, targets = batch
    loss = F.cross_entropy(model(ids, targets), targets[targets >= 0])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for one in optimizers:
        one.step()
    for p in model.parameters():
        p.grad = None
    return loss.detach()
