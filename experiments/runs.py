"""The configuration of a run of seqzoo-train, composed beside an experiment's own."""

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig


def compose_run(overrides: list[str]) -> DictConfig:
    """What `seqzoo-train` would be given. Hydra knows one configuration at a time: the experiment's is put aside."""
    hydra = GlobalHydra.instance()
    experiment, hydra.hydra = hydra.hydra, None
    try:
        with initialize_config_module("seqzoo.configs", version_base=None):
            return compose("train", overrides=overrides)
    finally:
        hydra.hydra = experiment
