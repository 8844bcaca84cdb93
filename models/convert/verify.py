"""Two folders that should hold one model are compared by what they say about the same ids."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from seqzoo.models.checkpoints import read_json
from seqzoo.models.convert.calibration import layer_errors
from seqzoo.models.convert.loading import load
from seqzoo.models.convert.report import Verification

NOTHING_WRITTEN = Verification("not verified: nothing was written", {})
BOUND = 1e-4  # of the largest logit, in fp32
_SHAPE, _SEED = (2, 64), 0


def compare_logits(src: Path, made: Path) -> Verification:
    """Of an exact conversion. One model at a time is in memory, whole and in fp32.

    Raises:
        ValueError: they differ by more than BOUND of the largest.
    """
    for folder in (src, made):
        kind = read_json(folder / "config.json")["model_type"]
        if kind != "seqzoo" and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return Verification(f"not verified: transformers has no class for {kind!r}", {})
    config = AutoConfig.from_pretrained(src).get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or _SHAPE[1]
    shape = _SHAPE[0], min(_SHAPE[1], longest)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(_SEED))
    wanted, got = _logits(src, ids), _logits(made, ids)
    difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
    measured: dict[str, Any] = dict(logits_difference=difference, bound=BOUND, ids=list(shape), seed=_SEED)
    said = f"logits differ by at most {difference:.1e} of the largest (fp32, random ids {list(shape)}, seed {_SEED})"
    if not difference <= BOUND:
        raise ValueError(f"{src}: {said}; expected at most {BOUND}")
    return Verification(said, measured)


def compare_layers(src: Path, made: Path) -> Verification:
    """Of an approximate conversion, on random ids. Both models are in memory, whole and in fp32."""
    how = dict(dtype=torch.float32, device=None, revision=None, pickle=True, allow_nonfinite=True)
    source, ours = (load(folder, **how) for folder in (src, made))
    length = min(_SHAPE[1], source.config.max_position_embeddings or _SHAPE[1])
    ids = torch.randint(source.config.vocab_size, (_SHAPE[0], length), generator=torch.Generator().manual_seed(_SEED))
    errors = layer_errors(source, ours, ids)
    worst = max(errors.values(), default=0.0)
    said = f"{len(errors)} mixers are others; their outputs differ by up to {worst:.3f} of their size, before recovery"
    with torch.no_grad():
        wanted, got = (model(ids, use_cache=False).logits for model in (source, ours))
    apart = ((got - wanted).norm() / wanted.norm()).item()
    said += f"; logits by {apart:.3f}"
    if (sinks := ours.config.num_sink_tokens) != source.config.num_sink_tokens:
        said += f", in which every layer, those that stayed too, sees {sinks} new sink tokens"
    measured: dict[str, Any] = dict(layer_errors=errors, logits_error=apart)
    return Verification(said, measured | dict(ids=[_SHAPE[0], length], seed=_SEED))


@torch.no_grad()
def _logits(folder: Path, ids: Tensor) -> Tensor:
    how = dict(dtype=torch.float32, trust_remote_code=False, experts_implementation="eager")  # others need some widths
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    return model.eval()(ids, use_cache=False).logits
