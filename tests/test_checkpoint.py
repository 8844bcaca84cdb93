"""Checkpoints: whole or not there, and a run that goes on from one is the run that was never stopped."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from runs import HYBRID, TRANSFORMER, options, run, written
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqzoo.models.checkpoints import MANIFEST, RUN_FILES
from seqzoo.models.convert import convert
from seqzoo.models.convert import writing as conversion
from seqzoo.training import checkpoint as checkpoint_module
from seqzoo.training import trainer as trainer_module
from seqzoo.training.checkpoint import Checkpoints, choose, damage_of, load_facts, load_tensors
from seqzoo.training.state import load_random_state, random_state
from seqzoo.training.trainer import Trainer

LAST = "step-00000012"


def write_model(folder):
    for name in ("config.json", "model.safetensors"):
        with open(f"{folder}/{name}", "w") as stream:
            stream.write(name * 10)


def save(checkpoints, step):
    return checkpoints.save(step, write_model, {"x": torch.full((3,), float(step))}, {"step": step})


@pytest.fixture
def three(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    return checkpoints


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """The signal comes while this step is being made."""
    make = Trainer._step

    def interrupted(self, progress):
        if self.step + 1 == step:
            os.kill(os.getpid(), number)
        return make(self, progress)

    monkeypatch.setattr(Trainer, "_step", interrupted)


# Folders


def test_what_is_saved_is_loaded_and_the_oldest_go(three):
    save(three, 4)
    assert [path.name for path in three.folder.iterdir() if path.suffix] == []
    assert [path.name for path in three.all()] == ["step-00000002", "step-00000003", "step-00000004"]
    newest = three.newest()
    assert load_facts(newest) == {"step": 4} and load_tensors(newest)["x"].tolist() == [4.0] * 3


@pytest.mark.parametrize("keep", range(1, 7))
def test_as_many_are_kept_as_wished(keep, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep)
    for step in range(1, 9):
        save(checkpoints, step)
        assert [path.name for path in checkpoints.all()] == [
            f"step-{s:08d}" for s in range(max(1, step - keep + 1), step + 1)
        ]


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "model.safetensors", 20),
    "changed": lambda path: (path / "config.json").write_text("CONFIG.JSON" * 10),
    "missing": lambda path: (path / "training.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: os.truncate(path / "manifest.json", 30),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_and_named(damage, three, caplog):
    DAMAGES[damage](three.all()[-1])
    assert three.newest().name == "step-00000002"
    assert "step-00000003 is damaged" in caplog.text
    with pytest.raises(ValueError, match="trainer.resume: expected a checkpoint folder, got .*step-00000003: "):
        choose(three, str(three.all()[-1]))
    assert save(three, 3) == three.newest() and damage_of(three.all()[-1]) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_not_one_of_those_kept(damage, three):
    DAMAGES[damage](three.all()[1])
    resumed = Checkpoints(three.folder, keep=3)
    save(resumed, 4)
    assert [path.name[-1] for path in resumed.all()] == ["1", "2", "3", "4"]
    save(resumed, 5)
    assert [path.name[-1] for path in resumed.all()] == ["3", "4", "5"]


def test_only_damaged_ones(three):
    for path in three.all():
        DAMAGES["truncated"](path)
    with pytest.raises(ValueError, match="expected a whole checkpoint, got only damaged ones"):
        three.newest()


@pytest.mark.parametrize("left", ["step-00000004.partial", "damaged.partial"])
def test_what_a_crash_left_is_no_checkpoint(left, three):
    shutil.copytree(three.all()[0], three.folder / left)
    assert three.newest().name == "step-00000003"
    save(three, 4)
    assert not (three.folder / left).exists()


def test_a_checkpoint_is_chosen_by_wish(three, tmp_path):
    assert choose(Checkpoints(tmp_path / "new", 1), None) is choose(Checkpoints(tmp_path / "new", 1), "auto") is None
    assert choose(three, "auto") == choose(three, str(three.all()[-1])) == three.all()[-1]
    assert choose(Checkpoints(tmp_path / "new", 1), str(three.all()[0])) == three.all()[0]
    with pytest.raises(ValueError, match="expected no checkpoints, got step-00000003; go on with trainer.resume=auto"):
        choose(three, None)
    with pytest.raises(ValueError, match="trainer.resume: expected the newest of"):
        choose(three, str(three.all()[0]))
    with pytest.raises(ValueError, match="trainer.resume: expected a checkpoint folder, got .*nothing: manifest"):
        choose(three, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="trainer.keep: expected at least 1 checkpoint, got 0"):
        Checkpoints(tmp_path, 0)


# A full disk


@pytest.fixture
def full_disk(monkeypatch):
    """No file may grow beyond so many bytes, as far as the system can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("tensors", [{"x": torch.zeros(30_000)}, {"x": torch.zeros(3)}], ids=["tensors", "model"])
def test_a_full_disk_leaves_the_old_ones(tensors, three, full_disk):
    def write_too_much(folder):
        write_model(folder)
        if tensors["x"].numel() < 10:
            with open(f"{folder}/model.safetensors", "wb") as stream:
                stream.write(bytes(200_000))

    full_disk(50_000)
    with pytest.raises(OSError):
        three.save(4, write_too_much, tensors, {})
    assert [path.name for path in three.folder.iterdir() if path.suffix] == []
    assert three.newest().name == "step-00000003"


def test_a_run_survives_a_full_disk_and_says_so(tmp_path, full_disk, monkeypatch, caplog):
    saved, write = [], checkpoint_module._write

    def sometimes_full(folder, *rest):
        saved.append(folder.name)
        full_disk(60_000 if len(saved) in (2, 3) else resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        write(folder, *rest)

    monkeypatch.setattr(checkpoint_module, "_write", sometimes_full)
    closing = run(tmp_path / "run", keep=2)
    assert len(saved) == 4 and closing["checkpoint"].endswith(LAST)
    assert "no checkpoint of step 6 could be written" in caplog.text
    assert "the last good checkpoint is" in caplog.text and "step-00000003" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000003", LAST]


def test_a_run_whose_last_checkpoint_fails_says_so(tmp_path, monkeypatch):
    write = checkpoint_module._write

    def full_at_the_end(folder, *rest):
        if folder.name.startswith(LAST):
            raise OSError(28, "No space left on device")
        write(folder, *rest)

    monkeypatch.setattr(checkpoint_module, "_write", full_at_the_end)
    with pytest.raises(RuntimeError, match="no checkpoint of step 12 could be written .*No space left.*step-00000009"):
        run(tmp_path / "run")


# Going on


def test_the_generators_go_on():
    def draw():
        return torch.rand(3).tolist(), [random.random(), random.gauss(0, 1)], np.random.rand(3).tolist()

    random.gauss(0, 1)  # the second of a pair is kept for the next call
    tensors, facts = random_state()
    facts, expected = json.loads(json.dumps(facts)), draw()
    assert draw() != expected
    load_random_state(tensors, facts)
    assert draw() == expected


@pytest.fixture(scope="module", params=[TRANSFORMER, HYBRID], ids=["transformer", "hybrid"])
def whole(request, tmp_path_factory):
    """A run that nothing stopped, and the folder beside which another may run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    closing = run(folder, model=request.param, accumulate=2)
    return request.param, folder, closing


def same_files(one, other):
    """The same weights, and the same memory of the optimizers."""
    for name in ("model.safetensors", "training.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("step", [5, 6, 11])
def test_a_stopped_run_goes_on_bit_for_bit(step, whole, monkeypatch, capsys):
    model, folder, _ = whole
    stopped = folder.parent / f"stopped-{step}"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(stopped, model=model, accumulate=2) == {}
    assert f"SIGTERM: stopped after step {step}; the last good checkpoint is" in capsys.readouterr().out
    assert f"step-{step:08d}" in os.listdir(stopped / "checkpoints")
    run(stopped, model=model, accumulate=2, resume="auto")
    assert written(stopped) == written(folder)
    same_files(stopped / "checkpoints" / LAST, folder / "checkpoints" / LAST)


def test_a_checkpoint_is_read_once_to_go_on(whole, monkeypatch):
    model, folder, _ = whole
    start, hashed, opened = folder / "checkpoints" / "step-00000009", [], []
    sha256, load_tensors = checkpoint_module.sha256, trainer_module.load_tensors
    monkeypatch.setattr(checkpoint_module, "sha256", lambda file: hashed.append(file) or sha256(file))
    monkeypatch.setattr(trainer_module, "load_tensors", lambda path: opened.append(path) or load_tensors(path))
    run(folder.parent / "once", model=model, accumulate=2, resume=start)
    assert sorted(file for file in hashed if start in file.parents) == sorted(set(start.iterdir()) - {start / MANIFEST})
    assert opened == [start]


@pytest.mark.parametrize(
    "choices",
    [["optimizer=adamw"], ["trainer.precision=bf16"], ["++model.channels.moe.bias_update_rate=0.01"]],
    ids=["adamw", "bf16", "biases"],
)
def test_other_choices_go_on_bit_for_bit(choices, tmp_path, monkeypatch):
    run(tmp_path / "whole", *choices, model=HYBRID)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        run(tmp_path / "stopped", *choices, model=HYBRID)
    run(tmp_path / "stopped", *choices, model=HYBRID, resume="auto")
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")
    same_files(tmp_path / "stopped" / "checkpoints" / LAST, tmp_path / "whole" / "checkpoints" / LAST)


def test_two_threads_go_on_bit_for_bit(tmp_path):
    def train(name, *more, **trainer):
        sizes = dict(batch_size=4, sequence_length=64, steps=4, checkpoint_every=2)
        command = [
            sys.executable,
            "-m",
            "seqzoo.train",
            *options(tmp_path / name, *more, model=HYBRID, **sizes | trainer),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "2"}
        )
        assert done.returncode == 0, done.stderr

    train("whole")
    train("resumed", resume=tmp_path / "whole" / "checkpoints" / "step-00000002")
    same_files(*(tmp_path / name / "checkpoints" / "step-00000004" for name in ("whole", "resumed")))
    assert written(tmp_path / "resumed") == [line for line in written(tmp_path / "whole") if line["step"] > 2]


def test_a_finished_run_only_closes_again(whole):
    model, folder, closing = whole
    lines = written(folder)
    again = run(folder, model=model, accumulate=2, resume="auto")
    assert written(folder) == lines and again["bits_per_byte"] == closing["bits_per_byte"]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    run(tmp_path / "whole", model=HYBRID, steps=40)
    command = [sys.executable, "-m", "seqzoo.train", *options(tmp_path / "killed", model=HYBRID, steps=40)]
    quick = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=quick)
    for line in process.stdout:
        if line.startswith(("step 20/", "step 22/")):  # somewhere between two checkpoints, or while one is written
            break
    time.sleep(0.01)
    process.kill()
    process.wait()
    assert (
        process.returncode == -signal.SIGKILL
        and damage_of(Checkpoints(tmp_path / "killed" / "checkpoints", 3).newest()) is None
    )
    run(tmp_path / "killed", model=HYBRID, steps=40, resume="auto")
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


def test_after_damage_the_one_before_is_used(whole, caplog):
    model, folder, _ = whole
    damaged = folder.parent / "damaged"
    shutil.copytree(folder, damaged, dirs_exist_ok=True)
    DAMAGES["truncated"](damaged / "checkpoints" / LAST)
    run(damaged, model=model, accumulate=2, resume="auto")
    assert f"{LAST} is damaged" in caplog.text and written(damaged) == written(folder)
    same_files(damaged / "checkpoints" / LAST, folder / "checkpoints" / LAST)


def test_another_folder_goes_on_from_a_path(whole):
    model, folder, closing = whole
    start = folder / "checkpoints" / "step-00000006"
    run(folder.parent / "branch", model=model, accumulate=2, resume=start)
    assert written(folder.parent / "branch") == [line for line in written(folder) if line["step"] > 6]


def test_a_checkpoint_opens_as_any_other(whole):
    _, folder, closing = whole
    path = folder / "checkpoints" / LAST
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    out = model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0][:5]) == "def f"
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json", "training.safetensors"} < names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl", ".pth"))]
    json.loads((path / "training.json").read_text())


def test_a_conversion_leaves_the_runs_own_files(tmp_path, monkeypatch):
    closing = run(tmp_path / "run", model=HYBRID, steps=1)
    path = tmp_path / "checkpoint"
    shutil.copytree(closing["checkpoint"], path)
    (path / "notes.txt").write_text("n" * 100_000)
    report = convert(path, tmp_path / "theirs", to="qwen3_next")
    made = {file.name for file in (tmp_path / "theirs").iterdir()}
    assert made >= {"config.json", "model.safetensors", "tokenizer.json", "notes.txt"} and not made & set(RUN_FILES)
    assert sorted(report.left) == sorted(RUN_FILES)
    weights = sum((tmp_path / "theirs" / name).stat().st_size for name in made if name.endswith(".safetensors"))
    room = shutil.disk_usage(tmp_path)._replace(free=weights + 50_000)  # for the tensors, not for what is carried along
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: room)
    with pytest.raises(ValueError, match="no space left: expected"):
        convert(path, tmp_path / "again", to="qwen3_next")


@pytest.mark.parametrize(
    "override, says",
    [
        ("model.channels.mlp.width=40", "channels.mlp.width: expected 48, got 40"),
        ("+model.norm_eps=1e-5", "model.norm_eps: expected 1e-06, got 1e-05"),
        ("seed=1", "seed: expected 0, got 1"),
        ("data.validation_share=0.5", "the data differ from the checkpoint's: files"),
        ("optimizer=adamw", "optimizer: expected Muon for stack.blocks.0.*, got AdamW"),
    ],
)
def test_a_changed_run_does_not_go_on(override, says, tmp_path):
    run(tmp_path / "run", steps=1)
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "run", override, steps=2, resume="auto")
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before


def test_another_tokenizer_does_not_go_on(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "def": 1, "<unk>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>").save_pretrained(
        tmp_path / "words"
    )
    run(tmp_path / "run", steps=1)
    with pytest.raises(
        ValueError, match="made with another model or tokenizer: .*tokenizer.vocab_size: expected 257, got 3"
    ):
        run(tmp_path / "run", f"data.tokenizer={tmp_path}/words", steps=2, resume="auto")
