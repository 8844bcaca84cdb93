"""One of several processes: parts and models on a stretch of a sequence each, against the whole sequence in one; and
parts whose heads are dealt to two of them.

python tests/split_worker.py FOLDER RANK RANKS
"""

import faulthandler
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import BLOCKS, CHANNELS, MIXERS
from test_mixers import AsMixer, spec_of
from torch.testing import assert_close

from seqzoo.kernels.across import split_sequence
from seqzoo.kernels.exchanges import Ranks
from seqzoo.layers.registry import build
from seqzoo.layers.span import Span
from seqzoo.models.causal_lm import SeqZooForCausalLM
from seqzoo.models.config import SeqZooConfig
from seqzoo.training.split import splits_of
from seqzoo.training.tensor import Tensors

B, T, D = 2, 24, 16  # of the whole sequence
WIDE = "a window wider than a stretch"
MORE = {WIDE: dict(kind="attention", num_heads=4, num_kv_heads=2, head_width=6, window=15)}
LIGHTNING = dict(num_heads=6, num_kv_heads=6, key_width=4, value_width=3, decay="lightning", decay_depth=0.3)
HEADS = {"linear_attention-lightning": ("mixers", {"kind": "linear_attention", **LIGHTNING})}
HEADS |= {name: ("mixers", {"kind": name} | spec) for name, spec in MIXERS.items()}
HEADS |= {name: ("channels", {"kind": name} | spec) for name, spec in CHANNELS.items()}


def can_be_dealt(name: str, ranks: int) -> bool:
    part = build(*HEADS[name], D)
    heads = part.heads() if hasattr(part, "heads") else None
    return heads is not None and all(HEADS[name][1].get(x, 0) % ranks == 0 for x in heads.arguments)


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
    y = part(leaf, Span(where, starts=starts if starts.any() else None))[0]
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


def check_heads(name: str, kind: str, rank: int, ranks: int) -> None:
    """A part with some of the heads, on a stretch; a parameter that is no head's has its gradient on all together."""
    torch.manual_seed(0)
    whole = build(*HEADS[name], D).double().eval()
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, weight = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    where, group = (
        positions(kind),
        Tensors(Ranks(dist.group.WORLD, rank, ranks), dist.group.WORLD, partial(split_sequence, None)),
    )
    mine, part = slice(rank * T // ranks, (rank + 1) * T // ranks), group.some_heads(whole)
    wanted = step(whole, x, where, weight)
    with split_sequence(dist.group.WORLD):
        y, dx, *grads = step(part, x[:, mine], where[:, mine], weight[:, mine])
    splits, parameters = splits_of(part), [name for name, _ in part.named_parameters()]
    assert splits and [name for name, _ in whole.named_parameters()] == parameters
    for i, name_ in enumerate(parameters):
        if name_ in splits:
            assert torch.equal(splits[name_].give(splits[name_].take(wanted[2 + i])), wanted[2 + i])
            grads[i] = splits[name_].give(grads[i])
        else:
            dist.all_reduce(grads[i])
    expected = [x[:, mine] for x in wanted[:2]] + wanted[2:]
    for what, a, b in zip(["y", "x", *parameters], [y, dx, *grads], expected, strict=True):
        assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, what=what: f"{name}, {kind}, rank {rank}, {what}: {m}")
    with torch.no_grad():  # where nothing is split, as in a sample: all tokens, and a state
        how = dict(device=x.device, dtype=x.dtype)
        states = [p.init_state(B, **how) for p in (whole, part)] if hasattr(whole, "init_state") else []
        assert_close(part(x, None, *states[1:])[0], whole(x, None, *states[:1])[0], atol=1e-9, rtol=1e-7)


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
    dealt = [(check_heads, name) for name in HEADS if can_be_dealt(name, ranks)]
    kinds = lambda names: {HEADS[name][1]["kind"] for name in names if hasattr(build(*HEADS[name], D), "heads")}
    if ranks == 2 and (missing := kinds(HEADS) - kinds(name for _, name in dealt)):
        failed.append(f"heads: expected a row in cases.py with an even number of {sorted(missing)}")
    for one, name in checks + dealt:
        for kind in ("whole", "documents"):
            try:
                one(name, kind, rank, ranks)
            except AssertionError as error:
                failed.append(str(error))
    dist.destroy_process_group()
    if failed:
        raise SystemExit("\n".join(failed))
    print(f"{len(checks)} checks and {len(dealt)} of heads")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
