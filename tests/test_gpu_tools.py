"""The tools for Triton kernels: launches, tuned tables, the compiler's report, tuning, counted bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.kernels import gpu
from seqzoo.kernels.gpu import examples, report, tables, tune

pytestmark = pytest.mark.skipif(not gpu.usable(), reason="no triton")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
ROWS = {
    "forward": {
        "space": {"BLOCK": [16, 32]},
        "sm_90": [
            {"upto": {"K": 64}, "products": "bf16", "BLOCK": 32, "num_warps": 2},
            {"upto": {"K": 64}, "products": "tf32", "BLOCK": 16, "num_warps": 2},
            {"upto": {"K": 256}, "BLOCK": 64, "num_warps": 4},
        ],
    }
}


def compiling(*arguments):
    """What Python prints in a process that has no interpreter for kernels."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [clean.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def toy(monkeypatch):
    """An op "toy" that has a table, and a call of its kernel."""
    import toy_kernels

    monkeypatch.setattr(tables, "table", lambda op: ROWS)

    def call(x):
        y = torch.empty_like(x)
        config = gpu.tuned("toy", "forward", x.device, x.dtype, K=x.shape[-1])
        blocks = -(-x.numel() // config["BLOCK"])
        gpu.launch(toy_kernels.scale, (blocks,), x, y, x.numel(), **config)
        return y

    return call


@INTERPRETED
def test_runs_or_records(toy):
    x = torch.randn(3, 25)
    assert torch.equal(toy(x), 2 * x)
    with gpu.recording() as launches:
        toy(torch.empty(3, 25, device="meta"))
        toy(torch.empty(3, 200, device="meta"))
    assert [this.grid for this in launches] == [(5,), (10,)]
    assert launches[1].constants == dict(BLOCK=64, num_warps=4)


def test_tables_answer_by_width_and_dtype(toy):
    cpu = torch.device("cpu")
    assert gpu.tuned("toy", "forward", cpu, torch.bfloat16, K=64) == dict(BLOCK=32, num_warps=2)
    assert gpu.tuned("toy", "forward", cpu, torch.float16, K=64) == dict(BLOCK=16, num_warps=2)
    assert gpu.tuned("toy", "forward", cpu, torch.bfloat16, K=65) == dict(BLOCK=64, num_warps=4)
    with pytest.raises(ValueError, match="toy: backend triton on sm_90: expected at most {'K': 256}, got {'K': 257}"):
        gpu.tuned("toy", "forward", cpu, torch.bfloat16, K=257)
    with tables.using("toy", "forward", dict(BLOCK=1)):
        assert gpu.tuned("toy", "forward", cpu, torch.bfloat16, K=64) == dict(BLOCK=1)
    with pytest.raises(ValueError, match="for_arch: expected one of sm_80, .*, got 'sm_70'"), gpu.for_arch("sm_70"):
        pass


ALL_JOBS = """
import json
from seqzoo.kernels.gpu import examples, report, tables
print(json.dumps({
    f"{op} {arch}": [len(found), unused]
    for op in examples.ops() for arch in tables.ARCHES for found, unused in [report.jobs(op, arch)]
}))
"""


def test_every_row_is_reached():
    """Every op has a table for every architecture, each row of which some example uses; and no storm of kernels."""
    found = json.loads(compiling("-c", ALL_JOBS))
    assert len(found) == len(examples.ops()) * len(tables.ARCHES)
    for name, (kernels, unused) in found.items():
        assert not unused and 0 < kernels <= 120, (name, kernels, unused)


@pytest.mark.parametrize("op", [op for op in examples.ops() if (tables.KERNELS / op / "tuned.json").exists()])
def test_tables_are_as_the_tuner_writes_them(op):
    text = (tables.KERNELS / op / "tuned.json").read_text()
    for kernel, rows in json.loads(text).items():
        assert set(rows) - {"space"} == set(tables.ARCHES), kernel
    assert text == tune.written(json.loads(text))


def test_the_report_finds_what_is_planted():
    """Compiled in earnest, for a GPU that is not there."""
    found = json.loads(compiling(Path(__file__).parent / "compile_toys.py"))
    assert found["plain"]["units"] == "-" and found["plain"]["registers"] > 0 and not found["plain"]["error"]
    assert found["products"]["units"].startswith("wgmma") and found["products"]["shared"] >= 2 * 64 * 64
    assert any("spills" in fault for fault in found["too wide"])
    assert any("shared memory, the chip has 232448" in fault for fault in found["too wide"])
    assert any("CompilationError" in fault for fault in found["too small"])
    assert found["undone"] == ["1 products do not reach the matrix units"]


def test_the_report_builds_what_it_does_not_know(monkeypatch, tmp_path, capsys):
    """Rows in a file are taken as they are; one that comes out otherwise when built again, or is stale, is found."""
    from concurrent.futures import ThreadPoolExecutor

    job = report.Job("toy", "example", "toy_kernels", "scale", "sm_90", {}, {}, (), {})
    work, built = [job, job._replace(arch="sm_80")], []

    def build(job):
        built.append(job.arch)
        return report.Built(job.op, job.example, job.kernel, job.arch, {}, 30, 0, 64, "-", 0)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(report, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(report, "jobs", lambda op, arch: ([job for job in work if job.arch == arch], []))
    monkeypatch.setattr(report, "key", lambda job: f"key of {job.arch}")
    monkeypatch.setattr(report, "build", build)
    op, file = examples.ops()[0], tmp_path / "known.json"
    command = ["--ops", op, "--arches", "sm_80", "sm_90", "--workers", "1", "--known", str(file)]
    assert report.main(command) == 0 and built == ["sm_80", "sm_90"]
    assert report.main(command) == 0 and len(built) == 2
    assert report.main([*command, "--again", "2"]) == 0 and len(built) == 4
    told = json.loads(file.read_text())
    told["key of sm_90"]["registers"] = 29
    file.write_text(json.dumps(told | {"key of old": told["key of sm_80"] | {"op": op}}))
    assert report.main([*command, "--again", "2"]) == 1
    assert "1 faults\ntoy: scale sm_90: now Built(" in capsys.readouterr().out
    assert set(json.loads(file.read_text())) == {"key of sm_80", "key of sm_90"}


def test_the_report_wants_real_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="report: TRITON_INTERPRET is set"):
        report.main([])


def test_a_launch_without_a_constant_is_said(toy):
    import toy_kernels

    with gpu.recording() as launches:
        gpu.launch(toy_kernels.scale, (1,), torch.empty(4, device="meta"), torch.empty(4, device="meta"), 4)
    with pytest.raises(ValueError, match="toy: scale is started without BLOCK"):
        report.described("toy", "example", "sm_90", launches[0])


@INTERPRETED
def test_tuning_takes_the_fastest_that_is_right(toy, monkeypatch, capsys):
    """A configuration with other results loses, however fast; so does one that cannot run."""
    x = torch.randn(8, 16)

    def call():
        config = gpu.tuned("toy", "forward", x.device, x.dtype, K=16)
        if config["BLOCK"] == 7:
            raise RuntimeError("no such block")
        return toy(x) + (config["BLOCK"] == 8)

    took = {16: 3.0, 8: 1.0, 32: 2.0}

    def seconds(call, device, rounds):
        return took[gpu.tuned("toy", "forward", x.device, x.dtype, K=16)["BLOCK"]]

    monkeypatch.setattr(tune, "seconds", seconds)
    row, space = ROWS["forward"]["sm_90"][1], {"BLOCK": [7, 8, 32]}
    best = tune.best("toy", "forward", row, space, [("example", call)], x.device, 1)
    assert best == {"upto": {"K": 64}, "products": "tf32", "BLOCK": 32, "num_warps": 2}
    said = capsys.readouterr().out
    assert "BLOCK=7 num_warps=2: RuntimeError: no such block" in said
    assert "BLOCK=8 num_warps=2: other results" in said and "1.50 times as fast" in said


@INTERPRETED
def test_bytes_are_counted(toy):
    """Once per load, and once per address; masked elements not at all."""
    import toy_kernels
    import triton.language as tl

    from seqzoo.kernels.gpu.traffic import counting

    x, square = torch.randn(3, 25), torch.randn(16, 16)
    with counting() as counts:
        toy(x)
        out = torch.empty(16, 16)
        gpu.launch(toy_kernels.product, (2,), square, square, out, N=16, DOT=tl.float32)
    assert torch.equal(out, square @ square) or torch.allclose(out, square @ square, atol=1e-5)
    scale, product = counts["scale"], counts["product"]
    assert (scale.launches, scale.programs, scale.loaded, scale.stored, scale.flops) == (1, 5, 300, 300, 0)
    assert (product.loaded, product.stored, product.flops) == (4 * 1024, 2 * 1024, 2 * 2 * 16**3)
    assert product.touched == 1024 + 1024  # the same block read four times, another written twice
