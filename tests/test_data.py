"""Text to batches: every byte once, documents apart, any place to go on from, and errors that name what is wrong."""

import json
import lzma
import math
from collections import Counter
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from seqzoo.data.hub import hub
from seqzoo.data.packing import IGNORED, TrainingBatches, ValidationRows
from seqzoo.data.source import TextSource
from seqzoo.data.stdlib import stdlib
from seqzoo.data.text import text
from seqzoo.data.tokenizer import check_vocabulary, load_tokenizer

DOCUMENTS = [bytes([65 + i]) * n for i, n in enumerate((3, 1, 12, 5, 30, 2, 7))]
TEXT = dict(column="text", errors="strict", longest_document=1 << 14, validation_files=None, validation_share=0.2)


class Given(TextSource):
    """A source in memory."""

    def __init__(self, documents):
        self.texts = documents

    def read(self, position=None):
        for i in range(position or 0, len(self.texts)):
            yield self.texts[i], i + 1

    def identity(self):
        return {"documents": len(self.texts)}


def batches(source, tokenizer=None, **sizes):
    sizes = dict(rows=2, length=5, seed=0, shuffle_buffer=3) | sizes
    return TrainingBatches(source, tokenizer or load_tokenizer(None), **sizes)


def flat(some):
    return [
        torch.cat([getattr(b, name).flatten() for b in some]) for name in ("input_ids", "position_ids", "shift_labels")
    ]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True)) and one[3:] == other[3:]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def words(n):
    return [f"document {i} " + "word " * (i % 7) + "é" for i in range(n)]


@pytest.fixture
def files(tmp_path):
    """One .txt, one .jsonl and one .parquet file, the last in several row groups."""
    write(tmp_path, "a.txt", "\n".join(words(40)))
    write(tmp_path, "b.jsonl", "\n".join(json.dumps({"text": w}) for w in words(15)))
    pq.write_table(pa.table({"text": words(23)}), tmp_path / "c.parquet", row_group_size=5)
    return tmp_path


# The standard library


def test_stdlib_deals_every_file_to_one_side():
    one, two = stdlib(validation_share=0.05), stdlib(validation_share=0.05)
    train, held_out = set(one.train.names), set(one.validation.names)
    assert not train & held_out and held_out == set(two.validation.names)
    assert 0.02 < len(held_out) / len(train | held_out) < 0.09
    assert "argparse.py" in train | held_out and one.train.names == sorted(one.train.names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in train | held_out)


def test_stdlib_reads_files_as_they_are(tmp_path):
    contents = {f"m{i}.py": bytes([i, 255]) for i in range(30)}
    for name, content in contents.items():
        write(tmp_path, name, content)
    write(tmp_path, "empty.py", "")
    corpus = stdlib(validation_share=0.3, folder=str(tmp_path))
    read = [document for side in corpus for document, _ in side.read()]
    assert sorted(read) == sorted(contents.values())


def test_stdlib_without_files(tmp_path):
    with pytest.raises(ValueError, match="expected .py files for validation in .*, got none of 0 files"):
        stdlib(validation_share=0.05, folder=str(tmp_path))
    with pytest.raises(ValueError, match="validation_share: expected a number between 0 and 1, got 1.5"):
        stdlib(validation_share=1.5)


# Tokenizers


def test_a_byte_is_its_own_id():
    tokenizer = load_tokenizer(None)
    every = bytes(range(256))
    assert tokenizer.encode(every).tolist() == list(every)
    assert tokenizer.start == tokenizer.end == 256 and tokenizer.vocab_size == 257
    assert tokenizer.decode([256, *"héllo\n\0".encode(), 256]) == "héllo\n\0"
    assert tokenizer.decode([65, 255, 66]) == "A\ufffdB"


def test_a_saved_byte_tokenizer_opens_by_itself(tmp_path):
    load_tokenizer(None).save(str(tmp_path))
    opened = AutoTokenizer.from_pretrained(tmp_path)
    sentence = "a b  c\t日本 'tis\r\n"
    assert opened.encode(sentence) == list(sentence.encode()) and opened.decode(opened.encode(sentence)) == sentence
    assert opened.bos_token_id == opened.eos_token_id == 256


def test_another_tokenizer_is_opened_from_its_folder(tmp_path):
    load_tokenizer(None).save(str(tmp_path))
    other = load_tokenizer(str(tmp_path))
    assert not other.raw and other.encode("aé".encode()).tolist() == list("aé".encode())
    assert other.identity() == load_tokenizer(None).identity()


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: expected what AutoTokenizer opens, got '.*nothing'"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"model.vocab_size: expected at least 257 \(the tokenizer's\), got 256"):
        check_vocabulary(load_tokenizer(None), 256)
    load_tokenizer(None).save(str(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    marks = {"bos_token", "eos_token"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in marks}))
    with pytest.raises(ValueError, match="tokenizer: expected a bos or eos token, got neither"):
        load_tokenizer(str(tmp_path))


# Packing


def test_every_byte_is_predicted_once_an_epoch():
    stream = batches(Given(DOCUMENTS), rows=1, shuffle_buffer=100)
    rows = -(-sum(len(d) + 1 for d in DOCUMENTS) // 5)  # of 5 places, the last one filled up
    orders = []
    for _ in range(3):
        inputs, _, labels = flat(list(islice(stream, rows)))
        real = labels != IGNORED
        assert Counter(labels[real].tolist()) == Counter(b"".join(DOCUMENTS)) + Counter({256: len(DOCUMENTS)})
        assert torch.equal(
            inputs.view(-1, 5)[:, 1:][real.view(-1, 5)[:, 1:]], labels.view(-1, 5)[:, :-1][real.view(-1, 5)[:, 1:]]
        )
        orders.append(inputs.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_is_not_one_document():
    documents = [bytes([i]) * 200 for i in range(20)]
    batch = next(batches(Given(documents), rows=8, length=20, shuffle_buffer=100))
    assert len({row[5] for row in batch.input_ids.tolist()}) > 4


def test_positions_begin_with_each_document_and_row():
    for batch in islice(batches(Given(DOCUMENTS), length=7, shuffle_buffer=100), 4):  # of 10 rows, one is filled up
        for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
            expected = []
            for i, token in enumerate(ids):
                begins = i == 0 or (token == 256 and ids[i - 1] != 256)  # the filling is one document
                expected.append(0 if begins else expected[-1] + 1)
            assert positions == expected
        assert batch.num_targets == (batch.shift_labels != IGNORED).sum()
        assert batch.num_bytes == ((batch.shift_labels >= 0) & (batch.shift_labels < 256)).sum()


def test_epochs_and_seeds_have_their_own_orders():
    def order(seed, skip):
        stream = batches(Given(DOCUMENTS), seed=seed, shuffle_buffer=100)._read(0, 0, None)
        rows, order, _ = next(islice(stream, skip, None))
        return [document.text() for document in rows.documents], order

    assert order(0, 0) == order(0, 0)
    for i in (0, 1):  # documents, and rows
        assert len({tuple(o[i]) for o in (order(0, 0), order(0, 1), order(1, 0))}) == 3
        assert sorted(order(0, 0)[i]) == sorted(order(0, 1)[i]) == sorted(order(1, 0)[i])


def test_bytes_are_counted_whatever_a_token_is(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(words(50), trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.start, tokenizer.end) == (0, 1)
    documents = [w.encode() for w in words(20)]
    some = list(ValidationRows(Given(documents), tokenizer, length=16, limit=10**6).batches(3))
    inputs, _, labels = flat(some)
    assert sum(b.num_bytes for b in some) == sum(map(len, documents)) > sum(b.num_targets for b in some)
    assert (labels == 1).sum() == 20 and not (inputs[labels != IGNORED] == 1).any()


@pytest.mark.parametrize("kind", ["given", "stdlib", "text", "hub"])
def test_going_on_is_as_if_never_stopped(kind, files):
    source = {
        "given": lambda: Given(DOCUMENTS),
        "stdlib": lambda: stdlib(validation_share=0.5, folder=_modules(files)).train,
        "text": lambda: text(files=f"{files}/*.*", **(TEXT | dict(longest_document=60))).train,
        "hub": lambda: _hub(files).train,
    }[kind]
    whole = batches(source(), length=31)
    for _ in range(30):  # some epochs
        state = json.loads(json.dumps(whole.state_dict()))
        again = batches(source(), length=31)
        again.load_state_dict(state)
        expected = next(whole)
        assert same(next(again), expected)
    assert state["epoch"] > 0


def _modules(folder):
    for i in range(9):
        write(folder, f"m{i}.py", f"x = {i}\n" * (i + 1))
    return str(folder)


def _hub(folder, **changed):
    (folder / "set").mkdir(exist_ok=True)
    write(folder / "set", "train.jsonl", "\n".join(json.dumps({"text": w}) for w in words(30)))
    facts = dict(path=str(folder / "set"), name=None, revision=None, split="train", column="text")
    return hub(**(facts | dict(validation_split=None, validation_share=0.3) | changed))


def test_other_data_than_the_checkpoints():
    state = batches(Given(DOCUMENTS)).state_dict()
    with pytest.raises(ValueError, match="data differ from the checkpoint's: documents: expected 7, got 6"):
        batches(Given(DOCUMENTS[1:])).load_state_dict(state)
    with pytest.raises(ValueError, match="seed: expected 0, got 1"):
        batches(Given(DOCUMENTS), seed=1).load_state_dict(state)


def test_sources_without_documents_and_sizes_without_sense():
    with pytest.raises(ValueError, match="training data: expected documents, got none"):
        next(batches(Given([])))
    with pytest.raises(ValueError, match="validation data: expected documents, got none"):
        ValidationRows(Given([]), load_tokenizer(None), length=4, limit=100)
    with pytest.raises(ValueError, match="sequence_length: expected at least 1, got 0"):
        batches(Given(DOCUMENTS), length=0)


def test_validation_rows_are_all_the_text_once():
    rows = ValidationRows(Given(DOCUMENTS), load_tokenizer(None), length=8, limit=10**6)
    everything = list(rows.batches(4))
    inputs, _, labels = flat(everything)
    assert bytes(x for x in labels.tolist() if 0 <= x < 256) == rows.text == b"".join(DOCUMENTS)
    assert inputs.numel() == math.ceil(67 / 8) * 8 and (labels == IGNORED).sum() == inputs.numel() - 67
    assert sum(b.num_targets for b in everything) == 67 and sum(b.num_bytes for b in everything) == 60
    assert rows.xz_bits_per_byte() == 8 * len(lzma.compress(rows.text, preset=9)) / 60


def test_part_of_the_validation_rows_is_spread_over_all():
    rows = ValidationRows(Given(DOCUMENTS), load_tokenizer(None), length=8, limit=10**6)
    every = torch.cat([b.input_ids for b in rows.batches(4)])
    part = torch.cat([b.input_ids for b in rows.batches(4, limit=17)])
    assert torch.equal(part, every[[0, 3, 6]])
    short = ValidationRows(Given(DOCUMENTS), load_tokenizer(None), length=8, limit=4)
    assert short.text == b"".join(DOCUMENTS[:2])


# Local files


def test_text_reads_every_kind_of_file(files):
    corpus = text(files=[f"{files}/*.txt", f"{files}/b.*", f"{files}/*.parquet"], **TEXT)
    read = [document.decode() for side in corpus for document, _ in side.read()]
    assert sorted(read) == sorted(["\n".join(words(40)), *words(15), *words(23)])
    train, held_out = ({document for document, _ in side.read()} for side in corpus)
    assert not train & held_out and held_out


def test_text_with_files_to_validate_on(files):
    corpus = text(files=f"{files}/*.jsonl", **(TEXT | dict(validation_files=f"{files}/*.parquet")))
    assert [d.decode() for d, _ in corpus.train.read()] == words(15)
    assert [d.decode() for d, _ in corpus.validation.read()] == words(23)
    with pytest.raises(ValueError, match="data.validation_files: expected files that are not in data.files, got .*c."):
        text(files=f"{files}/*.*", **(TEXT | dict(validation_files=f"{files}/c.parquet")))


@pytest.mark.parametrize(
    "content", ["line one\nline two\n" * 9, "日本語" * 30, "x" * 100], ids=["lines", "wide", "plain"]
)
def test_a_long_txt_is_cut_where_it_does_no_harm(content, tmp_path):
    file = write(tmp_path, "a.txt", content)
    corpus = text(files=file, **(TEXT | dict(longest_document=32, validation_files=write(tmp_path, "v.txt", "v"))))
    pieces = [document for document, _ in corpus.train.read()]
    assert b"".join(pieces) == content.encode() and max(map(len, pieces)) <= 32 and len(pieces) < 12
    assert all(piece.decode() for piece in pieces)
    if "\n" in content:
        assert all(piece.endswith(b"\n") for piece in pieces)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_that_is_no_utf8(suffix, tmp_path):
    before = b'{"text": "' if suffix == ".jsonl" else b""
    after = b'"}' if suffix == ".jsonl" else b""
    first = before + b"fine" + after + b"\n"
    file = write(tmp_path, "a" + suffix, first + before + b"caf\xe9!" + after)
    held_out = write(tmp_path, "v.txt", "v")

    def read(errors):
        corpus = text(files=file, **(TEXT | dict(errors=errors, validation_files=held_out)))
        return b"".join(document for document, _ in corpus.train.read())

    offset = len(first) + len(before) + 3
    with pytest.raises(ValueError, match=rf"a{suffix}: expected UTF-8, got byte 0xe9 at offset {offset}"):
        read("strict")
    assert "caf\ufffd!".encode() in read("replace") and b"caf\xe9!" in read("bytes")
    with pytest.raises(ValueError, match=r"data.errors: expected one of \['strict', .*\], got 'ignore'"):
        read("ignore")


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.txt", "", "a.txt: expected text, got an empty file"),
        ("a.csv", "x", "a.csv: expected one of .txt, .jsonl, .parquet, got '.csv'"),
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "a.jsonl, byte 14: expected a JSON object, got"),
        ("a.jsonl", '["x"]\n', "a.jsonl, byte 0: expected a JSON object"),
        ("a.jsonl", '{"body": "x"}', r"data.column: expected a column of .*a.jsonl, byte 0 \(body\), got 'text'"),
        ("a.jsonl", '{"text": 3}', "a.jsonl, byte 0: expected text in column 'text', got int"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl, byte 0: expected Unicode text"),
    ],
)
def test_files_that_cannot_be_read(name, content, says, tmp_path):
    file = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=says):
        list(text(files=file, **TEXT).train.read())


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="data.files: expected files, got none that fit '.*nothing.*'"):
        text(files=f"{tmp_path}/nothing*.txt", **TEXT)
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="a.txt: expected a readable file, got No such file"):
        text(files=f"{tmp_path}/*.txt", **TEXT)


def test_a_parquet_without_the_column(files):
    corpus = text(files=f"{files}/*.parquet", **(TEXT | dict(column="body")))
    with pytest.raises(ValueError, match=r"data.column: expected a column of .*c.parquet \(text\), got 'body'"):
        list(corpus.train.read())


# A data set of `datasets`


def test_hub_streams_a_split(tmp_path):
    corpus = _hub(tmp_path)
    train, held_out = ([document.decode() for document, _ in side.read()] for side in corpus)
    assert sorted(train + held_out) == sorted(words(30)) and train and held_out
    with pytest.raises(ValueError, match="data.column: expected one of text, got 'body'"):
        list(_hub(tmp_path, column="body").train.read())
