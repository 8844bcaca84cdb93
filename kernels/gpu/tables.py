"""Tuned configurations: how big a kernel's blocks are, by architecture and shape class. Nothing is tuned at run time.

Each op's folder has a `tuned.json`: kernel -> architecture -> rows, the first that fits a call is its configuration:

    {"forward": {"sm_90": [
        {"upto": {"K": 128, "V": 128}, "products": "bf16", "BV": 64, "num_warps": 4, "num_stages": 2}
    ]}}

`python -m seqzoo.kernels.gpu.tune` measures them anew on the GPU it runs on.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).parent.parent
ARCHES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")  # that the tables know
SHARED = dict(sm_80=163, sm_86=99, sm_90=227, sm_100=227, gfx942=64)  # KiB a program may have
MULTIPROCESSORS = dict(sm_80=108, sm_86=84, sm_90=132, sm_100=148, gfx942=304)  # of the largest chip of its kind
_arch: str | None = None  # in place of the device's own
_instead: dict[tuple[str, str], dict[str, Any]] = {}  # (op, kernel) -> a configuration in place of the table's
_asked: list[tuple[str, str, str, int]] | None = None  # where lookups are gathered


@cache
def _of_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "gfx942"  # the one of AMD's that has tables; its shared memory is the smallest of its kind
    capability = properties.major * 10 + properties.minor
    if capability in (80, 87):
        return "sm_80"
    if capability // 10 == 9:
        return "sm_90"
    return "sm_100" if capability // 10 == 10 else "sm_86"  # the rest have a consumer card's shared memory


def arch(device: torch.device) -> str:
    """The architecture whose tables a device uses; of the interpreter, and of the meta device, sm_90."""
    if _arch is not None:
        return _arch
    if device.type != "cuda":
        return "sm_90"
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def for_arch(name: str) -> Iterator[None]:
    """Inside the block all devices are of this architecture."""
    global _arch
    if name not in ARCHES:
        raise ValueError(f"for_arch: expected one of {', '.join(ARCHES)}, got {name!r}")
    before, _arch = _arch, name
    try:
        yield
    finally:
        _arch = before


@contextmanager
def using(op: str, kernel: str, config: dict[str, Any]) -> Iterator[None]:
    """Inside the block this kernel has this configuration, whatever its table says."""
    before = _instead.get((op, kernel))
    _instead[op, kernel] = config
    try:
        yield
    finally:
        del _instead[op, kernel]
        if before is not None:
            _instead[op, kernel] = before


@contextmanager
def asking() -> Iterator[list[tuple[str, str, str, int]]]:
    """Gathers (op, kernel, architecture, row) of all lookups inside the block."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


@cache
def table(op: str) -> dict[str, dict[str, Any]]:
    """What the op's tuned.json says."""
    return json.loads((KERNELS / op / "tuned.json").read_text())


def tuned(op: str, kernel: str, device: torch.device, dtype: torch.dtype, **widths: int) -> dict[str, Any]:
    """The configuration of a kernel for a call.

    Args:
        op: the folder's name.
        kernel: a name in its table.
        device, dtype: of the inputs. float32 and float16 are multiplied as tf32 and have rows of their own.
        widths: of the call, by the names in the table's `upto`, as K and V.

    Returns:
        Blocks, num_warps, num_stages: what the table's row holds beside its conditions.

    Raises:
        ValueError: wider than any row.
    """
    if (op, kernel) in _instead:
        return _instead[op, kernel]
    kind, name = "bf16" if dtype == torch.bfloat16 else "tf32", arch(device)
    for n, row in enumerate(rows := table(op)[kernel][name]):
        if row.get("products", kind) == kind and all(widths[w] <= most for w, most in row["upto"].items()):
            if _asked is not None:
                _asked.append((op, kernel, name, n))
            return {key: value for key, value in row.items() if key not in ("upto", "products")}
    most = {w: max(row["upto"][w] for row in rows) for w in rows[0]["upto"]}
    raise ValueError(f"{op}: backend triton on {name}: expected at most {most}, got {widths}")
