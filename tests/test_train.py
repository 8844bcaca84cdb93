"""Training: optimizers and schedules are what they say, and a run leaves what people expect to see."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
from itertools import islice
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hydra.errors import ConfigCompositionException, MissingConfigException
from runs import HYBRID, options, run, written
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.data.packing import IGNORED, TrainingBatches
from seqzoo.data.stdlib import stdlib
from seqzoo.data.tokenizer import load_tokenizer
from seqzoo.layers.blocks.residual import Residual
from seqzoo.models import SeqZooForCausalLM
from seqzoo.training import muon as muon_module
from seqzoo.training import trainer as trainer_module
from seqzoo.training.closing import print_sample
from seqzoo.training.logbook import Logbook, records
from seqzoo.training.muon import Muon, orthogonal
from seqzoo.training.optimizers import adamw, muon
from seqzoo.training.profile import length, union, without
from seqzoo.training.schedules import cosine, wsd
from seqzoo.training.stopping import StopRequest

ADAMW = dict(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
MUON = dict(lr=0.02, weight_decay=0.1, momentum=0.95, ns_steps=5, ns_dtype="bfloat16", adjust_lr_fn="original")


def parameters(*shapes):
    return [(torch.randn(shape) / 10).requires_grad_() for shape in shapes]


def copies(params):
    return [p.detach().clone().requires_grad_() for p in params]


# Optimizers


@pytest.mark.parametrize("ratio", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_on_matrices(ratio, nesterov):
    ours = parameters((5, 9), (9, 5), (5, 9), (7, 7), (5, 9))
    theirs = copies(ours)
    options = dict(lr=0.05, weight_decay=0.3, momentum=0.9, nesterov=nesterov, adjust_lr_fn=ratio)
    one, other = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours[2].grad = theirs[2].grad = None  # one has none
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3 * 0.05)  # bf16 products may be summed in another order


def test_muon_takes_a_stack_as_its_matrices():
    (stack,) = parameters((3, 4, 6))
    apart = [m.detach().clone().requires_grad_() for m in stack]
    one, other = Muon([stack], lr=0.1, ns_dtype="float32"), Muon(apart, lr=0.1, ns_dtype="float32")
    for _ in range(2):
        stack.grad = torch.randn_like(stack)
        for i, p in enumerate(apart):
            p.grad = stack.grad[i].clone()
        one.step()
        other.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in apart]))


def test_muon_takes_few_at_a_time(monkeypatch):
    """Where all matrices of a shape would be too much; what becomes of them is the same."""
    assert muon_module.batches([3, 4, 4, 2, 9, 1]) == [[0, 1, 2, 3, 4, 5]]
    steps = {}
    for largest in (2**31, 2 * 6 * 4 * 4):
        monkeypatch.setattr(muon_module, "LARGEST", largest)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(*shape)) for shape in ((6, 4), (6, 4), (3, 6, 4), (6, 4), (5, 4))]
        for p in params:
            p.grad = torch.randn_like(p)
        Muon(params, ns_dtype="float32").step()
        steps[largest] = params
    assert muon_module.batches([96, 96, 288, 96]) == [[0, 1], [2], [3]]
    for one, other in zip(*steps.values(), strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 9, 4)])
def test_newton_schulz_makes_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape), 5, 1e-7, torch.float32))
    assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("native", [True, False])
def test_muon_iterates_in_what_the_cpu_has(native, monkeypatch):
    """auto is one of the two precisions, to the bit; which one, the CPU's instructions say."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    (matrix,) = parameters((5, 9))
    auto, named = copies([matrix]), copies([matrix])
    for params, dtype in ((auto, "auto"), (named, "bfloat16" if native else "float32")):
        params[0].grad = matrix.detach().clone()
        Muon(params, lr=0.1, ns_dtype=dtype).step()
    assert torch.equal(auto[0], named[0])


def test_muon_says_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"Muon params: expected \[out, in\] or \[E, out, in\], got \[3\]"):
        Muon(parameters((3,)))
    with pytest.raises(ValueError, match="Muon lr: expected at least 0, got -1"):
        Muon(parameters((3, 3)), lr=-1)
    with pytest.raises(
        ValueError, match=r"Muon ns_dtype: expected one of \['auto', 'bfloat16', 'float32'\], got 'half'"
    ):
        Muon(parameters((3, 3)), ns_dtype="half")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.proj, self.router = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        self.experts, self.conv = nn.Parameter(torch.zeros(3, 4, 5)), nn.Conv1d(4, 4, 1)
        self.conv.weight = nn.Parameter(torch.zeros(4, 4))


def deal(model, optimizers):
    """Name -> (optimizer, decay) of every parameter, each exactly once."""
    names, dealt = {p: name for name, p in model.named_parameters()}, {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[p] not in dealt
                dealt[names[p]] = (type(optimizer).__name__, group["weight_decay"])
    assert set(dealt) == set(names.values())
    return dealt


def test_matrices_decay_and_vectors_do_not():
    model = Named()
    decayed = {name for name, (_, decay) in deal(model, adamw(model, **ADAMW)).items() if decay}
    assert decayed == {"embed_tokens.weight", "lm_head.weight", "proj.weight", "router.weight", "experts"}


def test_muon_steps_hidden_matrices_and_adamw_the_rest():
    model = Named()
    dealt = deal(model, muon(model, **MUON, adamw=ADAMW | {"names": ["embed_tokens", "lm_head", "router"]}))
    assert {name for name, (kind, _) in dealt.items() if kind == "Muon"} == {"proj.weight", "experts"}
    assert dealt["conv.weight"] == dealt["proj.bias"] == ("AdamW", 0.0) and dealt["router.weight"] == ("AdamW", 0.1)
    with pytest.raises(ValueError, match="optimizer.adamw.names: expected to leave a matrix to Muon"):
        muon(model, **MUON, adamw=ADAMW | {"names": ["."]})


# Schedules


def test_cosine():
    factor = cosine(100, warmup=0.1, floor=0.2)
    assert [factor(s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert factor(10) == 1.0 and factor(55) == pytest.approx(0.6) and factor(100) == pytest.approx(0.2)
    assert cosine(100, warmup=0, floor=0)(0) == 1.0


def test_warm_up_stay_decay():
    factor = wsd(100, warmup=0.1, decay=0.4, floor=0.1)
    assert [factor(s) for s in (0, 9, 10, 60)] == [0.1, 1.0, 1.0, 1.0]
    assert factor(80) == pytest.approx(0.55) and factor(100) == pytest.approx(0.1)


def test_schedules_without_sense():
    with pytest.raises(ValueError, match="scheduler.warmup: expected 0 to 1, got 2"):
        cosine(10, warmup=2, floor=0)
    with pytest.raises(ValueError, match="scheduler.decay: expected at most 1 - warmup = 0.5, got 0.6"):
        wsd(10, warmup=0.5, decay=0.6, floor=0)


# Runs


def test_a_run_leaves_what_people_expect(tmp_path, capsys):
    folder, often = tmp_path / "run", dict(checkpoint_every=10, keep=2)
    closing = run(folder, picture=True, tensorboard="true", steps=30, sequence_length=64, log_every=1, **often)
    train = [line for line in written(folder) if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 31))
    assert train[0]["bits_per_byte"] == pytest.approx(8, abs=0.3) and train[-1]["bits_per_byte"] < 5
    assert all(line["grad_norm"] > 0 for line in train) and train[-1]["lr"] < 0.2 * max(line["lr"] for line in train)
    assert [line["step"] for line in written(folder) if line["split"] == "validation"] == [4, 8, 12, 16, 20, 24, 28]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000020", "step-00000030"]
    assert list((folder / "tensorboard").iterdir()) and (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "seed: 0" in (folder / "config.yaml").read_text() and "${" not in (folder / "config.yaml").read_text()
    assert (folder / "sample.txt").read_text().startswith("def ")
    out = capsys.readouterr().out
    for fact in ("step 30/30", "bits/byte", "tokens/s", f"{closing['parameters']:,}", "MiB", closing["checkpoint"]):
        assert fact in out
    assert f"{closing['bits_per_byte']:.4f} bits per byte" in out and f"{closing['xz_bits_per_byte']:.4f}" in out


def test_what_only_fills_a_row_is_no_token(tmp_path):
    folder = tmp_path / "run"
    closing = run(folder, steps=30, sequence_length=64, log_every=30)
    documents = stdlib(validation_share=0.2, folder=str(tmp_path / "text")).train
    stream = TrainingBatches(documents, load_tokenizer(None), rows=2, length=64, seed=0, shuffle_buffer=4)
    batches = list(islice(stream, 30))
    read = sum(int((batch.shift_labels != IGNORED).sum()) for batch in batches)
    assert closing["tokens"] == read < sum(batch.input_ids.numel() for batch in batches)
    train = next(line for line in records(folder) if line["split"] == "train")
    assert train["tokens"] == read and train["tokens_per_second"] == pytest.approx(read / closing["seconds"])


def test_bits_per_byte_are_all_nats_over_bytes(tmp_path):
    closing = run(tmp_path / "run", steps=6)
    model = SeqZooForCausalLM.from_pretrained(closing["checkpoint"]).eval()
    validation = stdlib(validation_share=0.2, folder=str(tmp_path / "text")).validation
    line, text = [], b""
    for document, _ in validation.read():
        if len(text) < 600:
            text += document
            line += [256, *document]
    line.append(256)
    nats, length = 0.0, 24
    for row in range(0, len(line) - 1, length):  # each document's part of a row alone, with nothing before it
        begins = [row] + [i for i in range(row + 1, min(row + length, len(line) - 1)) if line[i] == 256]
        for begin, end in zip(begins, [*begins[1:], min(row + length, len(line) - 1)], strict=True):
            piece = torch.tensor(line[begin : end + 1])
            with torch.no_grad():
                logits = model(piece[None, :-1]).logits[0]
            nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
    assert closing["validation_bytes"] == len(text)
    assert closing["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_micro_batches_are_one_batch(tmp_path):
    def numbers(name, **sizes):
        run(tmp_path / name, steps=3, log_every=1, **sizes)
        return [[x for x in line.values() if not isinstance(x, str)] for line in written(tmp_path / name)[:3]]

    one, two = numbers("one", batch_size=4), numbers("two", batch_size=2, accumulate=2)
    assert len(one) == 3 and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(one, two, strict=True))


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that a run made."""
    fit, seen = trainer_module.Trainer.fit, []
    monkeypatch.setattr(trainer_module.Trainer, "fit", lambda self, *rest: seen.append(self) or fit(self, *rest))
    return seen


def learned(folder, *choices, **trainer):
    """A run that learns, whatever was chosen -> its training lines."""
    closing = run(folder, *choices, **dict(steps=20, sequence_length=64, log_every=1) | trainer)
    assert closing["bits_per_byte"] < 6.5
    return [line for line in written(folder) if line["split"] == "train"]


@pytest.mark.parametrize("choice, kinds", [("adamw", ["AdamW"]), ("muon", ["Muon", "AdamW"])])
def test_the_optimizer_is_the_chosen(choice, kinds, tmp_path, trainers):
    learned(tmp_path / "run", f"optimizer={choice}")
    assert [type(optimizer).__name__ for optimizer in trainers[0].optimizers] == kinds
    deal(trainers[0].model, trainers[0].optimizers)  # every parameter once


@pytest.mark.parametrize(
    "choice, factor",
    [
        (["scheduler=cosine", "scheduler.floor=0.5"], cosine(20, warmup=0.02, floor=0.5)),
        (["scheduler=wsd", "scheduler.decay=0.3"], wsd(20, warmup=0.02, decay=0.3, floor=0.0)),
    ],
    ids=["cosine", "wsd"],
)
def test_the_rate_is_the_schedules(choice, factor, tmp_path, trainers):
    lines = learned(tmp_path / "run", *choice, "optimizer=adamw", "optimizer.lr=0.01")
    assert [line["lr"] for line in lines] == [pytest.approx(0.01 * factor(step)) for step in range(20)]
    assert trainers[0].optimizers[0].param_groups[0]["lr"] == lines[-1]["lr"]  # what the last step was made with


def test_bf16_is_near_fp32_and_not_it(tmp_path):
    wide, narrow = (learned(tmp_path / name, f"trainer.precision={name}") for name in ("fp32", "bf16"))
    first = [lines[0]["loss"] for lines in (wide, narrow)]  # of the same weights
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=1e-2)


def test_gradient_checkpointing_computes_the_same_again(tmp_path, trainers, monkeypatch):
    counted = []
    forward = Residual.forward
    monkeypatch.setattr(Residual, "forward", lambda self, *rest: counted.append(self.training) or forward(self, *rest))
    kept, again = (
        learned(tmp_path / f"{choice}", f"trainer.gradient_checkpointing={choice}") for choice in ("false", "true")
    )
    assert [trainer.model.stack.gradient_checkpointing for trainer in trainers] == [False, True]
    assert sum(counted) == 20 + 2 * 20  # one layer, forward and once more on the way back
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in zip(kept, again, strict=True))


class Products(TorchDispatchMode):
    """How many there are inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name().startswith(("aten::mm", "aten::addmm"))
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_keeps_products(tmp_path, trainers):
    """The same gradients to the bit; blocks' products are not made again, which all of them are otherwise."""
    counts, grads = {}, {}
    for how in ("false", "true", "selective"):
        run(tmp_path / how, f"trainer.gradient_checkpointing={how}", steps=1, sample_tokens=0)
        trainer = trainers[-1]
        trainer.model.train()
        torch.manual_seed(0)
        ids = torch.randint(264, (2, 24))
        with Products() as seen:
            trainer.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        counts[how], grads[how] = seen.count, [p.grad for p in trainer.model.parameters()]
    assert counts["selective"] == counts["false"] and counts["true"] >= counts["false"] + 6, counts
    for a, b, c in zip(*grads.values(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(ValueError, match="gradient_checkpointing: expected true, false or selective, got 'some'"):
        run(tmp_path / "wrong", "trainer.gradient_checkpointing=some")


def test_a_run_without_a_sample(tmp_path, capsys):
    run(tmp_path / "run", steps=1, sample_tokens=0)
    assert not (tmp_path / "run" / "sample.txt").exists() and "def " not in capsys.readouterr().out


def test_the_clock_ends_a_run_and_saves_it(tmp_path, monkeypatch):
    clock = [0.0]
    step = trainer_module.Trainer._step

    def slow(self, progress):
        clock[0] += 20.0
        return step(self, progress)

    monkeypatch.setattr(trainer_module.Trainer, "_step", slow)
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: clock[0])
    closing = run(tmp_path / "run", steps=12, max_minutes=1.5)
    assert closing["checkpoint"].endswith("step-00000005")  # the first after 90 s
    assert [line["step"] for line in written(tmp_path / "run") if line["split"] == "final"] == [5]


@pytest.mark.slow
def test_a_compiled_run(tmp_path):
    """Trains, validates and generates, as it does uncompiled. In a process without jaxtyping, which it cannot trace."""
    plain = run(tmp_path / "plain", steps=2)
    command = [sys.executable, "-m", "seqzoo.train", *options(tmp_path / "run", steps=2, compile="true")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "run")[-1]["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-3)
    assert len((tmp_path / "run" / "sample.txt").read_text()) > len("def ")


def test_experts_balance_by_their_biases(tmp_path, trainers):
    run(tmp_path / "run", "++model.channels.moe.bias_update_rate=0.01", model=HYBRID, steps=3)
    for block in trainers[0].model.stack.blocks:
        steps = block.channel.expert_bias / 0.01
        assert steps.abs().max() >= 1 and torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= 3


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_text_files_train(kind, tmp_path):
    documents = [f"document {i} " + "word " * (i % 7) for i in range(60)]
    for name, some in (("train", documents[:50]), ("held_out", documents[50:])):
        file = tmp_path / f"{name}.{kind}"
        if kind == "txt":
            file.write_text("\n".join(some))
        elif kind == "jsonl":
            file.write_text("\n".join(json.dumps({"body": document}) for document in some))
        else:
            pq.write_table(pa.table({"body": some}), file)
    choices = ["data=text", f"data.files={tmp_path}/train.*", f"data.validation_files={tmp_path}/held_out.*"]
    closing = run(tmp_path / "run", *choices, "data.column=body", data=None, steps=20, sequence_length=64)
    size = sum(map(len, documents[50:])) + (9 if kind == "txt" else 0)
    assert closing["bits_per_byte"] < 6.5 and closing["validation_bytes"] == size


def test_a_streamed_data_set_trains(tmp_path):
    (tmp_path / "set").mkdir()
    documents = [f"document {i} " + "word " * (i % 7) for i in range(60)]
    for name, some in (("train", documents[:50]), ("test", documents[50:])):
        (tmp_path / "set" / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in some))
    choices = ["data=hub", f"data.path={tmp_path}/set", "data.validation_split=test"]
    closing = run(tmp_path / "run", *choices, data=None, steps=20, sequence_length=64)
    assert closing["bits_per_byte"] < 6.5 and closing["validation_bytes"] == sum(map(len, documents[50:]))


def test_experts_are_counted_over_the_whole_batch(tmp_path, monkeypatch):
    forward, earlier, counted = SeqZooForCausalLM.forward, [], []

    def listening(self, *inputs, stats=None, **options):
        out = forward(self, *inputs, stats=stats, **options)
        if self.training:
            earlier.append(stats)
            counted.append(out.stats)
        return out

    monkeypatch.setattr(SeqZooForCausalLM, "forward", listening)
    run(tmp_path / "run", model=HYBRID, steps=2, accumulate=3)
    assert len(earlier) == 6 and earlier[0] is earlier[3] is None
    for name, value in earlier[5][0].items():  # the third micro-batch of a step gets what two before it counted
        assert torch.equal(value, counted[3][0][name] + counted[4][0][name]) and not value.requires_grad
    (line,) = (line for line in written(tmp_path / "run") if line["split"] == "train")
    known = {"step", "split", "tokens", "loss", "bits_per_byte", "lr", "grad_norm"}
    assert line.keys() > known and all(math.isfinite(line[name]) for name in line.keys() - {"split"})


@pytest.mark.parametrize(
    "override, error, says",
    [
        ("trainer.step=3", ConfigCompositionException, "trainer.step"),
        ("+trainer.stpes=3", TypeError, "stpes"),
        ("+optimizer.beta=3", TypeError, "beta"),
        ("+data.fold=3", TypeError, "fold"),
        ("model=nothing", MissingConfigException, "model/nothing"),
        ("+model.heads=3", ValueError, "heads"),
        ("trainer.steps=0", ValueError, "trainer.steps: expected at least 1, got 0"),
        ("trainer.precision=fp8", ValueError, "trainer.precision: expected one of"),
        ("trainer.clip=0", ValueError, "trainer.clip: expected a norm above 0 or null, got 0"),
        ("trainer.sample_tokens=-1", ValueError, "trainer.sample_tokens: expected at least 0, got -1"),
        ("trainer.temperature=-0.5", ValueError, "trainer.temperature: expected at least 0, got -0.5"),
        ("trainer.prompt=null", ValueError, "trainer.prompt: expected text, got None"),
        ("trainer.max_minutes=0", ValueError, "trainer.max_minutes: expected minutes above 0 or null, got 0"),
        ("model.max_position_embeddings=23", ValueError, "trainer.sequence_length: expected at most model.max_posi"),
        ("trainer.sample_tokens=20", ValueError, "=24 together with the prompt's 5, got 20"),
        ("trainer.wandb=true", ValueError, "trainer.wandb: expected the package wandb"),
        ("model.vocab_size=250", ValueError, "model.vocab_size: expected at least 257"),
        ("+model.quantisation.k=3", ValueError, "model.quantisation: expected null for a new model"),
        ("data.folder=/nothing", ValueError, "data.folder: expected .py files"),
    ],
)
def test_configurations_that_cannot_be(override, error, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trainer_module.Trainer, "fit", lambda *rest: pytest.fail("training began"))
    with pytest.raises(error) as caught:
        run(tmp_path / "run", "model.max_position_embeddings=24", override)
    assert says in f"{caught.value} {caught.value.__cause__}"


def poison(monkeypatch, steps, name="loss"):
    """Make the loss, or the gradient, of some steps not finite."""
    backward, count = trainer_module.Trainer._backward, [0]

    def poisoned(self, batches):
        stats, sums = backward(self, batches)
        count[0] += 1
        if count[0] in steps and name == "gradient":
            self.params[0].grad.view(-1)[0] = math.inf
        elif count[0] in steps:
            sums = {name: value * math.nan for name, value in sums.items()}
        return stats, sums

    monkeypatch.setattr(trainer_module.Trainer, "_backward", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(what, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 4, 7}, what)
    closing = run(tmp_path / "run", steps=8, log_every=1, max_skips=3)
    out = capsys.readouterr().out
    assert "step 4 skipped" in out and "2 in a row" in out and "step 7 skipped" in out
    assert [line["step"] for line in written(tmp_path / "run") if line["split"] == "train"] == [1, 2, 5, 6, 8]
    assert math.isfinite(closing["bits_per_byte"])


def test_many_such_steps_end_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 100))
    with pytest.raises(RuntimeError, match="3 steps in a row were not finite, the last is 7; .*step-00000003"):
        run(tmp_path / "run", max_skips=3)


# Ends


@pytest.fixture
def heeds_ctrl_c():
    """Python's own handler, which a process that a shell started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_noted_and_the_second_ends(heeds_ctrl_c):
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_log_goes_on_from_its_step(tmp_path):
    lines = [dict(step=s, split="train", loss=1.0) for s in (1, 2, 3)] + [dict(step=2, split="final")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "spl')
    assert len(records(tmp_path)) == 4
    log = Logbook(tmp_path, 2, tensorboard=False, wandb=False, config={})
    log.write("train", 3, loss=2.0)
    log.close()
    assert [(line["step"], line.get("loss")) for line in records(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_sample_cannot_steer_the_terminal(capsys):
    print_sample("a\tb\n\x1b[2Jé\x07")
    assert capsys.readouterr().out == "\na\tb\n\ufffd[2Jé\ufffd\n\n"


def test_several_runs_from_one_command(tmp_path):
    command = [sys.executable, "-m", "seqzoo.train", "-m", *options(tmp_path / "run", steps=2), "seed=1,2"]
    command += [f"hydra.sweep.dir={tmp_path}/sweep"]
    quick = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=quick)
    assert done.returncode == 0, done.stderr
    one, two = written(tmp_path / "sweep" / "0"), written(tmp_path / "sweep" / "1")
    assert [line["split"] for line in one] == ["train", "final"] and one[0]["loss"] != two[0]["loss"]
    for number in ("0", "1"):
        folder = tmp_path / "sweep" / number
        assert f"run_dir: {folder}\n" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_the_exit_code(number, tmp_path):
    command = [sys.executable, "-m", "seqzoo.train", *options(tmp_path / "run", steps=10_000, checkpoint_every=10_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == 128 + number
    assert f"{number.name}: stopped after step" in rest and len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_times_of_a_profile():
    """Of collectives at 0-4 and 6-9 and work at 1-2, 3-7 and 20-30, 2 + 1 + 2 have nothing beside them."""
    exchanges, work = [(6, 9), (0, 3), (2, 4)], [(3, 5), (4, 7), (20, 30), (1, 2)]
    assert union(exchanges) == [(0, 4), (6, 9)] and length(exchanges) == 7
    assert without(exchanges, work) == [(0, 1), (2, 3), (7, 9)]
    assert without(exchanges, []) == union(exchanges) and without([], work) == [] and without(work, work) == []


def test_a_profiled_run(tmp_path, caplog):
    """Steps are those of a run that is not; one process exchanges nothing, and its traces can be read."""
    run(tmp_path / "plain", steps=4)
    run(tmp_path / "seen", steps=4, profile_every=2)
    lines = written(tmp_path / "seen")
    assert [line for line in lines if line["split"] != "profile"] == written(tmp_path / "plain")
    profiles = [line for line in lines if line["split"] == "profile"]
    assert [(x["step"], x["communication"], x["waiting"]) for x in profiles] == [(2, 0.0, 0.0), (4, 0.0, 0.0)]
    for step in (2, 4):
        with gzip.open(tmp_path / "seen" / "traces" / f"step-{step:08d}.rank-00000.json.gz") as file:
            assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])
    with patch("seqzoo.training.profile.Found.save", side_effect=OSError(28, "No space left on device")):
        run(tmp_path / "full", steps=2, profile_every=2)
    assert "no trace of step 2 could be written ([Errno 28]" in caplog.text
    with pytest.raises(ValueError, match="trainer.profile_every: expected at least 1 or null, got 0"):
        run(tmp_path / "other", profile_every=0)


def test_a_spike_is_skipped(tmp_path, capsys):
    """A gradient far beyond those before changes no weight, where that is asked; the mean does not learn from it."""
    norms = iter([1.0] * 22 + [4.0, 9.0] + [1.0] * 6)

    def clip_norm(params, limit):
        torch.nn.utils.clip_grad_norm_(params, limit)
        return torch.tensor(next(norms))

    with patch("seqzoo.training.trainer.clip_norm", clip_norm):
        run(tmp_path / "run", steps=30, skip_spikes=5.0, checkpoint_every=30)
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if " skipped: " in line] == ["step 24 skipped"], said
    with pytest.raises(ValueError, match="trainer.skip_spikes: expected a factor above 1 or null, got 0.5"):
        run(tmp_path / "other", skip_spikes=0.5)
