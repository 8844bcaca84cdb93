"""seqzoo: efficient sequence architectures, as layers, models and conversions.

`import seqzoo` alone makes a seqzoo folder open with `transformers.AutoModelForCausalLM.from_pretrained`. It does so
without importing transformers: whoever wants only layers does not wait for it.
"""

import sys
from importlib import import_module, machinery
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from seqzoo.models.causal_lm import SeqZooForCausalLM

__version__ = "0.1.0"

_AUTO = {  # transformers' module -> what is registered once it is there
    "transformers.models.auto.configuration_auto": lambda auto: auto.AutoConfig.register("seqzoo", _config()),
    "transformers.models.auto.modeling_auto": lambda auto: auto.AutoModelForCausalLM.register(_config(), _model()),
}


def _config() -> type:
    return import_module("seqzoo.models.config").SeqZooConfig


def _model() -> type:
    return import_module("seqzoo.models.causal_lm").SeqZooForCausalLM


def load(
    path_or_id: str | Path,
    *,
    dtype: "torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
    revision: str | None = None,
    pickle: bool = False,
    allow_nonfinite: bool = False,
) -> "SeqZooForCausalLM":
    """A checkpoint of ours or of any architecture that seqzoo-convert knows, as our model, ready to run.

    Tensor after tensor, memory-mapped: the model is in memory once, and nothing is written beside the hub's cache.

    Args:
        path_or_id: a folder, or a name on the hub, which is found as transformers finds it (HF_HOME, HF_HUB_OFFLINE).
        dtype: of the weights; None is what the config says, or else what the files have.
        device: where they go; None is the CPU.
        revision: of a name on the hub.
        pickle: read pickle files where there are no safetensors; nothing in them is run.
        allow_nonfinite: take NaN and infinity in weights as they are.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: no folder and no model on the hub that can be had; else as `seqzoo.models.convert.convert`.
    """
    found = import_module("seqzoo.models.convert.loading")
    how = dict(dtype=dtype, device=device, revision=revision, pickle=pickle, allow_nonfinite=allow_nonfinite)
    return found.load(path_or_id, **how)


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
