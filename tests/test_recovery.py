"""What a conversion lost is learned again: objectives, stages, and what is kept of a teacher."""

import json
import logging
import shutil
from unittest.mock import patch

import pytest
import torch
import traced
from hydra import compose, initialize_config_module
from runs import TRAINER, TRANSFORMER, one_thread, options, run
from torch.testing import assert_close

import seqzoo
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.calls import mixer_calls
from seqzoo.models.convert import convert
from seqzoo.models.convert.calibration import layer_errors
from seqzoo.models.extend import extended
from seqzoo.train import train_in_stages
from seqzoo.training import objectives
from seqzoo.training.objectives import Align, Distil, NextToken
from seqzoo.training.stopping import StopRequest

DEEPER = [x if "num_hidden" not in x else "model.num_hidden_layers=2" for x in TRANSFORMER]
LAYOUT = dict(
    mixers=dict(linear=dict(kind="linear_attention", feature="relu", decay="channel", decay_rank=2)),
    pattern=["linear", "keep"],
)

COMPILED = """
import sys
import torch
import seqzoo
from seqzoo.training.objectives import Align

teacher, student = sys.argv[1], seqzoo.load(sys.argv[2]).train()
ids = torch.randint(32, 120, (2, 24))
inputs = dict(input_ids=ids[:, :-1], position_ids=torch.arange(23).expand(2, -1), shift_labels=ids[:, 1:].contiguous())
objective, losses = Align(student, teacher=teacher, precision="fp32"), []
for compiled in (False, True):
    if compiled:
        student.compile(backend="eager")  # whole, as in a run of one process
    student.zero_grad()
    loss = objective(student, inputs, 46, None).loss
    loss.backward()
    losses.append(torch.stack([loss.detach(), student.stack.blocks[0].mixer.v_proj.weight.grad.norm()]))
assert losses[0].all()
torch.testing.assert_close(*losses)
"""


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


@pytest.mark.parametrize("what", ["align", "distil", "next_token"])
def test_every_objective_is_learned(folders, what):
    """On one batch, by all parameters that it says learn; the teacher may be of bf16."""
    student, (inputs, targets) = seqzoo.load(folders["student"]), batch()
    how = dict(teacher=folders["teacher"], precision="bf16")
    objective = {
        "align": lambda: Align(student, **how),
        "distil": lambda: Distil(student, temperature=2.0, weight=0.5, top=5, cache=None, **how),
        "next_token": NextToken,
    }[what]()
    learning = [p for name, p in student.named_parameters() if objective.learns(name)]
    optimizer, losses = torch.optim.Adam(learning, lr=0.01), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = objective(student, inputs, targets, None).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None and p.grad.any() for p in learning)


def test_a_teacher_with_sinks():
    """Each mixer is seen once, with its tokens, though the sinks go through it too."""
    full = dict(kind="attention", num_heads=1, num_kv_heads=1, head_width=8)
    mlp = dict(kind="swiglu", width=8)
    sizes = dict(vocab_size=264, hidden_size=8, num_hidden_layers=2, pattern=["full/mlp"], num_sink_tokens=3)
    model = SeqZooForCausalLM(SeqZooConfig(mixers=dict(full=full), channels=dict(mlp=mlp), **sizes))
    calls = mixer_calls(model, torch.zeros(2, 5, dtype=torch.int64))
    assert [gave.shape for _, gave in calls] == [(2, 5, 8)] * 2


def test_alignment_with_the_students_sinks(folders, tmp_path):
    """What its mixers see when it runs: a window that is long enough gives the teacher's output but for the sinks'."""
    wide = dict(mixers=dict(window=dict(kind="attention", window=64)), pattern=["window"])
    errors = []
    for name, sinks in (("bare", 0), ("sinks", 3)):
        convert(folders["teacher"], tmp_path / name, to=wide | dict(num_sink_tokens=sinks))
        student = seqzoo.load(tmp_path / name)
        if sinks:
            torch.nn.init.normal_(student.sink_tokens)
        objective, (inputs, targets) = Align(student, teacher=folders["teacher"], precision="fp32"), batch()
        errors.append(objective(student, inputs, targets, None).loss.item())
    assert errors[0] < 1e-8 and errors[1] > 1e-3
    asked = layer_errors(objective.teacher, student, inputs["input_ids"])
    assert_close(errors[1], sum(error**2 for error in asked.values()) / len(asked), rtol=1e-4, atol=0.0)
    traced.passes(COMPILED, folders["teacher"], str(tmp_path / "sinks"))


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
def test_kept_predictions_are_the_teachers(folders, top, tmp_path, caplog):
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
        with pytest.raises(TypeError), caplog.at_level(logging.WARNING):
            keeping(student, inputs, targets, None)
    assert f"{file} is damaged: the teacher is asked again" in caplog.text
    assert torch.equal(keeping(student, inputs, targets, None).loss, live)
    other = {**inputs, "input_ids": inputs["input_ids"] + 1}
    keeping(student, other, targets, None)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):  # says something else
        keeping(student, inputs, targets, None)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    file.write_bytes(b"short")
    assert torch.equal(keeping(student, inputs, targets, None).loss, live)
    with (
        patch.object(objectives, "anywhere", lambda here, device: True),
        patch.object(keeping, "teacher", None),
        pytest.raises(TypeError),  # another process lacks its file: the teacher, which is cut, is asked by all
    ):
        keeping(student, inputs, targets, None)


def test_stages_one_after_the_other(folders, tmp_path):
    """Each begins with what the last one ended with; two extend the context, and the last one's config says so."""
    short = tmp_path / "short"
    extended(seqzoo.load(folders["student"]), max_position_embeddings=30).save_pretrained(short)
    longer = ["+stages.distil.extend.max_position_embeddings=99999", "+stages.next_token.extend.rope_theta=50000.0"]
    more = [f"init_from={short}", *longer, "+stages.next_token.trainer.sequence_length=48"]
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
        # of stages that wait for others
        (["+stages.next_token.width=3"], r"stages.next_token: expected keys of .* got \['width'\]"),
        (["stages.distil.objective.temperature=0"], "objective.temperature: expected a number above 0, got 0"),
        (["+stages.next_token.extend.rope_theta=-1.0"], "rope_theta: expected a number above 0, got -1.0"),
        (["+stages.next_token.trainer.batch_size=0"], "trainer.batch_size: expected at least 1, got 0"),
        (["stages.distil.objective._target_=seqzoo.training.objectives.x"], "_target_: expected what can be imported"),
    ],
    ids=str,
)
def test_refused_before_the_first_step(folders, more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        recover(tmp_path / "run", folders, *more)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_a_base_for_a_model_that_does_not_turn(folders):
    config = seqzoo.load(folders["student"]).config.to_dict()
    fields = {name: config[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "channels")}
    mixers = dict(linear=config["mixers"]["linear"])
    model = SeqZooForCausalLM(SeqZooConfig(**fields, mixers=mixers, pattern=["linear/mlp"]))
    with pytest.raises(ValueError, match=r"rope_theta: expected a model that turns by positions, got \['linear'\]"):
        extended(model, rope_theta=50000.0)


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
