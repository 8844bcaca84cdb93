"""The roofline: each of our kernels' bytes and products as the interpreter counts them, and what is made of them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from roofline_rows import ROWS, Calls

from seqzoo.benchmarks import roofline
from seqzoo.benchmarks.decompositions import MODELS
from seqzoo.benchmarks.shapes import Shape
from seqzoo.kernels import gpu as triton_ground

NEEDS_TRITON = pytest.mark.skipif(not triton_ground.usable(), reason="no triton")
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")


def counted(calls: Calls) -> Iterator[tuple[str, dict]]:
    """Of each direction its kernels' counts, by name."""
    from seqzoo.kernels.gpu.traffic import counting

    for direction, call in calls:
        with counting() as counts:
            call()
        yield direction, counts


@NEEDS_TRITON
@ON_CPU
@pytest.mark.parametrize("row, shape", [pytest.param(r, s, id=f"{r.op} {r.who} {s}") for r in ROWS for s in r.shapes])
def test_bytes_and_products_are_the_kernels(row, shape):
    """Each kernel's bytes, each address once, and its products; what torch's own kernels do is not counted."""
    from seqzoo.kernels.gpu.tables import using

    with ExitStack() as tables:
        for table in row.tables(shape):
            tables.enter_context(using(*table))
        found = dict(counted(row.calls(shape)))
    assert tuple(found) == row.directions
    for direction, counts in found.items():
        passes = [p for p in MODELS[row.op, direction].sides[row.who](shape) if not p.name.startswith("torch ")]
        assert list(dict.fromkeys(p.name for p in passes)) == list(counts)
        for name, traffic in counts.items():
            moved, flops = (sum(p[n] for p in passes if p.name == name) for n in (1, 2))
            assert traffic.touched == pytest.approx(moved, rel=1e-3), (direction, name)
            assert traffic.flops == pytest.approx(flops), (direction, name)


@NEEDS_TRITON
@pytest.mark.parametrize("label, s", MODELS["rms_norm", "backward"].shapes.items())
def test_a_norm_has_a_share_for_each_program(label, s):
    """At full size, where a program has several blocks; nothing is run."""
    from seqzoo.kernels.gpu import recording
    from seqzoo.kernels.rms_norm.gpu import backward

    x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((s.n, s.W), (s.W,)))
    with recording() as launches:
        backward(x, None, weight, x, 1e-6, 0.0)
    ((programs,),) = [launch.grid for launch in launches]
    assert 0 < programs < s.n
    moved = MODELS["rms_norm", "backward"].sides["seqzoo"](s)[0].moved
    assert moved == 3 * s.all + s.W * (2 + 4 * programs)


def test_every_model_is_held_against_its_kernels():
    assert {(row.op, direction) for row in ROWS for direction in row.directions} == set(MODELS)


def per_unit(op, direction, who, shape):
    """[bytes]"""
    model = MODELS[op, direction]
    return sum(p.moved for p in model.sides[who](shape)) / model.units(shape)


def test_peers_bytes_are_what_their_sources_say():
    """As many heads of keys as of values, K = V = 128, bf16, per token and head, states at the ends aside."""
    ends = 128 * 128 * 4 / 32768  # one fp32 state a head
    shape = Shape(1, 32768, 8, 8)
    known = {("forward", "least"): 1032, ("forward", "fla"): 4768, ("backward", "least"): 1808}
    for (direction, who), expected in known.items():
        assert per_unit("gated_delta_rule", direction, who, shape) == pytest.approx(expected, abs=ends + 1)


def test_floor_is_the_longer_of_bytes_and_products():
    chip = roofline.Chip(memory=100.0, products=10.0)
    assert roofline.floor([roofline.Pass("a", 200, 5), roofline.Pass("b", 10, 30)], chip) == 2.0 + 3.0


@pytest.mark.parametrize("model", [pytest.param(model, id=" ".join(name)) for name, model in MODELS.items()])
def test_nothing_is_under_the_least(model):
    for shape in model.shapes.values():
        least, *others = roofline.rows(model, shape, roofline.CHIPS["H200"])
        assert least["who"] == "least" and others[0]["who"] == "seqzoo"
        for row in others:
            assert 0 < row["share"] < 1 + 1e-9 and row["bytes_per_unit"] >= least["bytes_per_unit"]
            assert row["flops_per_unit"] >= least["flops_per_unit"]


def test_published_times_are_of_shapes_and_sides_that_are_there():
    for model in MODELS.values():
        assert set(model.published) <= set(model.shapes)
        assert all(set(times) <= set(model.sides) for times in model.published.values())


def test_roofline_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "roofline.json"
    command = ["roofline", "--ops", "gated_delta_rule", "--chips", "H200", "A100", "--passes", "--json", str(out)]
    monkeypatch.setattr("sys.argv", command)
    roofline.main()
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "published 0.877 ms" in said and "kkt and solve" in said
    assert {row["chip"] for row in found} == {"H200", "A100"}
