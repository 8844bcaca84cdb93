"""Whatever can be put together is built, takes a step, is saved and comes back: a few draws here, many by command:

    pytest -n 2 tests/test_random_configs.py --configs 200

A draw that fails prints the words that repeat it.
"""

import json
import math

import pytest
from drawn import CHANNELS, MIXERS, MODELS, drawn
from hydra import compose, initialize_config_module
from runs import one_thread

import seqzoo
from seqzoo.data.text import text
from seqzoo.data.tokenizing import tokenize
from seqzoo.layers.registry import kinds
from seqzoo.train import train
from seqzoo.training.checkpoint import damage_of
from seqzoo.training.stopping import StopRequest


def pytest_generate_tests(metafunc):
    if "draw" in metafunc.fixturenames:
        metafunc.parametrize("draw", range(metafunc.config.getoption("configs")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents as Python files, as JSON lines and as shards."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3) for i in range(30)]
    for name in ("python", "text"):
        (folder / name).mkdir()
    for i, document in enumerate(documents):
        (folder / "python" / f"m{i}.py").write_text(document)
    (folder / "text" / "all.jsonl").write_text("".join(json.dumps(dict(text=x)) + "\n" for x in documents))
    how = dict(column="text", errors="strict", longest_document=999, validation_files=None, validation_share=0.3)
    found = text(files=str(folder / "text" / "*.jsonl"), **how)
    tokenize(found, None, folder / "shards", source={}, shard_bytes=400, workers=1, say=lambda line: None)
    return folder


def test_every_part_can_be_drawn():
    assert set(MIXERS) | {"parallel"} == set(kinds("mixers")) and set(CHANNELS) == set(kinds("channels"))
    assert len(MODELS) > 10


def test_draws(draw, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("seqzoo.train.draw_losses", lambda *_: None)
    words = [*drawn(draw, corpus), f"run_dir={tmp_path / 'run'}"]
    print("seqzoo-train", *(f"'{word}'" for word in words))

    def run(*more):
        with initialize_config_module("seqzoo.configs", version_base=None):
            cfg = compose("train", [*words, *more])
        with StopRequest() as stop, one_thread():
            return train(cfg, tmp_path / "run", stop)

    record = run()
    assert math.isfinite(record["loss"])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert damage_of(checkpoint) is None
    again = run("trainer.resume=auto")  # its validation is of the weights that were read
    assert (again["loss"], again["tokens"]) == (record["loss"], record["tokens"])
    opened = seqzoo.load(checkpoint)
    assert sum(p.numel() for p in opened.parameters()) == record["parameters"]
