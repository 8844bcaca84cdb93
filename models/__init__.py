"""Models composed from the zoo's parts by a config, with transformers' face."""

from importlib import import_module

_HOME = {"SeqZooConfig": "config", "SeqZooForCausalLM": "causal_lm", "StateCache": "cache", "Stack": "stack",
         "merge_neurons": "merge"}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"seqzoo.models has no {name!r}; it has {__all__}")
    return getattr(import_module(f"seqzoo.models.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
