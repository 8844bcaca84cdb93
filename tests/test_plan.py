"""What seqzoo-plan says is what runs hold and exchange."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from runs import HYBRID, options
from torch.autograd.graph import saved_tensors_hooks

from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.train import configured_plan, plan_main
from seqzoo.training.layout import Layout
from seqzoo.training.plan import Planner
from seqzoo.training.plan_block import Live, Where
from seqzoo.training.plan_exchange import Cluster, Exchange, Group, on_links
from seqzoo.training.plan_model import UNDERSTOOD
from seqzoo.training.plan_search import search

WORKER = Path(__file__).parent / "plan_worker.py"
TWO = ["cluster=laptop", "cluster.devices_per_node=2"]
SHAPE = dict(batch_size=4, sequence_length=32)
MUON = ["optimizer.ns_dtype=bfloat16"]  # as on the devices that are planned for; a CPU without it takes fp32 by itself
SPIKING = [
    "model=spikingbrain_parallel_nano", "model.hidden_size=48", "model.channels.moe.num_experts=4",
    "model.pattern=[near/moe,far/moe]", "model.num_hidden_layers=2",
]  # fmt: skip
ADAMW = ["optimizer=adamw"]
PAIRS = [*HYBRID, *(f"model.mixers.{x}" for x in ("delta.num_key_heads=2", "full.num_kv_heads=2"))]
EVEN = [*SPIKING, "model.channels.moe.expert_width=8", "model.channels.moe.shared_width=8"]
for branch in ("near.branches.linear", "near.branches.window", "far.branches.linear", "far.branches.full"):
    EVEN += [f"model.mixers.{branch}.num_heads=4", f"model.mixers.{branch}.num_kv_heads=2"]
JOBS = {  # name -> model, words
    "fsdp": (HYBRID, ["parallel=fsdp", *MUON]),
    "context": (HYBRID, ["parallel=context", *ADAMW]),
    "again": (SPIKING, ["parallel=context", *ADAMW, "trainer.gradient_checkpointing=true", "trainer.accumulate=2"]),
    "experts": (HYBRID, ["parallel=expert", *ADAMW]),
    "copies": (HYBRID, ["parallel=hsdp", *ADAMW]),
    "few experts": ([*HYBRID, "model.channels.moe.num_experts=3"], ["parallel=fsdp", *MUON]),
    "heads": (PAIRS, ["parallel=tensor", *MUON]),
    "heads and experts": (PAIRS, ["parallel=tensor", "parallel.expert_parallel=true", *ADAMW]),
    "heads and sinks": (EVEN, ["parallel=tensor", *ADAMW, "trainer.gradient_checkpointing=true"]),
}


def planner_of(words):
    asked = configured_plan(words)
    settings = asked.settings
    options = dict(length=settings.sequence_length, precision=settings.precision, optimizers=asked.optimizers)
    return asked, Planner(asked.config, asked.cluster, **options)


def plan_of(words):
    asked, planner = planner_of(words)
    settings = asked.settings
    how = dict(accumulate=settings.accumulate, checkpointing=settings.gradient_checkpointing)
    return planner.plan(asked.layout, rows=settings.batch_size, **how)


@pytest.fixture(scope="module")
def runs_of_two(tmp_path_factory):
    """What two processes held and exchanged."""
    home = tmp_path_factory.mktemp("plan")
    jobs = []
    for name, (model, words) in JOBS.items():
        jobs.append(dict(folder=str(home / name), overrides=options(home / name, *words, model=model, **SHAPE)))
    (home / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", str(WORKER), str(home / "jobs.json")]
    here = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-20000:]
    return {name: json.loads((home / f"{name}.json").read_text()) for name in JOBS}


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_hold_and_exchange_what_is_planned(runs_of_two, name):
    model, words = JOBS[name]
    found = runs_of_two[name]
    plan = plan_of([*model, *words, *TWO, *(f"trainer.{key}={x}" for key, x in SHAPE.items())])
    payload = Counter()
    for exchange in plan.exchanges:
        payload[exchange.how] += exchange.bytes
    held = {name: plan.memory[name] for name in found["held"]}
    if "trainer.accumulate=2" in words:  # between its micro-batches; what was looked at came after them
        held["gradients"] //= 2
    assert held == found["held"]
    payload["shift"] //= 2  # the first of two processes has none to send gradients to, the last no tokens
    assert set(found["payload"]) == set(payload) - {how for how, size in payload.items() if not size}
    for how, size in found["payload"].items():
        if how == "all_reduce":
            assert payload[how] == size - 16  # the loss, to be shown, and the gradient's norm
        elif "experts" in name and how == "all_to_all":
            assert payload[how] == pytest.approx(size, rel=0.1)  # tokens do not choose evenly
        else:
            assert payload[how] == size, how


SMALL = {
    "qwen3_next_nano": ["model.hidden_size=64"],
    "spikingbrain_nano": ["model.num_hidden_layers=2"],
    "kimi_linear_nano": ["model.hidden_size=64"],
}
NEAR = dict(fp32=0.07, bf16=0.12)  # a GPU's kernels keep other things besides: of the delta rule, an inverse per chunk


@pytest.mark.parametrize(
    "model, precision", [*((model, "fp32") for model in SMALL), ("qwen3_next_nano", "bf16")]
)  # fmt: skip
def test_activations_are_those_of_a_real_step(model, precision):
    """What autograd saves, and the most that is there at a time, with the kernels of a CPU."""
    T, rows = 128, 2
    words = [f"model={model}", *SMALL[model], "cluster=laptop", "parallel=single", f"trainer.sequence_length={T}"]
    asked, planner = planner_of([*words, f"trainer.precision={precision}"])
    plan = planner.plan(asked.layout, rows=rows, accumulate=1, checkpointing=False)
    torch.manual_seed(0)
    ours = SeqZooForCausalLM(asked.config).train()
    own = {x.untyped_storage()._cdata for x in [*ours.parameters(), *ours.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return x.detach()

    ids, where = torch.randint(264, (rows, T)), torch.arange(T).expand(rows, T)
    inputs = dict(input_ids=ids, position_ids=where, shift_labels=ids, num_items_in_batch=rows * T, use_cache=False)
    with Live() as live:
        lower = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
        with lower, saved_tensors_hooks(pack, lambda x: x):
            out = ours(**inputs, return_logits=False)
        saved = sum(storage.nbytes() for storage in storages.values())
        storages.clear()
        out.loss.backward()
    head = planner.measured("head", Where(length=T, sequence=1, tensor=1, owners=1, lower=precision == "bf16", sinks=0))
    memory = plan.memory
    assert memory["activations"] + head.saved.of(rows) == pytest.approx(saved, rel=NEAR[precision])
    assert live.peak <= memory["activations"] + memory["working"] + memory["gradients"] < 1.7 * live.peak


def test_the_largest_batch_is_the_largest():
    words = [*HYBRID, "parallel=fsdp", "cluster=laptop", "cluster.devices_per_node=4", "cluster.memory=1.0e+9"]
    asked, planner = planner_of([*words, "cluster.reserve=0", "trainer.sequence_length=64", "trainer.precision=bf16"])
    for how in (dict(accumulate=1, checkpointing=False), dict(accumulate=3, checkpointing=True)):
        plan = planner.plan(asked.layout, rows=4, **how)
        most = planner.plan(asked.layout, rows=plan.most_rows, **how)
        assert most.fits and most.most_rows == plan.most_rows > 4
        assert not planner.plan(asked.layout, rows=plan.most_rows + 4, **how).fits
        assert most.needs == sum(most.memory.values()) > 0.9 * asked.cluster.memory


def test_links_by_hand():
    """16 devices in nodes of 4: what passes a device's link, and its network."""
    cluster = Cluster(
        device="x", nodes=4, devices_per_node=4, memory=1, reserve=0, flops=dict(bf16=1, fp32=1), memory_bandwidth=1,
        link=1, network=1,
    )  # fmt: skip
    expected = {
        ("all_gather", 4, 1): (75, 0),  # in a node: all but its own
        ("all_gather", 16, 1): (93.75, 18.75),  # three quarters come into a node, through four networks
        ("reduce_scatter", 16, 1): (93.75, 18.75),
        ("all_reduce", 4, 4): (0, 150),  # one device of each node
        ("all_reduce", 8, 2): (175, 75),  # two of each
        ("all_to_all", 16, 1): (18.75, 75),
        ("shift", 2, 1): (100, 0),
        ("shift", 8, 1): (0, 100),
        ("all_gather", 1, 1): (0, 0),
    }
    for (how, n, stride), (link, network) in expected.items():
        found = on_links(Exchange("it", how, Group(n, stride), 100), cluster)
        assert found == pytest.approx((link, network)), (how, n, stride)


def test_all_fields_of_a_layout_are_understood(monkeypatch):
    """Whoever adds one to Layout says what it means for memory and exchanges, here and in training/plan_layout.py."""
    assert {field.name for field in fields(Layout)} == UNDERSTOOD
    monkeypatch.setattr("seqzoo.training.plan_model.UNDERSTOOD", UNDERSTOOD - {"sequence"})
    with pytest.raises(ValueError, match=r"got a difference in \['sequence'\]"):
        planner_of([*HYBRID, *TWO])


def test_search_finds_the_best_that_fits():
    """Every plan fits and is of the tokens asked for, in order; what is refused says why."""
    memory = "cluster.memory=0.7e+6"
    words = [*HYBRID, "cluster=laptop", "cluster.devices_per_node=2", "cluster.nodes=2", memory, "cluster.reserve=0"]
    asked, planner = planner_of([*words, "trainer.sequence_length=16", "optimizer=adamw"])
    found = search(planner, tokens=256, timeout_seconds=600)
    assert found.plans and found.refused
    for plan in found.plans:
        assert plan.fits and plan.rows * plan.accumulate == 16
    for best in found.plans:
        sizes = dict(zip(("replicate", "shard", "sequence", "tensor"), best.sizes, strict=True))
        layout = Layout(**sizes, expert_parallel=best.expert_parallel, timeout_seconds=600)
        for accumulate in (1, 2, 4):
            for checkpointing in (False, True) if 16 // accumulate >= sizes["replicate"] * sizes["shard"] else ():
                how = dict(rows=16 // accumulate, accumulate=accumulate, checkpointing=checkpointing)
                other = planner.plan(layout, **how)
                assert not other.fits or other.seconds["ordered"] >= best.seconds["ordered"] * (1 - 1e-9) - 1e-4
    times = [round(plan.seconds["ordered"], 4) for plan in found.plans]
    assert times == sorted(times) and all(
        plan.seconds["floor"] <= plan.seconds["ordered"] * (1 + 1e-9) for plan in found.plans
    )
    assert {name: why for name, why in found.refused if why.startswith(("needs", "weights, gradients"))}
    with pytest.raises(ValueError, match="tokens_per_step: expected a multiple of sequence_length=16, got 255"):
        search(planner, tokens=255, timeout_seconds=600)


def test_the_command(monkeypatch, capsys):
    """What is printed, the exit status, and one line where words are at fault."""
    small = [*HYBRID, "trainer.sequence_length=16", "optimizer=adamw"]
    run = lambda *words: (monkeypatch.setattr("sys.argv", ["seqzoo-plan", *small, *words]), plan_main())[1]
    assert run("cluster=laptop", "parallel=single") == 0
    said = capsys.readouterr().out
    assert ": fits" in said and "largest micro-batch that fits:" in said and "optimizer states" in said
    assert run("cluster=laptop", "parallel=single", "cluster.memory=4.1e+9", "trainer.batch_size=40000") == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert run("cluster=laptop", "search=true", "tokens_per_step=64") == 0
    assert "parallel.expert_parallel=false trainer.batch_size=" in capsys.readouterr().out
    wrong = {
        "expected a multiple of replicate x shard=8, got 4": ["cluster=h100_8", "parallel=fsdp"],
        "to be the 8 processes, got 3 x None x 1 x 1": ["cluster=h100_8", "parallel=fsdp", "parallel.replicate=3"],
        "objective: expected next_token": ["cluster=laptop", "objective=mtp"],
        "expected words such as model=... cluster=...": ["cluster=none"],
        "cluster.link: expected a number above 0, got 0": ["cluster=laptop", "cluster.link=0"],
    }
    for message, words in wrong.items():
        assert run(*words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("name", sorted(p.stem for p in Path(__file__).parents[1].glob("configs/cluster/*.yaml")))
def test_every_cluster_is_one(name):
    cluster = configured_plan([f"cluster={name}"]).cluster
    assert cluster.devices == int(name.rpartition("_")[2]) if "_" in name else 1
    assert replace(cluster, nodes=2).devices == 2 * cluster.devices_per_node
