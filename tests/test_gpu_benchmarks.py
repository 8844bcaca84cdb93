"""The benchmarks for a GPU: what they compare, what they refuse, what they write; and the roofline's bytes."""

import json
from contextlib import ExitStack

import pytest
import torch

from seqzoo.benchmarks import gpu, gpu_models, gpu_ops, roofline
from seqzoo.benchmarks.decompositions import DECOMPOSITIONS
from seqzoo.benchmarks.gpu_cases import Case
from seqzoo.benchmarks.shapes import Shape
from seqzoo.kernels import gpu as triton_ground

NEEDS_TRITON = pytest.mark.skipif(not triton_ground.usable(), reason="no triton")
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
CPU = torch.device("cpu")


def per_token(op, direction, who, shape):
    """[bytes] Per token and value head."""
    return sum(p.moved for p in DECOMPOSITIONS[op, direction][who](shape)) / (shape.rows * shape.HV)


def test_peers_bytes_are_what_their_sources_say():
    """As many heads of keys as of values, K = V = 128, bf16, per token and head, states at the ends aside."""
    ends = 128 * 128 * 4 / 32768  # one fp32 state a head
    shape = Shape(1, 32768, 8, 8)
    known = {("forward", "least"): 1032, ("forward", "fla"): 4768, ("backward", "least"): 1808}
    for (direction, who), expected in known.items():
        assert per_token("gated_delta_rule", direction, who, shape) == pytest.approx(expected, abs=ends + 1)


def test_floor_is_the_longer_of_bytes_and_products():
    chip = roofline.Chip(memory=100.0, products=10.0)
    assert roofline.floor([roofline.Pass("a", 200, 5), roofline.Pass("b", 10, 30)], chip) == 2.0 + 3.0


@pytest.mark.parametrize("op, direction", DECOMPOSITIONS)
def test_nothing_is_under_the_least(op, direction):
    for shape in roofline.SHAPES.values():
        least, *others = roofline.rows(op, direction, shape, roofline.CHIPS["H200"])
        assert least["who"] == "least" and others
        for row in others:
            assert 0 < row["share"] < 1 and row["bytes_per_token_and_head"] > least["bytes_per_token_and_head"]
            assert row["flops_per_token_and_head"] >= least["flops_per_token_and_head"]


COUNTED = {  # op -> heads of k and heads of v (or, of linear attention, of q)
    "gated_delta_rule": [(1, 1), (1, 2)],
    "linear_attention": [(1, 1), (1, 2)],
    "linear_attention by channel": [(1, 1), (1, 2)],
}


def counted(op, s):
    """Counts of forward and of backward, by kernel, for a call of this shape in fp32."""
    from seqzoo.benchmarks.gpu_cases import SMALL, cases
    from seqzoo.kernels.gpu.traffic import counting

    name = op.split(" ")[0]
    SMALL[name] = {"here": s}
    found = [case for case in cases([name], CPU) if ("channel" in case.label) == ("channel" in op)]
    (call,) = [function for side, function in found[0].sides if side == "seqzoo"]
    leaves = [x.requires_grad_() for x in found[0].inputs.values()]
    with counting() as forward:
        o, last = call(*leaves)
    with counting() as backward:
        torch.autograd.grad([o, last], leaves, [torch.randn_like(o), torch.randn_like(last)])
    return forward, backward


@NEEDS_TRITON
@ON_CPU
@pytest.mark.parametrize("op, heads", [(op, heads) for op, several in COUNTED.items() for heads in several])
def test_our_bytes_and_products_are_the_kernels(op, heads, monkeypatch):
    """Each kernel's bytes, each address once, and its products, as the interpreter counts them."""
    from seqzoo.benchmarks import gpu_cases
    from seqzoo.kernels.gpu.tables import using

    shape = Shape(1, 128, *heads, 32, 64, 4)  # no block is wider than a width
    monkeypatch.setattr(gpu_cases, "SMALL", {})
    scan = {"BV": 64 if heads[0] == heads[1] else 0, "num_warps": 4, "num_stages": 1}  # these three as in bf16
    columns = {"BK": 32, "BV": 64, "num_warps": 4, "num_stages": 1}
    with ExitStack() as tables:
        tables.enter_context(using("gated_delta_rule", "chunk", {"C": 64}))
        tables.enter_context(using("linear_attention", "scan", scan))
        tables.enter_context(using("linear_attention", "channel_gradients", columns))
        for direction, counts in zip(("forward", "backward"), counted(op, shape), strict=True):
            passes = DECOMPOSITIONS[op, direction]["seqzoo"](shape)
            assert [p.name for p in passes] == list(counts)
            for p in passes:
                assert counts[p.name].touched == pytest.approx(p.moved, rel=0.02), (direction, p.name)
                assert counts[p.name].flops == pytest.approx(p.flops), (direction, p.name)


def test_roofline_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "roofline.json"
    command = ["roofline", "--ops", "gated_delta_rule", "--chips", "H200", "A100", "--passes", "--json", str(out)]
    monkeypatch.setattr("sys.argv", command)
    roofline.main()
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "published 0.877 ms" in said and "kkt and solve" in said
    assert {row["chip"] for row in found} == {"H200", "A100"}


def case(**sides):
    x = torch.randn(2, 8, dtype=torch.float32)
    return Case("toy", "2x8", Shape(1, 2, 1, 1, 8, 8), dict(x=x), list(sides.items()))


def test_only_equal_results_are_timed():
    """Values, gradients, and peers that fail: each says why it has no time. Ours must run."""

    class WrongGradient(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: 2 * x)
        backward = staticmethod(lambda ctx, d: 3 * d)

    def fails(x):
        raise RuntimeError("this chip is not known")

    sides = dict(
        seqzoo=lambda x: (2 * x,), equal=lambda x: (x + x,), other=lambda x: (2.1 * x,), fails=fails,
        gradient=lambda x: (WrongGradient.apply(x),), absent="not installed", attention=lambda x: (9 * x,),
    )  # fmt: skip
    row = gpu_ops.measured(case(**sides), CPU, 0.01)
    assert set(row["forward"]) == set(row["backward"]) == {"seqzoo", "equal", "attention"}
    assert row["said"]["other"].startswith("differs by 4.8e-02 in")
    assert row["said"]["gradient"].startswith("differs by 3.3e-01 in dx")
    assert row["said"]["fails"] == "RuntimeError: this chip is not known" and row["said"]["absent"] == "not installed"
    assert row["forward"]["seqzoo"]["low"] <= row["forward"]["seqzoo"]["median"] <= row["forward"]["seqzoo"]["high"]
    with pytest.raises(RuntimeError, match="not known"):
        gpu_ops.measured(case(seqzoo=fails), CPU, 0.01)


@NEEDS_TRITON
@ON_CPU
def test_ops_run_through_the_interpreter(tmp_path, capsys):
    gpu_ops.main(
        ["--device", "cpu", "--ops", "strict_linear_attention", "--seconds", "0", "--out", str(tmp_path / "o")]
    )
    found = json.loads((tmp_path / "o.json").read_text())
    assert set(found["rows"][0]["forward"]) == {"seqzoo", "all pairs in torch"}
    assert (tmp_path / "o.png").stat().st_size > 1000 and "strict_linear_attention" in (tmp_path / "o.md").read_text()
    assert "strict_linear_attention backward" in capsys.readouterr().out


@ON_CPU
def test_models_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_models, "DECODED", 2)
    small = ["--sizes", "small", "--lengths", "32", "--rows", "1", "2"]
    gpu_models.main(["--device", "cpu", *small, "--out", str(tmp_path / "m")])
    found = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["what"] for row in found] == ["train", "decode"]
    assert all(row["tokens_per_second"]["seqzoo"] > 0 and row["apart"] < 0.5 for row in found)


@ON_CPU
def test_without_a_gpu_they_say_so():
    for module in (gpu, gpu_ops, gpu_models):
        with pytest.raises(SystemExit, match="expected a GPU, and torch sees none"):
            module.main([])


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    status, took = gpu.run(["sleep", "30"], 0.2, tmp_path / "log")
    assert status is None and took < 10
    assert gpu.run(["sh", "-c", "echo said; exit 3"], 20, tmp_path / "log")[0] == 3
    assert (tmp_path / "log").read_text() == "said\n"
