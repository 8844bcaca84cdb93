"""A damaged or foreign checkpoint is refused with a clear word, opened or converted, and nothing is left behind."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_qwen3_next import small
from transformers import AutoModelForCausalLM

import seqzoo  # noqa: F401 - makes the auto classes know ours
from seqzoo.models import checkpoints
from seqzoo.models.checkpoints import INDEX, SINGLE
from seqzoo.models.convert import architectures, convert, writing
from seqzoo.models.convert.cli import main


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Theirs and ours, in one file each and in shards."""
    root, model = tmp_path_factory.mktemp("sound"), small("all dense")
    model.save_pretrained(root / "theirs")
    model.save_pretrained(root / "theirs in shards", max_shard_size="20KB")
    convert(root / "theirs", root / "ours")
    convert(root / "theirs in shards", root / "ours in shards", max_shard_size=20_000)
    return root


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of one of them to damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(sound / name, tmp_path / name))

    return copy


OPEN = {
    "open": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "convert": lambda folder: convert(folder, folder.parent / "new"),
}


def refused(folder: Path, how: str, *words: str):
    """With these words, and no new folder, whole or half."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ValueError) as caught:
        OPEN[how](folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert sorted(folder.parent.iterdir()) == before


def change(folder: Path, how):
    tensors = load_file(folder / SINGLE)
    how(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


CASES = [("ours", "open"), ("ours", "convert"), ("theirs", "convert")]
BIAS = {"ours": "stack.blocks.0.mixer.dt_bias", "theirs": "model.layers.0.linear_attn.dt_bias"}
each_case = pytest.mark.parametrize("side, how", CASES)


@each_case
def test_missing_tensor(folder, side, how):
    damaged = folder(side)
    change(damaged, lambda tensors: tensors.pop(BIAS[side]))
    refused(damaged, how, "missing", BIAS[side])


@each_case
def test_extra_tensor(folder, side, how):
    damaged = folder(side)
    change(damaged, lambda tensors: tensors.update({"model.layers.9.odd.weight": torch.zeros(2)}))
    refused(damaged, how, "not expected", "model.layers.9.odd.weight")


@each_case
def test_misshapen_tensor(folder, side, how):
    damaged = folder(side)
    change(damaged, lambda tensors: tensors.update({BIAS[side]: torch.zeros(4, 1)}))
    refused(damaged, how, BIAS[side], "expected shape [4], got [4, 1]")


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_tensor_of_integers(folder, side):
    damaged = folder(side)
    change(damaged, lambda tensors: tensors.update({BIAS[side]: torch.zeros(4, dtype=torch.int64)}))
    refused(damaged, "convert", BIAS[side], "expected dtype", "got I64")


DAMAGE = {
    "body cut": lambda data: data[:-3],
    "header cut": lambda data: data[:40],
    "empty": lambda data: b"",
    "longer than its header says": lambda data: data + b"\0" * 8,
    "header of 2^60 bytes": lambda data: struct.pack("<Q", 2**60) + data[8:],
    "header that is no JSON": lambda data: data[:8] + b"[" + data[9:],
    "offsets past the end": lambda data: data.replace(b'data_offsets":[0,', b'data_offsets":[9,', 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@each_case
def test_damaged_file(folder, side, how, damage):
    damaged = folder(side)
    whole = (damaged / SINGLE).read_bytes()
    (damaged / SINGLE).write_bytes(DAMAGE[damage](whole))
    assert (damaged / SINGLE).read_bytes() != whole
    refused(damaged, how, SINGLE, "truncated or no safetensors file")


def header(change):
    """What makes of a file one whose header says what `change` makes of it: of the entries, or of the JSON itself."""

    def damaged(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        text = change(entries)
        text = (text if isinstance(text, str) else json.dumps(entries)).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return damaged


def entry(entries, number):
    """An entry by its place in the file, without the metadata."""
    found = sorted((x for name, x in entries.items() if name != "__metadata__"), key=lambda x: x["data_offsets"])
    return found[number]


def matrix(entries):
    """An entry of two sizes: a wrong sign in both, or a 1 more, is the same number of bytes."""
    return next(x for name, x in entries.items() if name != "__metadata__" and len(x["shape"]) == 2)


def twice(entries):
    name, first = next((name, x) for name, x in entries.items() if name != "__metadata__")
    return json.dumps(entries)[:-1] + f', "{name}": {json.dumps(first)}}}'


MALICE = {
    "a tensor over another": lambda x: entry(x, 1).update(data_offsets=entry(x, 0)["data_offsets"]),
    "a hole": lambda x: x.pop(next(name for name in x if x[name] is entry(x, 1))),
    "negative offsets": lambda x: entry(x, 0).update(data_offsets=[-8, entry(x, 0)["data_offsets"][1]]),
    "offsets the wrong way round": lambda x: entry(x, 0)["data_offsets"].reverse(),
    "offsets in quotes": lambda x: entry(x, 0).update(data_offsets=["0", "8"]),
    "a shape for more bytes": lambda x: entry(x, 0)["shape"].append(2),
    "a shape beyond 64 bits": lambda x: entry(x, 0).update(shape=[2**40, 2**40]),
    "a negative shape": lambda x: matrix(x).update(shape=[-n for n in matrix(x)["shape"]]),
    "true for a size": lambda x: matrix(x)["shape"].append(True),
    "another dtype": lambda x: entry(x, 0).update(dtype="F64"),
    "a dtype that is no name": lambda x: entry(x, 0).update(dtype=[32]),
    "a field too many": lambda x: entry(x, 0).update(code="x"),
    "an entry that is none": lambda x: x.update(a=3),
    "a name twice": twice,
    "metadata that are no texts": lambda x: x.update(__metadata__={"format": 1}),
    "JSON without an end": lambda x: '{"a": ' + "[" * 100_000,
    "a list": lambda x: "[]",
}


@pytest.mark.parametrize("malice", MALICE)
def test_malicious_header(folder, malice):
    damaged = folder("theirs")
    whole = (damaged / SINGLE).read_bytes()
    assert header(lambda entries: None)(whole) != header(MALICE[malice])(whole)
    (damaged / SINGLE).write_bytes(header(MALICE[malice])(whole))
    refused(damaged, "convert", SINGLE, "truncated or no safetensors file")


def test_a_sound_header_written_otherwise_is_read(folder):
    """The damage above is damage: the same without it is not refused."""
    other = folder("theirs")
    (other / SINGLE).write_bytes(header(lambda entries: None)((other / SINGLE).read_bytes()))
    convert(other, other.parent / "new")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_weights_that_are_not_finite(folder, side, value):
    damaged = folder(side)
    change(damaged, lambda tensors: tensors[BIAS[side]][1:2].fill_(value))
    refused(damaged, "convert", BIAS[side], "expected finite weights", "--allow-nonfinite")
    assert main([str(damaged), str(damaged.parent / "new"), "--allow-nonfinite"]) == 0
    made = load_file(damaged.parent / "new" / SINGLE)[BIAS["theirs" if side == "ours" else "ours"]]
    assert torch.equal(made.isfinite(), torch.tensor([True, False, True, True]))


@pytest.mark.parametrize("name", ["tokenizer.json", SINGLE, "config.json"])
def test_links_out_of_the_folder(folder, tmp_path, name):
    damaged, secret = folder("theirs"), tmp_path / "secret"
    secret.write_bytes((damaged / name).read_bytes() if name != "tokenizer.json" else b"{}")
    (damaged / name).unlink(missing_ok=True)
    (damaged / name).symlink_to(secret)
    refused(damaged, "convert", f"{damaged / name}: expected a file, or a link within", str(secret))


def test_links_that_stay(folder, tmp_path):
    """In the folder, as a link to a folder, and as the hub's cache has them."""
    theirs = folder("theirs")
    (theirs / SINGLE).rename(theirs / "weights")
    (theirs / SINGLE).symlink_to("weights")
    (tmp_path / "link").symlink_to(theirs)
    convert(tmp_path / "link", tmp_path / "new")
    cached = tmp_path / "models--a" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    shutil.move(theirs, tmp_path / "models--a" / "blobs")
    for name in ("config.json", SINGLE):
        (cached / name).symlink_to(f"../../blobs/{name}")
    convert(cached, tmp_path / "new too")


@pytest.mark.parametrize("inside", ["new", "new/deeper", "."])
def test_target_in_the_source(folder, inside):
    source = folder("theirs")
    before = sorted(source.iterdir())
    with pytest.raises(ValueError, match="expected a folder"):
        convert(source, source / inside)
    assert sorted(source.iterdir()) == before


def test_files_that_cannot_be_read(folder, tmp_path, monkeypatch):
    source, is_open = folder("theirs"), Path.open
    for name in ("config.json", SINGLE):

        def denied(path, *args, name=name, **kwargs):
            if path == source / name:
                raise PermissionError(13, "Permission denied", str(path))
            return is_open(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", denied)
            refused(source, "convert", str(source / name), "not readable", "Permission denied")


def test_target_that_cannot_be_made(sound, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: .*exists|Not a directory"):
        convert(sound / "theirs", tmp_path / "file" / "new")


@each_case
def test_missing_shard(folder, side, how):
    damaged = folder(f"{side} in shards")
    gone = sorted(damaged.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(damaged, how, f"shard {gone.name} is missing")


@each_case
def test_index_that_names_absent_tensors(folder, side, how):
    damaged = folder(f"{side} in shards")
    index = json.loads((damaged / INDEX).read_text())
    index["weight_map"]["model.ghost"] = next(iter(index["weight_map"].values()))
    (damaged / INDEX).write_text(json.dumps(index))
    refused(damaged, how, INDEX, "shards do not hold: model.ghost;")


@each_case
def test_index_that_leaves_tensors_out(folder, side, how):
    damaged = folder(f"{side} in shards")
    index = json.loads((damaged / INDEX).read_text())
    del index["weight_map"][BIAS[side]]
    (damaged / INDEX).write_text(json.dumps(index))
    refused(damaged, how, INDEX, f"it does not name: {BIAS[side]}")


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../model.safetensors"}}'),
        *(
            '{"weight_map": {"a": "/etc/passwd"}}',
            '{"weight_map": {"a": "x/y.safetensors"}}',
            '{"weight_map": {"a": 1}}',
        ),
        '{"weight_map": {"a": "pytorch_model.bin"}}',
    ],
)
def test_index_that_is_none(folder, content):
    damaged = folder("theirs in shards")
    (damaged / INDEX).write_text(content)
    refused(damaged, "convert", INDEX)


def test_pickles(folder, tmp_path):
    damaged = folder("theirs")
    (damaged / SINGLE).unlink()
    refused(damaged, "convert", "expected model.safetensors", "got neither")
    (damaged / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(damaged, "convert", "pickle", "pytorch_model.bin")
    ours = folder("ours")
    (ours / SINGLE).rename(ours / "pytorch_model.bin")
    refused(ours, "open", "pickle", "pytorch_model.bin")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        ("{", "not readable as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", f"model_type: expected one of {architectures()} or 'seqzoo', got None"),
        ('{"model_type": "folders"}', "got 'folders'"),
        ('{"model_type": ["seqzoo"]}', "got ['seqzoo']"),
        ('{"model_type": "gpt2"}', "got 'gpt2'"),
        ('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}', "got 'gpt2' (['GPT2LMHeadModel'])"),
        ('{"model_type": "seqzoo", "colour": 1}', "unknown ['colour']"),
    ],
)
def test_config(folder, content, words):
    damaged = folder("theirs")
    (damaged / "config.json").unlink() if content is None else (damaged / "config.json").write_text(content)
    refused(damaged, "convert", words, "config" if content is None else "")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "'yarn'], got 'dynamic'"),
        (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)), "'yarn'], got 'dynamic'"),
        (dict(rope_parameters=None, partial_rotary_factor=0.2), "partial_rotary_factor: expected an even number"),
        (dict(attention_dropout=0.1), "attention_dropout: expected 0, got 0.1"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types: expected"),
        (dict(layer_types=["full_attention"]), "num_hidden_layers"),
        (dict(hidden_size="wide"), "hidden_size"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantization_config: expected none"),
        (
            dict(num_experts=4, shared_expert_intermediate_size=0),
            "shared_expert_intermediate_size: expected at least 1",
        ),
        (dict(linear_num_value_heads=3), "num_value_heads=3 is no multiple"),
        (dict(intermediate_size=32), "expected shape [32, 24], got [20, 24]"),
        (dict(num_hidden_layers=3, layer_types=["full_attention"] * 3), "missing"),
    ],
)
def test_qwen3_next_that_we_lack_or_that_is_none(folder, change, words):
    damaged = folder("theirs")
    config = json.loads((damaged / "config.json").read_text()) | change
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, "convert", words)


def test_tied_head_that_is_not_the_embedding(tmp_path):
    small("equal heads, tied").save_pretrained(tmp_path / "theirs")
    change(
        tmp_path / "theirs",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}),
    )
    refused(tmp_path / "theirs", "convert", "lm_head.weight", "expected the same values")


def test_config_that_changed_after_conversion(folder):
    damaged = folder("ours")
    config = json.loads((damaged / "config.json").read_text())
    config["mixers"]["full"]["rope_theta"] = 7.0
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, "convert", "rope_theta: 7.0, not 10000.0", "seqzoo_origin.json")


@pytest.mark.parametrize("content", ["{", "{}", '{"architecture": 1}'])
def test_origin_that_is_none(folder, content):
    damaged = folder("ours")
    (damaged / "seqzoo_origin.json").write_text(content)
    refused(damaged, "convert", "seqzoo_origin.json")


def test_origin_that_names_other_tensors_or_places(folder):
    damaged = folder("ours")
    path = damaged / "seqzoo_origin.json"
    origin = json.loads(path.read_text())
    for name, place, words in (
        ("mtp.lost", [SINGLE, "F32"], "mtp.lost"),
        ("a", ["../x.safetensors", "F32"], "../x"),
        ("a", ["config.json", "F32"], "config.json"),
        ("a", [SINGLE, "I8"], "tensors: expected"),
        ("a", SINGLE, "tensors: expected"),
    ):
        path.write_text(json.dumps(origin | {"tensors": origin["tensors"] | {name: place}}))
        refused(damaged, "convert", "seqzoo_origin.json", words)
    for index in ("", "[]", '{"weight_map": {"a": "../x.safetensors"}}'):
        path.write_text(json.dumps(origin | {"index": index}))
        refused(damaged, "convert", "seqzoo_origin.json", "index: expected the files that tensors has")


@pytest.mark.parametrize("content", ["file", "full"])
def test_target_that_is_something(sound, tmp_path, content):
    target = tmp_path / "new"
    if content == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder that is empty"):
        convert(sound / "theirs", target)
    assert (target if content == "file" else target / "mine").read_text() == "mine"


def test_target_that_is_empty(sound, tmp_path):
    (tmp_path / "new").mkdir()
    convert(sound / "theirs", tmp_path / "new")
    assert (tmp_path / "new" / SINGLE).is_file()


def test_source_that_is_none(tmp_path):
    refused(tmp_path / "nowhere", "convert", "no such folder")


@pytest.mark.parametrize("side, to", [("theirs", "qwen3_next"), ("ours", "seqzoo"), ("ours", "gpt2")])
def test_direction_there_is_not(sound, tmp_path, side, to):
    with pytest.raises(ValueError, match=f"(to|layout): expected one of .* got '{to}'"):
        convert(sound / side, tmp_path / "new", to=to)


def test_two_checkpoints_in_one_folder(folder):
    damaged = folder("theirs in shards")
    shutil.copy(sorted(damaged.glob("model-*.safetensors"))[0], damaged / SINGLE)
    refused(damaged, "convert", "expected one of model.safetensors and", "got both")


def test_a_file_carried_along_is_not_written_over(folder):
    """Weights that the index does not name, under a name that a shard of ours gets."""
    damaged = folder("theirs in shards")
    index = json.loads((damaged / INDEX).read_text())
    for old in sorted(damaged.glob("model-*.safetensors")):
        old.rename(damaged / old.name.replace("model-", "part-"))
    index["weight_map"] = {name: file.replace("model-", "part-") for name, file in index["weight_map"].items()}
    (damaged / INDEX).write_text(json.dumps(index))
    convert(damaged, damaged.parent / "once", max_shard_size=20_000)
    stray = sorted((damaged.parent / "once").glob("model-*.safetensors"))[1].name
    (damaged / stray).write_bytes(b"other weights")
    with pytest.raises(ValueError, match=f"{stray}: not part of the checkpoint"):
        convert(damaged, damaged.parent / "new", max_shard_size=20_000)
    assert not (damaged.parent / "new").exists()


def test_full_disk(sound, tmp_path, monkeypatch):
    """Seen before it begins, or in the midst of it: nothing is left."""
    little = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: little)
        with pytest.raises(ValueError, match="no space left: expected .* bytes, got 1,000"):
            convert(sound / "theirs", tmp_path / "new")

    def full(path, *rest):
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(ValueError, match="no space left, nothing was written"):
        convert(sound / "theirs", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert said == f"seqzoo-convert: {tmp_path / 'nowhere'}: no such folder\n"


def test_ignoring_shapes_is_still_possible(folder):
    """transformers' own word for it is kept, as is its report of what was loaded."""
    damaged = folder("ours")
    change(damaged, lambda tensors: tensors.update({BIAS["ours"]: torch.zeros(4, 1)}))
    _, info = AutoModelForCausalLM.from_pretrained(damaged, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name for name, *_ in info["mismatched_keys"]] == [BIAS["ours"]]
