"""One of several processes: parts and models on a stretch of a sequence each, against the whole sequence in one.

python tests/split_worker.py FOLDER RANK RANKS
"""

import faulthandler
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cases import BLOCKS, CHANNELS, MIXERS
from test_mixers import AsMixer, spec_of
from torch.testing import assert_close

from seqzoo.kernels.across import split_sequence
from seqzoo.layers.registry import build
from seqzoo.layers.span import Span
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig

B, T, D = 2, 24, 16  # of the whole sequence
WIDE = "a window wider than a stretch"
MORE = {WIDE: dict(kind="attention", num_heads=4, num_kv_heads=2, head_width=6, window=15)}


def positions(kind: str) -> torch.Tensor:
    """[B, T]: one document, or several, beginning in the middle of stretches, at edges, and one after another."""
    if kind == "whole":
        return torch.arange(T).expand(B, T)
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, [0, 5, 6, 12, 13]] = True
    starts[1, [0, 7, 18, 23]] = True
    index = torch.arange(T).expand(B, T)
    return index - torch.where(starts, index, 0).cummax(1).values


def step(part: torch.nn.Module, x: torch.Tensor, where: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, gradients of x and of each parameter."""
    starts, leaf = where == 0, x.clone().requires_grad_()
    y, _ = part(leaf, Span(where, starts=starts if starts.any() else None))
    part.zero_grad(set_to_none=True)
    (y * weight).sum().backward()
    return [y.detach(), leaf.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters())]


def check(name: str, kind: str, rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    part = build(*(("mixers", MORE[name]) if name in MORE else spec_of(name)), D).double().eval()
    part = AsMixer(part) if name in BLOCKS else part
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, weight = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    where = positions(kind)
    mine = slice(rank * T // ranks, (rank + 1) * T // ranks)
    whole = step(part, x, where, weight)
    with split_sequence(dist.group.WORLD):
        ours = step(part, x[:, mine], where[:, mine], weight[:, mine])
    for grad in ours[2:]:
        dist.all_reduce(grad)
    names = ["y", "x", *(name for name, _ in part.named_parameters())]
    for what, a, b in zip(names, ours, [x[:, mine] for x in whole[:2]] + whole[2:], strict=True):
        assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, what=what: f"{name}, {kind}, rank {rank}, {what}: {m}")


def models() -> dict[str, SeqZooForCausalLM]:
    """Of several mixers each; the second has sink tokens, whose own stream no rank has a part of."""
    parts = lambda table, *names: {name: {"kind": name} | table[name] for name in names}
    delta = parts(MIXERS, "gated_deltanet", "attention-window", "kimi_delta_attention", "latent_attention")
    spiking = parts(MIXERS, "parallel", "momentum_attention", "ovq_attention")
    moe = {"moe": dict(kind="moe", balance_coefficient=0.0) | CHANNELS["moe"]}  # balance is over all ranks: not here
    shape = dict(hidden_size=D, vocab_size=37, num_hidden_layers=4)
    made = {
        "hybrid": SeqZooConfig(mixers=delta, channels=moe, pattern=[f"{name}/moe" for name in delta], **shape),
        "sinks": SeqZooConfig(
            mixers=spiking, channels=moe, num_sink_tokens=2, pattern=[f"{name}/moe" for name in [*spiking, "parallel"]],
            **shape,
        ),
    }  # fmt: skip
    return {name: SeqZooForCausalLM(config).double().train() for name, config in made.items()}


def learn(model: SeqZooForCausalLM, ids: torch.Tensor, where: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, position_ids=where, shift_labels=labels, num_items_in_batch=B * T, use_cache=False)
    out.loss.backward()
    return [out.loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


def check_model(name: str, kind: str, rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    model = models()[name]
    if kind == "documents":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ids, labels, where = torch.randint(37, (B, T)), torch.randint(37, (B, T)), positions(kind)
    mine = slice(rank * T // ranks, (rank + 1) * T // ranks)
    whole = learn(model, ids, where, labels)
    with split_sequence(dist.group.WORLD):
        ours = learn(model, ids[:, mine], where[:, mine], labels[:, mine].contiguous())
    for x in ours:
        dist.all_reduce(x)
    for what, a, b in zip(["loss", *(n for n, _ in model.named_parameters())], ours, whole, strict=True):
        assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, what=what: f"{name}, {kind}, rank {rank}, {what}: {m}")


def main(folder: str, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60, exit=True)  # where it hangs, if it does
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    failed: list[str] = []
    checks = [(check, name) for name in (*MIXERS, *BLOCKS, *MORE)] + [
        (check_model, name) for name in ("hybrid", "sinks")
    ]
    for one, name in checks:
        for kind in ("whole", "documents"):
            try:
                one(name, kind, rank, ranks)
            except AssertionError as error:
                failed.append(str(error))
    dist.destroy_process_group()
    if failed:
        raise SystemExit("\n".join(failed))
    print(f"{len(checks)} checks")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
