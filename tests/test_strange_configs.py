"""Configs of published shape that say what ours lacks, or nothing of sense, and words that fit no conversion."""

import json

import pytest
import torch
from checkpoints import small
from test_convert import assert_same_folder
from transformers import AutoTokenizer

import seqzoo
from seqzoo.data.tokenizer import check_same_tokenizer, load_tokenizer
from seqzoo.models.checkpoints import Folder
from seqzoo.models.convert import cli, convert, folders, int8, writing
from seqzoo.models.convert.folders import CHUNK, Reader

STRANGE = {
    "looks ahead": ("llama", "plain", dict(is_causal=False), "is_causal: expected true, got False"),
    "Ministral's": ("mistral", "window", dict(layer_types=["full_attention"] * 3), "layer_types: expected sliding"),
    "chunked": ("qwen2", "plain, tied", dict(layer_types=["chunked_attention"] * 3), "layer_types: expected full"),
    "partly turned": ("minimax", "plain", dict(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1"),
    "no heads": ("llama", "plain", dict(num_attention_heads=0), "not understood: ZeroDivisionError|no Llama config"),
    "no step": ("qwen3_moe", "plain", dict(decoder_sparse_step=0), "not understood: ZeroDivisionError|decoder_sparse"),
    "theta of nothing": ("llama", "plain", dict(rope_parameters=dict(rope_theta=[])), "config.json"),
    "huge": ("llama", "plain", dict(hidden_size=2**70), "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_is_refused(name, tmp_path):
    kind, shape, changes, words = STRANGE[name]
    small(kind, shape).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    said = json.loads(path.read_text())
    if "partial_rotary_factor" in changes:
        said["rope_parameters"] |= changes
    path.write_text(json.dumps(said | changes))
    for run in (lambda: convert(path.parent, tmp_path / "ours"), lambda: seqzoo.load(path.parent)):
        with pytest.raises(ValueError, match=words):
            run()
    assert not (tmp_path / "ours").exists()


def test_a_broken_generation_config_is_said(tmp_path):
    small("llama", "plain").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: not understood"):
        seqzoo.load(tmp_path)


def test_experts_stay_where_a_layout_wants_some(tmp_path):
    """SpikingBrain-76B's fourth layer has experts; a source that has them keeps its own."""
    source = small("qwen3_moe", "plain", num_hidden_layers=4)
    source.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "made", to="spikingbrain_76b")
    theirs, made = source.state_dict(), seqzoo.load(tmp_path / "made").state_dict()
    ours = seqzoo.load(tmp_path / "theirs").state_dict()
    names = [name for name in ours if ".channel." in name]
    assert len(names) == 3 * 4 and len(theirs) > len(names)
    assert all(torch.equal(made[name], ours[name]) for name in names)


def test_experts_that_stay_go_through_one_at_a_time(tmp_path, monkeypatch):
    """Joined to a stack expert by expert, also on the way to a layout; the stack is never asked for whole."""
    small("qwen3_moe", "plain").save_pretrained(tmp_path / "theirs")
    asked, whole = [], Reader.__call__
    monkeypatch.setattr(Reader, "__call__", lambda reader, name: (asked.append(name), whole(reader, name))[1])
    convert(tmp_path / "theirs", tmp_path / "made", to="gated_deltanet")
    heads = Folder(tmp_path / "made").heads
    stacks = {name for name, head in heads.items() if ".channel." in name and len(head.shape) == 3}
    assert stacks and asked and not stacks & set(asked)


@pytest.mark.parametrize("to", [None, "gated_deltanet"])
def test_large_tensors_are_rounded_row_by_row(tmp_path, monkeypatch, to):
    """With the numbers that they have when rounded whole, in chunks that end within rows."""
    small("qwen3_moe", "plain").save_pretrained(tmp_path / "theirs")
    how = dict(to=to, quantise=dict(group=8))
    convert(tmp_path / "theirs", tmp_path / "whole", **how)
    monkeypatch.setattr(int8, "_AT_ONCE", 0)
    monkeypatch.setattr(folders, "CHUNK", 4 * 31)
    monkeypatch.setattr(int8.Rounded, "__call__", None)
    convert(tmp_path / "theirs", tmp_path / "rows", **how)
    assert_same_folder(tmp_path / "whole", tmp_path / "rows")


def test_an_expanded_tensor_is_never_whole_in_memory():
    stack = torch.arange(4.0 * CHUNK // 16).view(1, -1, 4).expand(9, -1, -1)
    chunks = list(Reader([], lambda _: stack).chunks("x"))
    assert all(x.untyped_storage().nbytes() <= CHUNK for x in chunks)
    assert torch.equal(torch.cat(chunks), stack.reshape(-1))


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    small("llama", "plain").save_pretrained(tmp_path / "theirs")
    target = tmp_path / "mounted"
    target.mkdir()
    monkeypatch.setattr(type(target), "is_mount", lambda path: path == target)
    with pytest.raises(ValueError, match="expected a folder that can be replaced, got a mount point"):
        convert(tmp_path / "theirs", target)
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "mounted"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--max-shard-size", "inf"], "--max-shard-size: expected a size above 0, got inf"),
        (["--max-shard-size", "-1"], "--max-shard-size: expected a size above 0, got -1"),
        (["--max-shard-size", "1e-12"], "max_shard_size: expected 1 byte or more, got 0"),
        (["--quantise", "--group", "0"], "group"),
        (["--group", "64"], "--group and --skip: expected with --quantise alone"),
        (["--report", "nowhere/report.json"], "--report: expected a file in a folder that is there"),
    ],
)
def test_the_command_looks_at_its_words_first(tmp_path, capsys, words, said):
    small("llama", "plain").save_pretrained(tmp_path / "theirs")
    assert cli.main([str(tmp_path / "theirs"), str(tmp_path / "ours"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_an_interrupted_command_says_so(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write", stop)
    small("llama", "plain").save_pretrained(tmp_path / "theirs")
    assert cli.main([str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 130
    assert "interrupted: the same call goes on" in capsys.readouterr().err


def test_training_goes_on_with_the_models_own_tokenizer(tmp_path):
    """Ids of another would mean other words."""
    check_same_tokenizer(load_tokenizer(None), tmp_path)  # it has none
    load_tokenizer(None).save(tmp_path / "bytes")
    check_same_tokenizer(load_tokenizer(None), tmp_path / "bytes")
    other = AutoTokenizer.from_pretrained(tmp_path / "bytes")
    other.add_tokens(["a word"])
    other.save_pretrained(tmp_path / "words")
    check_same_tokenizer(load_tokenizer(str(tmp_path / "words")), tmp_path / "words")
    with pytest.raises(ValueError, match=r"data\.tokenizer: expected that of init_from, .*words, which has 258 ids"):
        check_same_tokenizer(load_tokenizer(None), tmp_path / "words")
