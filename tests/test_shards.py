"""Shards of tokens and mixtures: the batches are the text's, kills are survived, damage is told, own rows are read."""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import options, run, written

from seqzoo.data import tokenizing
from seqzoo.data.cli import main
from seqzoo.data.mixture import mixture
from seqzoo.data.packing import TrainingBatches, ValidationRows
from seqzoo.data.shard_files import Shard, kind_of
from seqzoo.data.shards import shards
from seqzoo.data.source import Corpus, TextSource
from seqzoo.data.text import text
from seqzoo.data.tokenizer import load_tokenizer
from seqzoo.data.tokenizing import tokenize
from seqzoo.train import configured_data

KILLED = """
import os, signal, sys
from pathlib import Path
from seqzoo.data.text import text
from seqzoo.data.tokenizing import tokenize

def die(line):
    print("cut off after", line, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    files, folder = sys.argv[1:]
    options = dict(column="text", errors="strict", longest_document=999, validation_files=None, validation_share=0.2)
    tokenize(text(files=files, **options), None, Path(folder), source={}, shard_bytes=150, workers=2, say=die)
"""


class Odd:
    """A tokenizer whose ids are 3 bytes of text each, or what is left of it."""

    start, end, vocab_size = 70_000, 70_001, 70_002

    def encode(self, document):
        return torch.tensor([500 + sum(document[i : i + 3]) * 80 for i in range(0, len(document), 3)], dtype=torch.long)

    def save(self, folder):
        Path(folder).mkdir()

    def identity(self):
        return dict(vocab_size=self.vocab_size, start=self.start, end=self.end)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A .jsonl file of 60 documents."""
    file = tmp_path_factory.mktemp("text") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i} " + "word " * (i % 9) + "é"}) + "\n" for i in range(60)))
    return str(file)


def corpus(file):
    options = dict(column="text", errors="strict", longest_document=999, validation_files=None, validation_share=0.2)
    return text(files=file, **options)


def made(file, folder, **changed):
    """The folder, of some shards on each side."""
    options = dict(source={}, shard_bytes=150, workers=1, say=lambda line: None) | changed
    tokenize(corpus(file), None, folder, **options)
    return folder


@pytest.fixture(scope="module")
def whole(lines, tmp_path_factory):
    return made(lines, tmp_path_factory.mktemp("shards") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy, to damage."""
    return shutil.copytree(whole, tmp_path / "shards")


def opened(folder, checksums=False):
    return shards(folder=str(folder), checksums=checksums)


def batches(source, tokenizer=None, **sizes):
    sizes = dict(rows=4, length=9, seed=3, shuffle_buffer=20) | sizes
    return TrainingBatches(source, tokenizer or load_tokenizer(None), **sizes)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True)) and one[3:] == other[3:]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is in them


@pytest.mark.parametrize("odd", [False, True], ids=["bytes", "odd"])
def test_batches_are_those_of_the_text(odd, lines, whole, tmp_path, monkeypatch):
    tokenizer, folder = load_tokenizer(None), whole
    if odd:
        tokenizer = Odd()
        monkeypatch.setattr(tokenizing, "load_tokenizer", lambda name: tokenizer)
        folder = made(lines, tmp_path / "odd")
    plain, stored = corpus(lines), opened(folder, checksums=True)
    assert len(stored.train.facts) > 3 and len(stored.validation.facts) > 1
    ours, theirs = batches(stored.train, tokenizer), batches(plain.train, tokenizer)
    for _ in range(150):  # some epochs
        assert same(next(ours), next(theirs))
    assert ours.state_dict()["epoch"] > 1
    limits = dict(length=11, limit=10**6)
    ours, theirs = (
        ValidationRows(stored.validation, tokenizer, **limits),
        ValidationRows(plain.validation, tokenizer, **limits),
    )
    assert all(same(a, b) for a, b in zip(ours.batches(5), theirs.batches(5), strict=True))
    assert ours.text == theirs.text and ours.xz_bits_per_byte() == theirs.xz_bits_per_byte()


def test_ids_are_plain_and_as_narrow_as_may_be(lines, whole):
    assert [kind_of(n) for n in (256, 257, 1 << 16, (1 << 16) + 1)] == ["uint8", "uint16", "uint16", "uint32"]
    ids = np.concatenate([np.fromfile(file, "<u2") for file in sorted(whole.glob("train-*.ids"))])
    assert bytes(ids.astype(np.uint8)) == b"".join(document for document, _ in corpus(lines).train.read())
    assert not {path.suffix for path in whole.iterdir()} - {".ids", ".index", ".text", ".json", ""}
    assert [path.name for path in whole.glob("*.json")] == ["manifest.json"]


def test_a_run_on_shards_is_the_run_on_the_text(tmp_path):
    """By the commands' own words; also bits per byte, and what xz needs."""
    first = run(tmp_path / "plain", steps=8)
    words = [word for word in options(tmp_path / "plain") if word.startswith("data")]
    assert main([str(tmp_path / "s"), *words, "--workers=1", "--shard-megabytes=.002"], configured=configured_data) == 0
    second = run(tmp_path / "stored", "data=shards", f"data.folder={tmp_path}/s", data=None, steps=8)
    assert written(tmp_path / "stored") == written(tmp_path / "plain")
    assert second["xz_bits_per_byte"] == first["xz_bits_per_byte"]


# Which of them are read


def test_a_process_reads_its_own_rows_only(whole, monkeypatch):
    reads: list[set] = []
    read = Shard.ids

    def spy(self, first, last):
        reads[-1].update((self.base.name, i) for i in range(first, last))
        return read(self, first, last)

    monkeypatch.setattr(Shard, "ids", spy)
    everything = batches(opened(whole).train)
    parts = [batches(opened(whole).train, here=slice(2 * i, 2 * i + 2)) for i in range(2)]
    for _ in range(5):  # of an epoch of 27
        reads.append(set())
        batch, had = next(everything), []
        for i, stream in enumerate(parts):
            reads.append(set())
            part = next(stream)
            assert same(part, type(batch)(*(x[2 * i : 2 * i + 2] for x in batch[:3]), *batch[3:]))
            had.append(reads.pop())
        assert set.union(*had) == reads.pop() and all(2 * 8 <= len(x) <= 2 * (9 + 1) for x in had)
        assert len(set.intersection(*had)) <= 2  # what one row predicts last, the next one reads first


def test_another_number_of_processes_goes_on_in_the_same_order(whole):
    everything = batches(opened(whole).train)
    for parts in (2, 4, 1):
        state = json.loads(json.dumps(everything.state_dict()))
        streams = [batches(opened(whole).train, here=slice(i * 4 // parts, (i + 1) * 4 // parts)) for i in range(parts)]
        for stream in streams:
            stream.load_state_dict(state)
        for _ in range(11):
            batch, some = next(everything), [next(stream) for stream in streams]
            for i in range(3):
                assert torch.equal(batch[i], torch.cat([part[i] for part in some]))
            assert {part[3:] for part in some} == {batch[3:]}
        assert all(stream.state_dict() == everything.state_dict() for stream in streams)


# Killed, and gone on


def test_a_kill_at_any_write_is_gone_on_from(lines, whole, tmp_path):
    """Each child dies in a later write, before it is on the disk or before it has its name; then one is let live."""
    folder, kept = tmp_path / "shards", [0]
    for moment in range(1, 14):  # a shard is six calls, the folder's beginning four
        child = os.fork()
        if child == 0:
            _die_at(moment, lines, folder)
        assert os.waitpid(child, 0)[1] == 9
        notes = list(folder.glob("*-*.json"))
        for note in notes:  # what is said to be finished is
            facts = json.loads(note.read_text())
            assert all((folder / f"{note.stem}.{x}").stat().st_size == y["size"] for x, y in facts["files"].items())
        kept.append(len(notes))
    assert kept == sorted(kept) and kept[-1] > 5 and list(folder.glob("*.partial"))
    before = {note.with_suffix(".ids"): note.with_suffix(".ids").stat().st_ino for note in notes}
    made(lines, folder)
    assert content(folder) == content(whole)
    assert all(path.stat().st_ino == inode for path, inode in before.items())  # not written again


def _die_at(moment, lines, folder):
    """In a child: killed at so many calls of fsync and replace."""
    left = [moment]

    def counted(call):
        def wrapped(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), 9)
            return call(*args)

        return wrapped

    try:
        tokenizing.os.fsync, tokenizing.os.replace = counted(os.fsync), counted(os.replace)
        made(lines, folder)
    finally:
        os._exit(0)


def test_workers_end_with_their_parent_and_may_die(lines, whole, tmp_path):
    """The first process killed, then its workers; what two have made is what one makes."""
    (tmp_path / "killed.py").write_text(KILLED)
    folder = tmp_path / "shards"
    command = [sys.executable, str(tmp_path / "killed.py"), lines, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # waits for all that hold its pipes
    assert done.returncode == -9 and "cut off after train 0" in done.stdout, done.stderr
    with pytest.raises(ValueError, match="expected shards that are done, got .*; run its seqzoo-tokenize again"):
        opened(folder)
    kept = len(list(folder.glob("*-*.json")))

    def kill(line):
        for worker in multiprocessing.active_children() if "written" in line else ():
            worker.kill()

    with pytest.raises(RuntimeError, match="a worker died, .*; the same command goes on from here"):
        made(lines, folder, workers=2, say=kill)
    assert len(list(folder.glob("*-*.json"))) > kept
    assert content(made(lines, folder)) == content(whole)


# What is wrong with them


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped ids": (lambda f: flip(f / "train-00002.ids"), r"train-00002.ids: expected sha256 \w+, got another"),
    "flipped text": (lambda f: flip(f / "validation-00001.text"), "validation-00001.text: expected sha256"),
    "short ids": (lambda f: os.truncate(f / "train-00001.ids", 10), r"train-00001.ids: expected \d+ bytes, got 10"),
    "facts lost": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"tokens"', '"x"')),
        "manifest.json: expected each shard's numbers, sizes and checksums, got not all of them",
    ),
    "no index": (lambda f: (f / "train-00001.index").unlink(), r"train-00001.index: expected \d+ bytes, got nothing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_and_made_good(damage, folder, whole, lines):
    hurt, says = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(ValueError, match=says):
        list(opened(folder, checksums=True).train.documents(load_tokenizer(None)))
    made(lines, folder)
    assert content(folder) == content(whole)


def test_damage_that_is_found_as_it_is_read(folder):
    flip(folder / "train-00001.index")
    source = opened(folder).train
    with pytest.raises(ValueError, match="a damaged shard: .*train-00001.index: expected sha256"):
        list(source.documents(load_tokenizer(None)))
    ids = np.memmap(folder / "train-00000.ids", "<u2", "r+")
    ids[3] = 300
    document, _ = next(source.documents(load_tokenizer(None)))
    with pytest.raises(ValueError, match="a damaged shard: .*train-00000.ids: expected ids below 257, got 300"):
        document.ids(0, 5)
    with pytest.raises(ValueError, match="train-00000: expected the text of its documents, got ids alone"):
        document.text()


@pytest.mark.parametrize(
    "said, says",
    [
        ("{", "expected a folder that seqzoo-tokenize made, got no manifest.json"),
        ("[]", "manifest.json: expected format 'seqzoo shards 1', got 'list'"),
        ('{"format": "seqzoo shards 2"}', "expected format 'seqzoo shards 1', got 'seqzoo shards 2'"),
        ('{"format": "seqzoo shards 1", "sides": {"train": []}}', "expected each shard's numbers, sizes"),
        ('{"format": "seqzoo shards 1", "sides": {"train": [{"files": 3}]}}', "expected each shard's numbers, sizes"),
    ],
)
def test_manifests_that_are_none(said, says, folder):
    (folder / "manifest.json").write_text(said)
    with pytest.raises(ValueError, match=says):
        opened(folder)


def test_another_tokenizer(whole, lines):
    with pytest.raises(
        ValueError, match="data.tokenizer: expected that of the shards, .*vocab_size: expected 257, got"
    ):
        next(batches(opened(whole).train, Odd()))
    other = load_tokenizer(str(whole / "tokenizer"))  # opened from its folder it is the same
    assert same(next(batches(opened(whole).train, other)), next(batches(corpus(lines).train)))
    other.inner.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    with pytest.raises(ValueError, match="expected that of the shards, .*; probe: expected"):  # no vocabulary shows it
        next(batches(opened(whole).train, other))


def test_folders_of_something_else(lines, folder, tmp_path):
    with pytest.raises(ValueError, match="options that it was begun with; shard_bytes: expected 150, got 400"):
        made(lines, folder, shard_bytes=400)
    with pytest.raises(ValueError, match="options that it was begun with; source: expected {}, got {'a': 1}"):
        made(lines, folder, source={"a": 1})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.partial").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder that seqzoo-tokenize made, got no manifest.json"):
        made(lines, tmp_path / "mine")
    assert content(tmp_path / "mine") == {"x.partial": b"mine"}
    with tokenizing._locked(folder), pytest.raises(ValueError, match="expected no other seqzoo-tokenize to be at work"):
        made(lines, folder)


def test_no_room(lines, whole, tmp_path):
    """A file may not grow; what was finished before is kept, and nothing half-written is left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made(lines, tmp_path / "x")
    (tmp_path / "x" / "train-00003.ids").unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"train-00003.ids: could not be written: .*; the same command goes on"):
            made(lines, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "x").glob("*.partial")) and not (tmp_path / "x" / "train-00003.ids").exists()
    assert content(made(lines, tmp_path / "x")) == content(whole)


def test_the_command(whole, tmp_path, capsys):
    def said(*words):
        code = main([*words], configured=configured_data)
        return code, (lambda out: out.out + out.err)(capsys.readouterr())

    assert said(str(whole), "--check") == (0, f"{whole}: all is as it was written\n")
    for words, says in {
        (str(tmp_path / "a"), "--check"): "expected a folder that seqzoo-tokenize made",
        (str(whole), "--check", "data=stdlib"): "--check: expected FOLDER alone, got data=stdlib",
        (str(tmp_path / "a"), "data=text"): "Missing mandatory value: files",
        (str(tmp_path / "a"), "data=nothing"): "Could not find 'data/nothing'",
        (
            str(tmp_path / "a"),
            "data=shards",
            f"data.folder={whole}",
        ): "data: expected a source of text, got seqzoo.data.s",
        (str(tmp_path / "a"), "--workers", "0"): "workers: expected at least 1, got 0",
        (str(tmp_path / "a"), "--shard-megabytes", "0", "data=stdlib"): "shard_bytes: expected at least 1, got 0",
    }.items():
        code, line = said(*words)
        assert code == 2 and line.startswith("seqzoo-tokenize: ") and says in line and line.count("\n") == 1
    assert not (tmp_path / "a").exists()


# Mixtures


class Given(TextSource):
    def __init__(self, texts):
        self.texts = texts

    def read(self, position=None):
        for i in range(position or 0, len(self.texts)):
            yield self.texts[i], i + 1

    def identity(self):
        return {"texts": len(self.texts)}


def given(letter, n):
    """A source of n documents of one letter each, as a configuration names it."""
    documents = [f"{letter}{i}".encode() for i in range(n)]
    return Corpus(Given(documents), Given([f"{letter}v{i}".encode() for i in range(n // 2)]))


def mixed(weights, seed=0, sizes=None, **facts):
    target = dict(_target_=f"{__name__}.given")
    sizes = sizes or dict.fromkeys("abc", 10)
    sources = {name: target | dict(letter=name, n=n) | facts for name, n in sizes.items()}
    return mixture(sources=sources, weights=weights, seed=seed)


def texts(source, n):
    return [document.text().decode() for document, _ in islice(source.documents(load_tokenizer(None)), n)]


def test_documents_are_drawn_by_weight_each_source_in_its_own_epochs():
    read = texts(mixed(dict(a=1, b=2.5, c=6.5)).train, 2000)
    counts = Counter(text[0] for text in read)
    for name, share in dict(a=0.1, b=0.25, c=0.65).items():
        assert abs(counts[name] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
        own = [text for text in read if text[0] == name]
        assert own == [f"{name}{i % 10}" for i in range(len(own))]
    assert read != texts(mixed(dict(a=1, b=2.5, c=6.5), seed=1).train, 2000)
    assert Counter(text[0] for text in texts(mixed(None).train, 300)).keys() == set("abc")


def test_a_mixture_validates_on_each_document_once():
    read = texts(mixed(dict(a=1, b=2, c=8), sizes=dict(a=20, b=4, c=6)).validation, 100)
    assert len(read) == 10 + 2 + 3 == len(set(read)) and read != sorted(read)


def test_a_mixture_goes_on_as_if_never_stopped(whole):
    def source():
        text = mixed(dict(a=1, b=2, c=3), sizes=dict(a=3, b=5, c=7)).train
        text.sources["d"], text.weights["d"] = opened(whole).train, 2
        return text

    stream = batches(source(), length=7)
    for _ in range(60):
        state = json.loads(json.dumps(stream.state_dict()))
        again = batches(source(), length=7)
        again.load_state_dict(state)
        assert same(next(again), next(stream))
    assert state["epoch"] == 0 and state["position"]["places"]["a"][0] > 2
    with pytest.raises(ValueError, match="data differ from the checkpoint's: mixture"):
        batches(mixed(None).train, length=7).load_state_dict(state)


def test_a_mixture_by_the_commands_words(whole):
    words = ["data=mixture", "+data@data.sources.code=stdlib", "+data@data.sources.mine=shards"]
    words += [f"data.sources.mine.folder={whole}", "data.weights={code: 1, mine: 9}", "seed=5"]
    both, tokenizer, _ = configured_data(words)
    batch = next(batches(both.train, load_tokenizer(tokenizer)))
    assert batch.num_targets == 36 and both.train.seed == 5 and both.train.weights == dict(code=1, mine=9)


@pytest.mark.parametrize(
    "weights, sizes, says",
    [
        (dict(a=1), None, r"data.weights: expected one for each of data.sources=\['a', 'b', 'c'\], got \['a'\]"),
        (dict(a=1, b=0, c=1), None, "data.weights.b: expected a number above 0, got 0"),
        (dict(a=1, b=float("nan"), c=1), None, "data.weights.b: expected a number above 0, got nan"),
        (None, dict(a=3, b=0), "data.sources.b: expected documents, got none"),
    ],
)
def test_mixtures_that_are_none(weights, sizes, says):
    with pytest.raises(ValueError, match=says):
        texts(mixed(weights, sizes=sizes).train, 100)


def test_a_mixture_has_one_tokenizer(whole, tmp_path):
    assert texts(mixed(None, tokenizer=str(whole / "tokenizer")).train, 3)
    shutil.copytree(whole / "tokenizer", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    for mark in ("bos_token", "eos_token", "pad_token"):
        config[mark] = "A"
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="data.sources.a.tokenizer: expected null or the mixture's, .*, got .*other"):
        texts(mixed(None, tokenizer=str(tmp_path / "other")).train, 3)
    with pytest.raises(ValueError, match="data.sources.a: expected what a file of configs/data says, got 3"):
        mixture(sources=dict(a=3), weights=None, seed=0)
    with pytest.raises(ValueError, match=r"data.weights: expected one for each of data.sources=\[\], got \[\]"):
        mixture(sources={}, weights=None, seed=0)
