"""What a conversion lost is learned again: objectives, stages, and what is kept of a teacher."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from hydra import compose, initialize_config_module
from runs import TRAINER, TRANSFORMER, one_thread, options, run
from torch.testing import assert_close

import seqzoo
from seqzoo.models.convert import convert
from seqzoo.train import train_in_stages
from seqzoo.training.objectives import Align, Distil
from seqzoo.training.stopping import StopRequest

DEEPER = [x if "num_hidden" not in x else "model.num_hidden_layers=2" for x in TRANSFORMER]
LAYOUT = dict(
    mixers=dict(linear=dict(kind="linear_attention", feature="relu", decay="channel", decay_rank=2)),
    pattern=["linear", "keep"],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small Transformer that was trained, and what it was converted to."""
    where = tmp_path_factory.mktemp("recovery")
    record = run(where / "teacher", model=DEEPER, steps=30, checkpoint_every=30)
    convert(record["checkpoint"], where / "student", to=LAYOUT)
    return dict(teacher=record["checkpoint"], student=str(where / "student"), where=where)


def batch(rows=2, T=24):
    ids = torch.randint(32, 120, (rows, T))
    inputs = dict(
        input_ids=ids[:, :-1], position_ids=torch.arange(T - 1).expand(rows, -1), shift_labels=ids[:, 1:].contiguous()
    )
    return inputs, inputs["shift_labels"].numel()


def recover(folder, folders, *more, **trainer):
    """The stages of configs/recover.yaml, small, in this process -> the last closing record."""
    stages = [f"stages.{name}.trainer.steps={n}" for name, n in (("align", 4), ("distil", 4), ("next_token", 3))]
    given = [f"teacher={folders['teacher']}", f"init_from={folders['student']}", *stages, "optimizer.lr=0.01"]
    text = options(folder, model=[], checkpoint_every=2, **trainer)
    with initialize_config_module("seqzoo.configs", version_base=None):
        cfg = compose("recover", overrides=[*text, *given, *more])
    with StopRequest() as stop, one_thread(), patch("seqzoo.train.draw_losses"):
        return train_in_stages(cfg, folder, stop)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_alignment(folders):
    """Only the new mixer learns; of a mixer that is the teacher's the error is none; the loss is the relative error."""
    student = seqzoo.load(folders["student"])
    objective = Align(student, teacher=folders["teacher"], precision="fp32")
    assert objective.layers == [0] and not objective.in_nats
    inputs, targets = batch()
    result = objective(student, inputs, targets, None)
    result.loss.backward()
    learned = {name for name, p in student.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in student.named_parameters() if objective.learns(name)}
    assert learned and all(name.startswith("stack.blocks.0.mixer.") for name in learned)
    assert result.loss > 0.05 and all(p.grad is None for p in objective.teacher.parameters())
    found = []
    objective.teacher.stack.blocks[0].mixer.register_forward_hook(lambda _, x, y: found.append((x[0], y[0])))
    objective(student, inputs, targets, None)
    x, wanted = found[0]
    got = student.stack.blocks[0].mixer(x)[0]
    assert_close(result.loss.detach(), ((got - wanted).norm() / wanted.norm()).square().detach())
    student.stack.blocks[0].mixer = objective.teacher.stack.blocks[0].mixer
    assert objective(student, inputs, targets, None).loss == 0
    with pytest.raises(ValueError, match="expected mixers that are not the student's"):
        Align(seqzoo.load(folders["teacher"]), teacher=folders["teacher"], precision="fp32")


def test_distillation(folders):
    """At weight 0 it is the next token, of a copy of the teacher it is nothing; else the divergence, by its formula."""
    student, inputs = seqzoo.load(folders["student"]), batch()[0]
    targets = inputs["shift_labels"].numel()
    how = dict(teacher=folders["teacher"], top=None, cache=None, precision="fp32")
    plain = Distil(student, temperature=1.0, weight=0.0, **how)(student, inputs, targets, None)
    assert_close(plain.loss, student(**inputs, num_items_in_batch=targets, use_cache=False).loss)
    copy = seqzoo.load(folders["teacher"])
    assert Distil(copy, temperature=2.0, weight=1.0, **how)(copy, inputs, targets, None).loss.abs() < 1e-6
    got = Distil(student, temperature=2.0, weight=1.0, **how)(student, inputs, targets, None).loss
    given = {name: x for name, x in inputs.items() if name != "shift_labels"}
    p, q = ((model(**given).logits / 2).softmax(-1) for model in (copy, student))
    assert_close(got, 4 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top", [None, 7])
def test_kept_predictions_are_the_teachers(folders, top, tmp_path):
    """Bit for bit, without asking the teacher again; a damaged file is made again."""
    student = seqzoo.load(folders["student"])
    how = dict(teacher=folders["teacher"], temperature=1.5, weight=0.7, top=top, precision="fp32")
    inputs, targets = batch()
    live = Distil(student, cache=None, **how)(student, inputs, targets, None).loss
    keeping = Distil(student, cache=str(tmp_path / "kept"), **how)
    assert torch.equal(keeping(student, inputs, targets, None).loss, live)
    (file,) = (tmp_path / "kept").iterdir()
    with patch.object(keeping, "teacher", None):  # nobody there to ask
        assert torch.equal(keeping(student, inputs, targets, None).loss, live)
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        with pytest.raises(TypeError):
            keeping(student, inputs, targets, None)
    assert torch.equal(keeping(student, inputs, targets, None).loss, live)
    other = {**inputs, "input_ids": inputs["input_ids"] + 1}
    keeping(student, other, targets, None)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    file.write_bytes(b"short")
    assert torch.equal(keeping(student, inputs, targets, None).loss, live)


def test_stages_one_after_the_other(folders, tmp_path):
    """Each begins with what the last one ended with; the last extends the context, and its config says so."""
    longer = "{rope_theta: 50000.0, max_position_embeddings: 99999}"
    more = [f"+stages.next_token.extend={longer}", "+stages.next_token.trainer.sequence_length=48"]
    record = recover(tmp_path / "run", folders, *more)
    assert record["checkpoint"].endswith("2_next_token/checkpoints/step-00000003")
    stages = [tmp_path / "run" / name for name in ("0_align", "1_distil", "2_next_token")]
    first = [line for line in lines(stages[0]) if line["split"] == "train"]
    assert first[-1]["loss"] < first[0]["loss"] and "bits_per_byte" not in first[0]
    begun, aligned = (
        seqzoo.load(x).state_dict() for x in (folders["student"], stages[0] / "checkpoints/step-00000004")
    )
    changed = {name for name in begun if not torch.equal(begun[name], aligned[name])}
    assert changed and all(name.startswith("stack.blocks.0.mixer.") for name in changed)
    config = seqzoo.load(record["checkpoint"]).config
    assert config.mixers["full"]["rope_theta"] == 50000.0 and config.max_position_embeddings == 99999
    assert (stages[2] / "config.yaml").read_text().count("sequence_length: 48") == 1


@pytest.mark.parametrize("lost", ["the last step", "a whole stage"])
def test_what_is_cut_off_goes_on_bit_for_bit(folders, lost, tmp_path):
    record = recover(tmp_path / "whole", folders)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "2_next_token")
    if lost == "a whole stage":
        shutil.rmtree(tmp_path / "cut" / "1_distil")
    else:
        shutil.rmtree(tmp_path / "cut" / "1_distil" / "checkpoints" / "step-00000004")
    again = recover(tmp_path / "cut", folders, resume="auto")
    one, other = (seqzoo.load(x["checkpoint"]).state_dict() for x in (record, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert again["bits_per_byte"] == record["bits_per_byte"]


@pytest.mark.parametrize(
    "more, words",
    [
        (["+stages.align.width=3"], r"stages.align: expected keys of .* got \['width'\]"),
        (["trainer.resume=somewhere"], "trainer.resume: expected null or auto for a run in stages"),
        (["stages.align.objective.precision=fp8"], "objective.precision: expected one of"),
        (["init_from=nowhere"], "nowhere: neither a folder nor a model on the hub"),
        (["+stages.align.extend.rope_theta=-1.0"], "rope_theta: expected a number above 0, got -1.0"),
    ],
    ids=str,
)
def test_refused_before_the_first_step(folders, more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        recover(tmp_path / "run", folders, *more)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(temperature=0.0), "objective.temperature: expected a number above 0"),
        (dict(weight=1.5), "objective.weight: expected 0 to 1"),
        (dict(top=1000), "objective.top: expected 1 to 264 tokens or null, got 1000"),
    ],
    ids=str,
)
def test_numbers_out_of_range(folders, how, words):
    student = seqzoo.load(folders["student"])
    usual = dict(teacher=folders["teacher"], temperature=1.0, weight=0.5, top=None, cache=None, precision="fp32")
    with pytest.raises(ValueError, match=words):
        Distil(student, **usual | how)


def test_a_teacher_of_another_size(folders, tmp_path):
    run(tmp_path / "small", model=TRANSFORMER, steps=1)
    student = seqzoo.load(folders["student"])
    with pytest.raises(ValueError, match="num_hidden_layers: expected that of the source, 1, got 2"):
        Align(student, teacher=str(next((tmp_path / "small" / "checkpoints").iterdir())), precision="fp32")


def test_ordinary_training_from_a_folder(folders, tmp_path):
    """init_from alone; with a base of rotary frequencies that it has no place for it is refused."""
    record = run(tmp_path / "run", f"init_from={folders['student']}", model=[], steps=2)
    assert seqzoo.load(record["checkpoint"]).config.mixers["linear"]["kind"] == "linear_attention"
    assert TRAINER["steps"] > 2
    with pytest.raises(ValueError, match="extend: expected null without init_from"):
        run(tmp_path / "other", "extend.rope_theta=10.0")
