"""Experiments: each leaves its table, its JSON and its picture; what is asked is what is answered."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from runs import one_thread

from seqzoo.experiments import attacks, recall, tasks
from seqzoo.experiments.cells import run_cells
from seqzoo.experiments.learn import answers
from seqzoo.experiments.probe import Probe
from seqzoo.experiments.report import CONFIGS, cells_of, settings
from seqzoo.layers.registry import kinds
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM

EXPERIMENTS = sorted(path.stem for path in Path(CONFIGS).glob("*.yaml"))
ATTENTION = dict(kind="attention", num_heads=1, num_kv_heads=1, head_width=8)


def config(name, *overrides):
    with initialize_config_dir(CONFIGS, version_base=None):
        return compose(name, overrides=["smoke=true", *overrides])


def smoke(name, folder, *overrides):
    with one_thread():
        return import_module(f"seqzoo.experiments.{name}").run(config(name, f"small.out={folder}", *overrides))


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_leaves_table_json_and_picture(name, tmp_path):
    smoke(name, tmp_path)
    text, found = (tmp_path / f"{name}.md").read_text(), json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "|---|" in text and f"python -m seqzoo.experiments.{name}" in text
    assert {"command", "seeds", "machine", "date", "cells"} <= found.keys()
    assert found["cells"] and all({"given", "result"} == cell.keys() for cell in found["cells"].values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_wrong_config_raises(name, tmp_path):
    with pytest.raises(ValueError, match="only"):
        smoke(name, tmp_path, "small.only=[nothing]")
    with pytest.raises(ValueError, match="seeds"):
        smoke(name, tmp_path, "small.seeds=[]")
    with pytest.raises(ConfigCompositionException):
        config(name, "stepz=3")


def test_recall_knows_every_mixer():
    """A new mixer is a row of the experiment."""
    with initialize_config_dir(CONFIGS, version_base=None):
        asked = compose("recall").models
    assert set(kinds("mixers")) <= set(kinds_in(asked))


def kinds_in(spec):
    if hasattr(spec, "values"):
        yield from [spec["kind"]] if "kind" in spec else []
        for part in spec.values():
            yield from kinds_in(part)


# Cells


def test_a_cell_runs_once(tmp_path):
    ran, path = [], tmp_path / "cells.json"

    def square(x):
        ran.append(x)
        return {"is": x * x}

    run_cells(square, {"a": {"x": 2}}, path, workers=0)
    cells = {"a": {"x": 2}, "b": {"x": 3}}
    assert run_cells(square, cells, path, workers=0) == {"a": {"is": 4}, "b": {"is": 9}}
    assert ran == [2, 3]
    assert run_cells(square, {"a": {"x": 5}}, path, workers=0, keep_others=True) == {"a": {"is": 25}}
    assert json.loads(path.read_text())["cells"].keys() == {"a", "b"}
    assert run_cells(square, {"a": {"x": 5}}, path, workers=0) == {"a": {"is": 25}}
    assert json.loads(path.read_text())["cells"].keys() == {"a"}
    assert ran == [2, 3, 5]


def test_what_ran_before_a_failure_is_kept(tmp_path):
    path = tmp_path / "cells.json"
    with pytest.raises(ZeroDivisionError):
        run_cells(lambda x: {"is": 1 / x}, {"a": {"x": 1}, "b": {"x": 0}}, path, workers=0)
    assert json.loads(path.read_text())["cells"].keys() == {"a"}


def test_workers_find_what_this_process_finds(tmp_path):
    name, given = next(iter(cells_of(settings(config("recall"))).items()))
    with one_thread():
        here = run_cells(recall.cell, {name: given}, tmp_path / "here.json", workers=0)[name]
    there = run_cells(recall.cell, {name: given}, tmp_path / "there.json", workers=1)[name]
    assert here["seen"] and {**here, "seconds": 0} == {**there, "seconds": 0}


# Tasks


def test_recall_asks_every_key_once_for_its_value():
    ids, targets = tasks.recall(5, 6, 40, 64, power=0.5, generator=generator())
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(row[0:12:2], row[1:12:2], strict=True))
        places = [i for i, target in enumerate(asked) if target >= 0]
        assert len(value_of) == 6 and sorted(row[i] for i in places) == sorted(value_of)
        assert min(places) >= 12 and all(i % 2 == 0 for i in places)
        assert all(asked[i] == value_of[row[i]] == row[i + 1] for i in places)
        assert all(0 < key < 32 <= value for key, value in value_of.items())


def test_recall_asks_most_keys_soon():
    even, soon = (
        (tasks.recall(200, 4, 160, 64, power=power, generator=generator())[1] >= 0).nonzero()[:, 1].double().mean()
        for power in (1.0, 0.01)
    )
    assert soon < even - 20


def test_stream_asks_every_key_at_its_age():
    ids, targets, age = tasks.stream(5, 7, 64, generator=generator())
    for row, asked, old in zip(ids.tolist(), targets.tolist(), age.tolist(), strict=True):
        places = [i for i, target in enumerate(asked) if target >= 0]
        assert len({row[i] for i in places}) == len(places) == 7
        for i in places:
            assert row.index(row[i]) == i - old[i] and row[i - old[i] + 1] == asked[i] == row[i + 1]
        assert all((a == 0) == (target < 0) for a, target in zip(old, asked, strict=True))


def test_repeat_asks_what_followed_and_not_at_one_distance():
    ids, targets = tasks.repeat(40, 5, 9, generator=generator())
    assert ids.shape == (40, 9) and (ids > 0).all() and (targets[:, :5] == -1).all()
    distances = set()
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        assert len(set(row[:5])) == 5
        distances.add(5 - row.index(row[5]))
        for token, target in zip(row[5:], asked[5:], strict=True):
            first = row.index(token)
            assert target == (-1 if first == 4 else row[first + 1])
    assert distances == {1, 2, 3, 4, 5}


def test_apart_puts_nothing_between():
    ids, targets = tasks.repeat(3, 5, 9, generator=generator())
    wide, asked = tasks.apart(ids, targets, 3)
    assert wide.shape == (3, 27) and not wide[:, 1::3].any() and not wide[:, 2::3].any()
    assert (
        (wide[:, ::3] == ids).all() and (asked[:, ::3] == targets).all() and (asked >= 0).sum() == (targets >= 0).sum()
    )


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: tasks.recall(1, 4, 14, 64, power=1.0, generator=generator()), "tokens: expected .* 16, got 14"),
        (lambda: tasks.recall(1, 4, 17, 64, power=1.0, generator=generator()), "tokens: expected .* 16, got 17"),
        (lambda: tasks.stream(1, 32, 64, generator=generator()), "pairs: expected at most .* 31, got 32"),
        (lambda: tasks.repeat(1, 10, 9, generator=generator()), "length: expected at most .* 8, got 10"),
        (lambda: Probe(hidden_size=8, vocab_size=8, layers=["b"], mixers={"a": ATTENTION}), r"\['a'\], got 'b'"),
    ],
)
def test_what_cannot_be_raises(draw, named):
    with pytest.raises(ValueError, match=named):
        draw()


# The probe


def test_probe_sees_nothing_of_what_comes():
    probe = Probe(hidden_size=16, vocab_size=32, layers=["a", "a"], mixers={"a": ATTENTION}, conv_width=3)
    ids = torch.randint(32, (2, 9))
    changed = ids.clone()
    changed[:, 6:] = 31 - changed[:, 6:]
    assert len(list(probe.layers)) == 2 and probe.layers[0] is not probe.layers[1]
    torch.testing.assert_close(probe(ids)[:, :6], probe(changed)[:, :6])
    assert not torch.allclose(probe(ids)[:, 6:], probe(changed)[:, 6:])


def test_answers_are_of_what_is_asked():
    probe = Probe(hidden_size=16, vocab_size=32, layers=["a"], mixers={"a": ATTENTION})
    ids = torch.randint(32, (3, 7))
    targets = probe(ids).argmax(-1)
    asked = torch.rand(3, 7) < 0.5
    targets = torch.where(asked, targets, -1)
    assert answers(probe, (ids, targets)).all() and len(answers(probe, (ids, targets))) == asked.sum()
    assert not answers(probe, (ids, torch.where(asked, (targets + 1) % 32, -1))).any()


# Attacks


@pytest.fixture
def victim():
    """A small model, and windows with a mark at the beginning of each."""
    parts = dict(mixers={"a": ATTENTION}, channels={"c": dict(kind="swiglu", width=24)})
    model = SeqZooForCausalLM(SeqZooConfig(16, 264, 2, pattern=["a/c"], initializer_range=0.3, **parts))
    ids = torch.randint(97, 123, (3, 13))
    ids[:, 0] = 257
    windows = attacks.Windows(ids[:, :-1], torch.arange(12).expand(3, -1), ids[:, 1:].clone())
    windows.targets[0, 5] = -100
    return model.eval().requires_grad_(False), windows


def test_bits_are_of_what_is_to_be_predicted(victim):
    model, windows = victim
    logits = model(windows.ids).logits.log_softmax(-1)
    nats = [-logits[0, t, windows.targets[0, t]] for t in range(12) if t != 5]
    assert attacks.clean(model, windows)[0].item() == pytest.approx(sum(nats).item() / 11 / 0.693147, rel=1e-5)


def test_climbing_is_worse_than_a_step_and_that_than_chance(victim):
    model, windows = victim
    size = 0.1
    chance = attacks.noise(model, windows, size, draws=4, generator=generator())
    step, climbed = (
        attacks.fgsm(model, windows, size), attacks.pgd(model, windows, size, steps=10, generator=generator()),
    )  # fmt: skip
    assert (attacks.clean(model, windows) < step).all() and (chance < step).all() and (step < climbed).all()


@pytest.mark.parametrize("attack", ["noise", "fgsm", "pgd"])
def test_embeddings_change_by_what_is_allowed(victim, attack, monkeypatch):
    model, windows = victim
    options = dict(noise=dict(draws=2), fgsm={}, pgd=dict(steps=3))[attack]
    options |= {} if attack == "fgsm" else dict(generator=generator())
    clean, seen, bits = model.embed_tokens(windows.ids), [], attacks.bits
    monkeypatch.setattr(attacks, "bits", lambda m, w, embeds: seen.append(embeds.detach()) or bits(m, w, embeds))
    getattr(attacks, attack)(model, windows, 0.2, **options)
    most = 0.2 * clean.square().mean().sqrt()
    furthest = torch.stack([(embeds - clean).abs().max() for embeds in seen])
    torch.testing.assert_close(furthest.max(), most)
    assert (furthest <= most * 1.0001).all()


@pytest.mark.parametrize("propose", [attacks.guided(5), attacks.blind(5, generator())], ids=["guided", "blind"])
def test_swaps_are_of_so_many_bytes_and_no_marks(victim, propose):
    model, windows = victim
    seen = []
    watched = lambda m, w, ids, free: seen.append(ids.clone()) or propose(m, w, ids, free)
    found = attacks.swaps(model, windows, [2, 11], watched)
    for count, ids in enumerate(seen):
        assert ((ids != windows.ids).sum(1) == count).all() and (ids[:, 0] == 257).all()
        assert set(ids[:, 1:].unique().tolist()) <= set(windows.alphabet().tolist())
    assert found.keys() == {2, 11} and len(seen) == 11
    with pytest.raises(ValueError, match="swaps: expected at most 11, the bytes of a window, got 12"):
        attacks.swaps(model, windows, [12], propose)


def test_what_is_proposed_is_worse_than_what_is_drawn(victim):
    model, windows = victim
    ways = attacks.guided(4), attacks.blind(4, generator()), attacks.blind(1, generator())
    guided, drawn, chance = (attacks.swaps(model, windows, [4], way)[4].mean() for way in ways)
    assert guided > drawn > chance


def test_proposed_is_where_the_gradient_promises_most(victim):
    """Against each swap's own slope: the change of the embedding times the gradient."""
    model, windows = victim
    free = windows.ids < attacks.BYTES
    places, new = attacks.guided(3)(model, windows, windows.ids, free)
    embeds = model.embed_tokens(windows.ids).requires_grad_()
    slope = torch.autograd.grad(attacks.bits(model, windows, embeds).sum(), embeds)[0]
    for row in range(3):
        promise = {}
        for place in range(1, 12):
            rises = {b: (model.embed_tokens.weight[b] - embeds[row, place]) @ slope[row, place]
                     for b in windows.alphabet().tolist() if b != windows.ids[row, place]}  # fmt: skip
            best = max(rises, key=rises.get)
            promise[place] = rises[best].item(), best
        wanted = sorted(promise, key=lambda place: -promise[place][0])[:3]
        assert places[row].tolist() == wanted and new[row].tolist() == [promise[place][1] for place in wanted]
