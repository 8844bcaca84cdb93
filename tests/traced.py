"""What torch.compile makes of the code: tried in a process of its own, without the type checks of tests, which cannot
be traced, and where nothing has run before."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def passes(code: str, *arguments: str) -> None:
    """Run it there, from this folder: what it raises is the failure's message."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def agrees(run: Callable[..., Tensor], leaves: list[Tensor], *, fullgraph: bool = True) -> None:
    """There: the number that `run` makes of the leaves, traced, is what it makes of them otherwise; gradients too."""
    traced, direct = torch.compile(run, backend="aot_eager", fullgraph=fullgraph)(*leaves), run(*leaves)
    torch.testing.assert_close(traced, direct)
    if direct.requires_grad:
        torch.testing.assert_close(torch.autograd.grad(traced, leaves), torch.autograd.grad(direct, leaves))
