"""A run of seqzoo-train, composed beside an experiment's own configuration, and its model."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from seqzoo.train import plain, prepare, ranks_of
from seqzoo.training.logbook import Logbook
from seqzoo.training.progress import Progress
from seqzoo.training.settings import Settings
from seqzoo.training.stopping import StopRequest
from seqzoo.training.trainer import Trainer


def compose_run(overrides: list[str]) -> DictConfig:
    """What `seqzoo-train` would be given. Hydra knows one configuration at a time: the experiment's is put aside."""
    hydra = GlobalHydra.instance()
    experiment, hydra.hydra = hydra.hydra, None
    try:
        with initialize_config_module("seqzoo.configs", version_base=None):
            return compose("train", overrides=overrides)
    finally:
        hydra.hydra = experiment


def trained(overrides: list[str], logbook: Callable[[Trainer, Path], Logbook] | None = None) -> Trainer:
    """What such a run ends with: the model and the held-out text, its folder gone.

    Args:
        overrides: as of `seqzoo-train`.
        logbook: the run's, made from the trainer before the first step and a folder; None is an ordinary one.

    Raises:
        KeyboardInterrupt: the run was stopped.
    """
    cfg = compose_run(overrides)
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        chosen = Settings(**plain(cfg.trainer))
        trainer, _ = prepare(cfg, chosen, Path(folder), ranks_of(cfg))
        boards = dict(tensorboard=False, wandb=False, config={})
        book = Logbook(Path(folder), 0, **boards) if logbook is None else logbook(trainer, Path(folder))
        with Progress(chosen.steps, 0, chosen.log_every) as progress:
            trainer.fit(book, stop, progress)
        book.close()
        if stop.received is not None:
            raise KeyboardInterrupt
    return trainer
