"""A run on many processes is the run on one: losses, checkpoints, and what is left after a process is killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from runs import HYBRID, TRANSFORMER, options, written
from safetensors.torch import load_file
from transformers import AutoTokenizer

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.convert import convert
from seqzoo.train import model_config
from seqzoo.training.checkpoint import damage_of
from seqzoo.training.export import export, main
from seqzoo.training.shards import Shards

WORKER = Path(__file__).parent / "ranks_worker.py"
SINKS = [
    "model=spikingbrain_parallel_nano", "model.hidden_size=16", "model.channels.moe.num_experts=4",
    "model.channels.moe.expert_width=8", "model.channels.mlp.width=24", "model.channels.moe.shared_width=8",
]  # fmt: skip
for branch in ("near.branches.linear", "near.branches.window", "far.branches.linear", "far.branches.full"):
    SINKS += [f"model.mixers.{branch}.num_heads=4", f"model.mixers.{branch}.num_kv_heads=2"]
KIMI = ["model=kimi_linear_nano", "model.hidden_size=16", "model.channels.moe.num_experts=4"]
PAIRS = ["delta.num_key_heads=2", "delta.num_value_heads=2", "full.num_kv_heads=2"]  # of heads, to be dealt to two
MODELS = {"hybrid": [*HYBRID, *(f"model.mixers.{x}" for x in PAIRS)], "sinks": SINKS, "kimi": KIMI}
STEPS = dict(steps=6, batch_size=4, sequence_length=24, log_every=1, validate_every=3, checkpoint_every=2, keep=9)
ADAMW = ["optimizer=adamw", "optimizer.lr=0.001"]  # Muon makes much of what is little, and so of rounding
MTP = ["objective=mtp", "+model.mtp={pattern: [full/moe]}", "model.channels.moe.balance_coefficient=0.1"]
FEW = ["model.channels.moe.num_experts=3"]
NEAR = 1e-5


def job(folder, *more, model="hybrid", parallel="fsdp", optimizer=ADAMW, facts=None, **trainer):
    numbers = STEPS | dict(sample_tokens=0) | trainer
    more = more if any(x.startswith("parallel=") for x in more) else (f"parallel={parallel}", *more)
    overrides = options(folder, *optimizer, *more, model=MODELS[model], **numbers)
    return dict(folder=str(folder), overrides=overrides, **(facts or {}))


def launch(ranks, jobs, folder, restarts=0):
    """The processes' output, where all went well."""
    file = folder / f"jobs-{ranks}.json"
    file.write_text(json.dumps(jobs))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", f"--max-restarts={restarts}", str(WORKER), str(file)]
    command = [str(WORKER), str(file)] if ranks == 1 else command
    here = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-20000:]
    return done.stdout + done.stderr


def losses(folder):
    return {(line["split"], line["step"]): line["loss"] for line in written(folder)}


def assert_same_losses(folder, expected):
    found = losses(folder)
    assert found.keys() == expected.keys()
    for key, loss in expected.items():
        assert found[key] == pytest.approx(loss, abs=NEAR, rel=1e-6), key


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(home):
    """The runs on one process."""
    jobs = [job(home / f"{model}-1", model=model) for model in MODELS]
    jobs += [job(home / "muon-1", optimizer=["optimizer.ns_dtype=float32"], steps=2)]
    jobs += [job(home / "few-1", *FEW, steps=2, optimizer=["optimizer.ns_dtype=float32"])]
    jobs += [job(home / "two-1", accumulate=2, batch_size=2, shuffle_buffer=4), job(home / "mtp-1", *MTP, steps=2)]
    launch(1, jobs, home)
    return home


def test_two_processes(alone, tmp_path):
    """Weights cut, copies, sequences cut, heads dealt, experts apart; Muon; micro-batches; MTP; and what is refused."""
    home = alone
    jobs = [job(home / f"{model}-2", model=model) for model in MODELS]
    jobs += [
        job(home / f"{model}-{how}", model=model, parallel=how) for model in MODELS for how in ("context", "tensor")
    ]
    jobs += [job(home / "hybrid-copies", "parallel.shard=1", parallel="hsdp")]
    jobs += [job(home / f"{model}-experts", model=model, parallel="expert") for model in ("hybrid", "kimi")]
    jobs += [job(home / "sinks-experts", "parallel.sequence=2", model="sinks", parallel="expert")]
    jobs += [job(home / "muon-2", optimizer=["optimizer.ns_dtype=float32"], steps=2)]
    jobs += [job(home / "few-2", *FEW, steps=2, optimizer=["optimizer.ns_dtype=float32"])]
    jobs += [job(home / "two-2", accumulate=2, batch_size=2, shuffle_buffer=4)]
    jobs += [job(home / "muon-tensor", optimizer=["optimizer.ns_dtype=float32"], parallel="tensor", steps=2)]
    jobs += [job(home / f"mtp-{how}", *MTP, parallel=how, steps=2) for how in ("context", "tensor")]
    jobs += [job(home / "profiled", steps=2, profile_every=2)]
    refused = {
        "expected one configuration on all processes, got another on [1], in ['seed']": (["seed=1"], {}, {}),
        "trainer.batch_size: expected a multiple of replicate x shard=2, got 3": ([], dict(batch_size=3), {}),
        "parallel.expert_parallel: expected a multiple of shard x sequence=2 experts, got 3": (
            ["model.channels.moe.num_experts=3"], {}, dict(parallel="expert"),
        ),
        "trainer.sequence_length: expected a multiple of sequence=2, got 25": (
            [], dict(sequence_length=25), dict(parallel="context"),
        ),
        "trainer.sequence_length: expected a multiple of sequence=1 x tensor=2, got 25": (
            [], dict(sequence_length=25), dict(parallel="tensor"),
        ),
        "attention.num_kv_heads: expected a multiple of parallel.tensor=2, got 1; change either": (
            ["model.mixers.full.num_kv_heads=1"], {}, dict(parallel="tensor"),
        ),
        "parallel: expected replicate x shard x sequence x tensor to be the 2 processes, got 2 x None x 2 x 1": (
            ["parallel.replicate=2"], {}, dict(parallel="context"),
        ),
    }  # fmt: skip
    for i, (said, (more, trainer, how)) in enumerate(refused.items()):
        facts = dict(fails=said, alone=more if more == ["seed=1"] else [])
        jobs += [job(home / f"refused-{i}", *([] if facts["alone"] else more), facts=facts, **how, **trainer)]
    launch(2, jobs, home)
    for model in MODELS:
        for name in (f"{model}-2", f"{model}-context", f"{model}-tensor"):
            assert_same_losses(home / name, losses(home / f"{model}-1"))
    for name in ("hybrid-copies", "hybrid-experts", "kimi-experts", "sinks-experts"):
        assert_same_losses(home / name, losses(home / f"{name.partition('-')[0]}-1"))
    for name in ("muon-2", "muon-tensor"):
        assert_same_losses(home / name, losses(home / "muon-1"))
    assert_same_losses(home / "few-2", losses(home / "few-1"))
    index = Shards(home / "few-2" / "checkpoints" / "step-00000002").index
    offsets = [part["offset"] for part in index["weights/stack.blocks.0.channel.gate_up_proj"]["parts"]]
    assert offsets == [[0, 0, 0], [0, 8, 0]]  # three experts cannot be dealt to two: their rows are
    assert_same_losses(home / "two-2", losses(home / "two-1"))
    for name in ("mtp-context", "mtp-tensor"):
        assert_same_losses(home / name, losses(home / "mtp-1"))
        for ours, theirs in zip(written(home / name), written(home / "mtp-1"), strict=True):
            assert ours.get("mtp_loss") == pytest.approx(theirs.get("mtp_loss"), abs=NEAR)
    (line,) = (line for line in written(home / "profiled") if line["split"] == "profile")
    assert 0 < line["waiting"] <= line["communication"] < 1
    assert len(list((home / "profiled" / "traces").iterdir())) == 2
    one, *others = (Shards(home / f"hybrid-{n}" / "checkpoints" / "step-00000002") for n in (1, 2, "tensor"))
    for two in others:
        assert one.index.keys() == two.index.keys()
        assert {part["file"] for entry in two.index.values() for part in entry["parts"]} == {
            f"shards/rank-0000{rank}.safetensors" for rank in (0, 1)
        }
        for name in one.index:
            torch.testing.assert_close(two.read(name), one.read(name), atol=1e-4, rtol=1e-3, msg=name)


def test_another_number_of_processes_goes_on(alone):
    """A checkpoint of one process goes on in four (copies and cut sequences), theirs in one, with the same losses."""
    home, expected = alone, losses(alone / "hybrid-1")
    last = home / "hybrid-1" / "checkpoints"

    def from_step(name, source, step):
        """A run folder that stands at a step."""
        folder = home / name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(source / f"step-{step:08d}", folder / "checkpoints" / f"step-{step:08d}")
        return folder

    layouts = dict(cut=["parallel=hsdp"], stretches=["parallel=context"])
    layouts |= dict(experts=["parallel=expert", "parallel.replicate=2", "parallel.sequence=2"])
    layouts |= dict(heads=["parallel=tensor"], all=["parallel=expert", "parallel.sequence=2", "parallel.tensor=2"])
    layouts |= dict(copies=["parallel=tensor", "parallel.replicate=2"])
    jobs = [job(from_step(f"four-{n}", last, 2), *more, resume="auto") for n, more in layouts.items()]
    others = [(model, how) for model in ("sinks", "kimi") for how in ("fsdp", "hsdp", "context", "tensor", "expert")]
    jobs += [job(home / f"{model}-{how}-4", model=model, parallel=how) for model, how in others]
    jobs += [job(home / "few-4", *FEW, parallel="tensor", steps=2, optimizer=["optimizer.ns_dtype=float32"])]
    launch(4, jobs, home)
    assert_same_losses(home / "few-4", losses(home / "few-1"))
    one, four = (Shards(home / f"few-{n}" / "checkpoints" / "step-00000002") for n in (1, 4))
    for name in one.index:  # experts' rows are dealt by heads, and what is left of them cut
        torch.testing.assert_close(four.read(name), one.read(name), atol=1e-4, rtol=1e-3, msg=name)
    for model, how in others:
        assert_same_losses(home / f"{model}-{how}-4", losses(home / f"{model}-1"))
    after = {key: loss for key, loss in expected.items() if key[1] > 2}
    for name in layouts:
        assert_same_losses(home / f"four-{name}", after)
    again = [from_step(f"one-{n}", home / f"four-{n}" / "checkpoints", 4) for n in ("cut", "all")]
    launch(1, [job(folder, resume="auto") for folder in again], home)
    for folder in again:
        assert_same_losses(folder, {key: loss for key, loss in expected.items() if key[1] > 4})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "context", "tensor", "expert"])
def test_compiled(alone, how):
    """Blocks compiled on each process at its own pace, exchanges between what is compiled."""
    launch(2, [job(alone / f"compiled-{how}", parallel=how, compile="true")], alone)
    assert_same_losses(alone / f"compiled-{how}", losses(alone / "hybrid-1"))


def test_a_process_hangs(alone):
    """The others give it up after their time, and everybody has written down where it was."""
    folder = alone / "hung"
    folder.mkdir()
    jobs = [job(folder / "run", "parallel.timeout_seconds=6", facts=dict(die=[["hang", 2]]))]
    with pytest.raises(AssertionError, match="(?i)time"):
        launch(2, jobs, alone)
    first, last = ((folder / "run" / f"rank-{rank}.trace").read_text() for rank in (0, 1))
    assert "ranks_worker.py" in last and "in dying_step" in last  # asleep there
    assert "trainer.py" in first and "in _backward" in first  # waiting for it


def test_export(alone, tmp_path, capsys, monkeypatch):
    """The folder that `from_pretrained` opens has the weights of the shards; what cannot be exported is told of."""
    checkpoint = alone / "hybrid-1" / "checkpoints" / "step-00000006"
    files = export(checkpoint, tmp_path / "out", max_shard_size=20_000)
    assert len(files) > 2 and not list(tmp_path.glob(".*"))
    opened, shards = SeqZooForCausalLM.from_pretrained(tmp_path / "out"), Shards(checkpoint)
    for name, x in opened.state_dict().items():
        assert torch.equal(x, shards.read(f"weights/{name}")), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("import").input_ids
    monkeypatch.setattr("sys.argv", ["seqzoo-export", str(checkpoint), str(tmp_path / "one")])
    assert main() == 0 and "1 files of weights" in capsys.readouterr().out
    for wrong, said in ((tmp_path / "out", "expected one of many processes"), (tmp_path / "none", "no such folder")):
        with pytest.raises(ValueError, match=said):
            export(wrong, tmp_path / "never")
    shutil.copytree(checkpoint, tmp_path / "hurt")
    shard = tmp_path / "hurt" / "shards" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 255]))
    with pytest.raises(ValueError, match="expected a whole checkpoint: shards/rank-00000.safetensors: its content"):
        export(tmp_path / "hurt", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_recovery(alone):
    """Stages one after the other, each from where the last one ended: teacher and student are cut, too."""
    home = alone
    mixers = dict(linear=dict(kind="linear_attention", decay="head"), window=dict(kind="attention", window=4))
    with initialize_config_module("seqzoo.configs", version_base=None):
        deeper = [x.replace("layers=1", "layers=2").replace("kv_heads=1", "kv_heads=2") for x in TRANSFORMER]
        config = model_config(compose("train", overrides=deeper))
    torch.manual_seed(0)
    SeqZooForCausalLM(config).save_pretrained(home / "teacher")
    layout = dict(mixers=mixers, pattern=["linear", "window"], num_sink_tokens=2)
    convert(home / "teacher", home / "student", to=layout)
    steps = [f"stages.{stage}.trainer.steps={n}" for stage, n in (("align", 3), ("distil", 3), ("next_token", 2))]
    given = [*steps, f"teacher={home / 'teacher'}", f"init_from={home / 'student'}", "optimizer.lr=0.001"]
    numbers = STEPS | dict(sample_tokens=0)
    for ranks, layouts in ((1, ["fsdp"]), (2, ["fsdp", "context", "tensor"])):
        jobs = []
        for name in layouts:
            folder = home / f"recovered-{name}-{ranks}"
            text = options(
                folder, *given, f"parallel={name}", "optimizer=adamw", "~optimizer.adamw", model=[], **numbers
            )
            jobs.append(dict(folder=str(folder), overrides=text, config="recover"))
        launch(ranks, jobs, home)
    for name in ("fsdp", "context", "tensor"):
        for stage in ("0_align", "1_distil", "2_next_token"):
            assert_same_losses(home / f"recovered-{name}-2" / stage, losses(home / "recovered-fsdp-1" / stage))


def test_processes_are_killed(alone):
    """In a step and while a checkpoint is written: torchrun starts all again, and no batch is lost or read twice."""
    moments = [["step", 3], ["save", 6]]
    (alone / "killed").mkdir()
    jobs = [job(alone / "killed" / "run", resume="auto", steps=8, checkpoint_every=2, facts=dict(die=moments))]
    said = launch(2, jobs, alone, restarts=3)
    assert {path.name for path in (alone / "killed").glob("died-*")} == {"died-step-3", "died-save-6"}, said
    launch(2, [job(alone / "whole", steps=8, checkpoint_every=2)], alone)
    assert written(alone / "killed" / "run") == written(alone / "whole")
    whole, killed = (alone / x / "checkpoints" / "step-00000008" for x in ("whole", "killed/run"))
    assert damage_of(killed) is None and json.loads((killed / "training.json").read_text())["step"] == 8
    for file in ("rank-00000.safetensors", "rank-00001.safetensors"):
        ours, theirs = (load_file(folder / "shards" / file) for folder in (killed, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if not name.startswith("rng/"))
