"""seqzoo.load opens any folder that can be converted, as the converted folder would open; and pickles where asked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small_qwen3_next import VOCAB, small
from test_convert import assert_relative
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import seqzoo
from seqzoo.models.checkpoints import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE
from seqzoo.models.convert import convert
from seqzoo.models.convert.cli import main
from seqzoo.models.convert.folders import Reader


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "theirs"
    small("equal heads, tied", torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3}')
    return folder


@pytest.fixture(scope="module")
def ours(theirs):
    convert(theirs, theirs.parent / "ours")
    return theirs.parent / "ours"


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_as_the_converted_folder(theirs, ours, dtype):
    wanted, (direct, own) = AutoModelForCausalLM.from_pretrained(ours, dtype=dtype or "auto"), (
        seqzoo.load(folder, dtype=dtype) for folder in (theirs, ours)
    )  # fmt: skip
    ids = torch.randint(VOCAB, (2, 9))
    for model in (direct, own):
        assert type(model) is type(wanted) and not model.training
        assert model.config.dtype == wanted.config.dtype == next(model.parameters()).dtype
        assert model.state_dict().keys() == wanted.state_dict().keys()
        assert_close(model.state_dict(), wanted.state_dict(), rtol=0, atol=0)
        assert torch.equal(model(ids).logits, wanted(ids).logits)
        assert model.generation_config.max_new_tokens == 3
        assert all(p.requires_grad for p in model.parameters())


def test_it_is_the_model(theirs):
    ids = torch.randint(VOCAB, (2, 9))
    model = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32, experts_implementation="eager")
    assert_relative(seqzoo.load(theirs, dtype=torch.float32)(ids).logits, model(ids).logits)


def test_where_it_goes(theirs, ours):
    for folder in (theirs, ours):
        assert {p.device.type for p in seqzoo.load(folder, device="meta", allow_nonfinite=True).parameters()} == {
            "meta"
        }


def test_experts_never_exist_twice(tmp_path, monkeypatch):
    """What is read at a time is one expert, not all that are joined."""
    small("as published").save_pretrained(tmp_path / "theirs")
    most, chunks = [], Reader.chunks

    def watched(self, name):
        for chunk in chunks(self, name):
            most.append(chunk.untyped_storage().nbytes() if name.endswith("gate_up_proj") else 0)
            yield chunk

    monkeypatch.setattr(Reader, "chunks", watched)
    stacked = seqzoo.load(tmp_path / "theirs").stack.blocks[0].channel.gate_up_proj
    assert max(most) * stacked.shape[0] == stacked.numel() * 4


def as_pickles(theirs: Path, folder: Path, shards: bool) -> Path:
    """The same model as torch.save writes it."""
    shutil.copytree(theirs, folder)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {file: load_file(folder / file) for file in set(places.values())}
    for file in [*tensors, INDEX]:
        (folder / file).unlink()
    if shards:
        name = lambda file: file.replace("model", "pytorch_model").replace("safetensors", "bin")
        for file, held in tensors.items():
            torch.save(held, folder / name(file))
        index = dict(metadata={}, weight_map={key: name(file) for key, file in places.items()})
        (folder / PICKLE_INDEX).write_text(json.dumps(index))
    else:
        torch.save({key: x for held in tensors.values() for key, x in held.items()}, folder / PICKLE_SINGLE)
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_pickles_where_asked(theirs, ours, tmp_path, shards):
    pickled = as_pickles(theirs, tmp_path / "pickled", shards)
    for refused in (lambda: convert(pickled, tmp_path / "new"), lambda: seqzoo.load(pickled)):
        with pytest.raises(ValueError, match="expected safetensors, got pickle files, .* [(]--pickle"):
            refused()
    assert main([str(pickled), str(tmp_path / "new"), "--pickle"]) == 0
    wanted = load_file(ours / SINGLE)
    assert_close(load_file(tmp_path / "new" / SINGLE), wanted, rtol=0, atol=0)
    loaded = seqzoo.load(pickled, pickle=True).state_dict()
    assert_close({name: loaded[name] for name in wanted}, wanted, rtol=0, atol=0)
    assert not [path.name for path in (tmp_path / "new").iterdir() if "pytorch" in path.name]
    convert(tmp_path / "new", tmp_path / "back")  # what comes back is safetensors, in as many files
    files = sorted(path.name for path in (tmp_path / "back").glob("*model*"))
    assert files == (sorted(path.name for path in theirs.glob("model*")) if shards else [SINGLE])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert_close(back, AutoModelForCausalLM.from_pretrained(theirs).state_dict(), rtol=0, atol=0)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda path: {"model.norm.weight": Evil(path)}, "pickle file of weights only"),
        (lambda path: [torch.zeros(2)], "expected tensors by name"),
        (lambda path: {"state_dict": {"a": torch.zeros(2)}}, "expected tensors by name"),
        (None, "pickle file of weights only"),
    ],
    ids=["code", "a list", "nested", "cut short"],
)
def test_pickles_that_are_more_than_weights(theirs, tmp_path, content, words):
    folder, trace = as_pickles(theirs, tmp_path / "pickled", False), tmp_path / "trace"
    if content is None:
        (folder / PICKLE_SINGLE).write_bytes((folder / PICKLE_SINGLE).read_bytes()[:-300])
    else:
        torch.save(content(trace), folder / PICKLE_SINGLE)
    for refused in (
        lambda: convert(folder, tmp_path / "new", pickle=True), lambda: seqzoo.load(folder, pickle=True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            refused()
    assert not trace.exists() and not (tmp_path / "new").exists()


@pytest.fixture
def cache(tmp_path, theirs, monkeypatch):
    """A hub cache that holds the model, whose files are links, and no network."""
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in theirs.iterdir():
        shutil.copy(path, repo / "blobs" / f"{path.name}-blob")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-blob")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_from_the_hubs_cache(cache, theirs):
    wanted, loaded = seqzoo.load(theirs), seqzoo.load("some/model")
    assert_close(loaded.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    assert loaded.config._name_or_path == "some/model"


@pytest.mark.parametrize("name", ["some/other", "no model/at all", "some/model/x", "/no/such/folder"])
def test_what_is_not_on_the_hub(cache, name):
    with pytest.raises(ValueError, match=f"^{name}: neither a folder nor a model on the hub that can be had: "):
        seqzoo.load(name)


def test_unknown_on_the_hub_before_its_weights_are_had(cache):
    (cache / "config.json").unlink()
    (cache / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ValueError, match=r"expected one of \[.*qwen3_next.*got 'gpt2' \(\['GPT2LMHeadModel'\]\)"):
        seqzoo.load("some/model")


@pytest.mark.parametrize("side", ["theirs", "ours"])
def test_not_finite(theirs, ours, tmp_path, side):
    folder = Path(shutil.copytree(theirs if side == "theirs" else ours, tmp_path / side))
    file = sorted(folder.glob("model*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name][1] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="norm.weight: expected finite weights, got NaN or infinity"):
        seqzoo.load(folder)
    assert sum(p.isnan().sum() for p in seqzoo.load(folder, allow_nonfinite=True).parameters()) == 1
