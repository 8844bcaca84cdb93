"""Masked loads in Triton kernels say what is there instead. Compiled code leaves it open; the interpreter takes 0."""

import ast

import pytest

from seqzoo.kernels.gpu.tables import KERNELS

FILES = sorted(KERNELS.glob("**/gpu*.py")) + sorted(KERNELS.glob("gpu/*.py"))


def unfilled(source: str) -> list[int]:
    """Lines of masked loads without `other`."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "tl.load"]
    lines = []
    for call in calls:
        names = {keyword.arg for keyword in call.keywords}
        masked = "mask" in names or len(call.args) > 1
        if masked and "other" not in names and len(call.args) < 3:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_masked_loads_are_filled(path):
    assert not unfilled(path.read_text())


def test_an_unfilled_load_is_found():
    assert unfilled("a = tl.load(x, mask=m)\nb = tl.load(x, m)\nc = tl.load(x, mask=m, other=0.0)\nd = tl.load(x)") == [
        1,
        2,
    ]
