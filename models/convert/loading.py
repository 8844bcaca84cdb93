"""A folder or hub id of any architecture that can be converted, opened as our model, without a second folder."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import GenerationConfig

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.checkpoints import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE, check_links, read_json
from seqzoo.models.convert import kind_of
from seqzoo.models.convert.folders import Opened, Reader, open_as_ours
from seqzoo.models.convert.writing import finite


def load(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
    pickle: bool,
    allow_nonfinite: bool,
) -> SeqZooForCausalLM:
    """`seqzoo.load`."""
    folder = Path(path_or_id)
    if not folder.is_dir():
        folder = _download(str(path_or_id), revision, pickle)
    check_links(folder)
    if kind_of(folder) == "seqzoo":
        model = SeqZooForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        if device is not None:
            model.to(device)
    else:
        model = _fill(open_as_ours(folder, kind_of(folder), pickle=pickle), dtype, device or "cpu")
        if (folder / "generation_config.json").is_file():
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:  # transformers' validators raise classes of their own
                why = " ".join(str(error).split())[:160]
                raise ValueError(f"{folder / 'generation_config.json'}: not understood: {why}") from error
        model.config._name_or_path = str(path_or_id)
    for name, x in model.named_parameters():
        if not allow_nonfinite and x.is_floating_point() and not finite(x):
            raise ValueError(
                f"{folder}: {name}: expected finite weights, got NaN or infinity (allow_nonfinite takes them)"
            )
    return model.eval()


def _fill(opened: Opened, dtype: torch.dtype | None, device: str | torch.device) -> SeqZooForCausalLM:
    """The model on its device, tensor after tensor: there is one of each, in the dtype wanted."""
    config, read = opened.config, Reader(opened.steps, opened.source.read)
    config.dtype = dtype or config.dtype
    with torch.device("meta"):
        model = SeqZooForCausalLM(config)
    values: dict[str, Tensor] = {}
    for name, head in opened.heads.items():
        flat, end = None, 0
        for chunk in read.chunks(name):
            if flat is None:
                size = torch.Size(head.shape).numel()
                flat = torch.empty(size, dtype=config.dtype or chunk.dtype, device=device)
            begin, end = end, end + chunk.numel()
            flat[begin:end].copy_(chunk)
            opened.source.release()
        values[name] = flat.view(head.shape)
    missing, _ = model.load_state_dict(values, assign=True, strict=False)
    assert set(missing) <= set(model._tied_weights_keys), missing
    model.tie_weights()
    return model


def _download(name: str, revision: str | None, pickle: bool) -> Path:
    """From the hub or its cache, as transformers finds them: first what says whether it is of use, then the weights.

    Raises:
        ValueError: no such model there, or none to be reached.
    """

    def fetch(*files: str) -> Path:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{name}: neither a folder nor a model on the hub that can be had: {why}") from None

    folder = fetch("config.json")
    kind_of(folder)
    folder = fetch("*.json")
    for index, single in ((INDEX, SINGLE), (PICKLE_INDEX, PICKLE_SINGLE)):
        files = (
            set(read_json(folder / index).get("weight_map", {}).values()) if (folder / index).is_file() else {single}
        )
        folder = fetch(*files)
        if not pickle or any((folder / file).is_file() for file in files):
            break
    return folder
