"""The package as a stranger gets it: built, installed away from the checkout, every module and config there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.resources import files
sys.path.insert(0, sys.argv[1])
import seqzoo
assert seqzoo.__file__.startswith(sys.argv[1]), seqzoo.__file__
names = [m.name for m in pkgutil.walk_packages(seqzoo.__path__, "seqzoo.")]
for name in names:
    importlib.import_module(name)
print(*sorted(names))
from hydra import compose, initialize_config_module
from seqzoo.train import model_config
with initialize_config_module("seqzoo.configs", version_base=None):
    for group in ("model", "data", "optimizer", "scheduler", "trainer"):
        for entry in (files("seqzoo.configs") / group).iterdir():
            cfg = compose("train", [f"{group}={entry.name.removesuffix('.yaml')}"])
            model_config(cfg)
            print(f"{group}/{entry.name}")
"""


@pytest.mark.wheel
def test_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    left = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "__pycache__")  # nothing of an earlier build
    shutil.copytree(ROOT, tmp_path / "source", ignore=left)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("seqzoo-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    out = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, tmp_path / "site"], capture_output=True, text=True, cwd=tmp_path
    )
    assert out.returncode == 0, out.stderr
    found = set(out.stdout.split())
    here = {
        p.relative_to(ROOT)
        for f in ("kernels", "layers", "models", "data", "training")
        for p in ROOT.glob(f"{f}/**/*.py")
    }
    modules = {"seqzoo." + ".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in here}
    assert modules <= found, modules - found
    assert {f"model/{p.name}" for p in ROOT.glob("configs/model/*.yaml")} <= found
    for pattern in ("kernels/**/*.cpp", "kernels/**/*.h", "configs/**/*.yaml"):
        for path in ROOT.glob(pattern):
            assert (tmp_path / "site/seqzoo" / path.relative_to(ROOT)).exists(), f"{path} is not in the wheel"
