"""All that only a GPU shows, in one command of under ten minutes: its tests, then ops and models beside their peers.

    pip install -e '.[dev,gpu]' flash-qla
    python -m seqzoo.benchmarks.gpu --out benchmarks/results/h200

Writes OUT_tests.txt, OUT_ops.{json,md,png}, OUT_models.{json,md} and OUT.json, which says what of it passed and how
long it took. A part that takes longer than its time is stopped; what it had written stays. `--device cpu` goes through
the same parts with small shapes in Triton's interpreter.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from seqzoo.benchmarks.gpu_timing import about

ROOT = Path(__file__).parents[1]
TESTS = ("test_ops.py", "test_small_ops.py", "test_spike.py", "test_ovq.py", "test_expert_mlp.py")
TESTS += ("test_attention_op.py", "test_gpu_*.py")


def parts(out: Path, device: str) -> dict[str, tuple[list[str], float]]:
    """What runs, and how many seconds it may take."""
    cpu = device == "cpu"
    found = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    if cpu:
        tests = ["-k", "triton and gated_delta_rule and no_state", str(ROOT / "tests/test_ops.py")]
    else:
        tests = ["-n", str(min(8, os.cpu_count() or 1)), "-m", "not wheel and not slow", "-k", "triton or fla or gpu"]
        tests += found
    module = lambda name: [sys.executable, "-m", f"seqzoo.benchmarks.{name}", "--device", device]
    models = ["--sizes", "small", "--lengths", "64", "--rows", "1", "1"] if cpu else []
    return {
        "tests": ([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], 250),
        "ops": ([*module("gpu_ops"), "--out", f"{out}_ops"], 190),
        "models": ([*module("gpu_models"), "--out", f"{out}_models", *models], 130),
    }


def run(command: list[str], seconds: float, log: Path | None) -> tuple[int | None, float]:
    """The exit status (None: stopped) and the time it took; output goes to the screen, and to a log if there is one."""
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE if log else None, text=True) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            said, _ = process.communicate()
            return None, time.monotonic() - start
        finally:
            if log:
                log.write_text(said or "")
                print((said or "")[-2000:])
    return process.returncode, time.monotonic() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=["tests", "ops", "models"], default=["tests", "ops", "models"])
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu: expected a GPU, and torch sees none; --device cpu goes through the parts without one")
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    out = args.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    for name, (command, seconds) in parts(out, args.device).items():
        if name not in args.parts:
            continue
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        status, took = run(command, seconds, Path(f"{out}_tests.txt") if name == "tests" else None)
        done[name] = dict(passed=status == 0, status=status, seconds=round(took, 1))
        out.with_suffix(".json").write_text(
            json.dumps(dict(about=about(torch.device(args.device)), parts=done), indent=1)
        )
    for name, part in done.items():
        how = "passed" if part["passed"] else "stopped" if part["status"] is None else f"failed ({part['status']})"
        print(f"{name}: {how} after {part['seconds']:.0f} s")
    return 0 if all(part["passed"] for part in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
