"""The benchmarks for a GPU: what they compare, what they refuse, what they write."""

import json

import pytest
import torch

from seqzoo.benchmarks import gpu, gpu_models, gpu_ops
from seqzoo.benchmarks.gpu_cases import Case
from seqzoo.benchmarks.shapes import Shape
from seqzoo.kernels import gpu as triton_ground

NEEDS_TRITON = pytest.mark.skipif(not triton_ground.usable(), reason="no triton")
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
CPU = torch.device("cpu")


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
