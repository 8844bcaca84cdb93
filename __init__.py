"""seqzoo: efficient sequence architectures, as layers, models and conversions.

`import seqzoo` alone makes a seqzoo folder open with `transformers.AutoModelForCausalLM.from_pretrained`. It does so
without importing transformers: whoever wants only layers does not wait for it.
"""

import sys
from importlib import import_module, machinery

__version__ = "0.1.0"

_AUTO = {  # transformers' module -> what is registered once it is there
    "transformers.models.auto.configuration_auto": lambda auto: auto.AutoConfig.register("seqzoo", _config()),
    "transformers.models.auto.modeling_auto": lambda auto: auto.AutoModelForCausalLM.register(_config(), _model()),
}


def _config() -> type:
    return import_module("seqzoo.models.config").SeqZooConfig


def _model() -> type:
    return import_module("seqzoo.models.causal_lm").SeqZooForCausalLM


class _RegisterOnImport:
    """A finder that lets the ordinary ones find transformers' auto classes, and adds ours once they are loaded."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> machinery.ModuleSpec | None:
        if name not in _AUTO:
            return None
        spec = machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                _AUTO[name](module)

            spec.loader.exec_module = exec_module
        return spec


for _name, _register in _AUTO.items():
    if _name in sys.modules:
        _register(sys.modules[_name])
sys.meta_path.insert(0, _RegisterOnImport)
