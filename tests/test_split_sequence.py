"""A sequence split over processes: outputs and gradients of every mixer and block, and of models, are those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BLOCKS, MIXERS

from seqzoo.kernels import across
from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.kernels.short_conv import short_conv

WORKER = Path(__file__).parent / "split_worker.py"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_what_one_does(ranks, tmp_path):
    """In fp64: whole sequences and packed documents, sinks, activation checkpointing; `split_worker.py` has it all."""
    command = [sys.executable, str(WORKER), str(tmp_path)]
    here = os.environ | {"OMP_NUM_THREADS": "1"}
    how = dict(env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    workers = [subprocess.Popen([*command, str(rank), str(ranks)], **how) for rank in range(ranks)]
    for worker in workers:
        said, _ = worker.communicate(timeout=150)
        assert worker.returncode == 0, said
        assert f"{len(MIXERS) + len(BLOCKS) + 3} checks" in said


def test_what_cannot_be_split(monkeypatch):
    monkeypatch.setattr(across, "_split", across.Ranks(None, 0, 2))
    q, g = torch.randn(1, 4, 1, 2), torch.zeros(1, 4, 1)
    with pytest.raises(ValueError, match="gated_delta_rule: state: expected None while the sequence is split"):
        gated_delta_rule(q, q, q, g, g, state=torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="short_conv: x: expected at least 3 tokens on each rank, got 2"):
        short_conv(torch.randn(1, 2, 3), torch.randn(3, 4))
