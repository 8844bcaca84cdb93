"""seqzoo-plan: memory per device, exchanges, a floor of the step's time and the largest batch; or the best layouts."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from seqzoo.models.config import SeqZooConfig
from seqzoo.training.layout import Layout
from seqzoo.training.plan import Plan, Planner
from seqzoo.training.plan_exchange import Cluster, on_links
from seqzoo.training.plan_search import search
from seqzoo.training.settings import Settings

HELP = """seqzoo-plan model=NAME cluster=NAME parallel=NAME optimizer=NAME trainer.KEY=VALUE ...
  what a run with the same words needs of each device and link; nothing is trained
seqzoo-plan model=NAME cluster=NAME search=true tokens_per_step=N ...
  layouts of the cluster that fit, the best first, and why the others do not"""
LINES = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer states",
    "activations": "activations kept for backward, recurrent states among them",
    "gathered": "weights gathered, gradients on their way",
    "working": "while a block or the head is at work",
    "step": "more than that, at the end of backward or in the optimizers",
    "reserve": "reserve",
}


class Asked(NamedTuple):
    """What a run's configuration says."""

    config: SeqZooConfig
    layout: Layout
    cluster: Cluster
    settings: Settings
    optimizers: Callable[[nn.Module], list[Optimizer]]
    search: bool
    tokens_per_step: int
    shown: int


def main(argv: Sequence[str] | None = None, *, configured: Callable[[Sequence[str]], Asked]) -> int:
    """Prints. `configured`: what words such as model=... say, or a ValueError.

    Returns the exit status: 0; 1 where nothing fits; 2 with one line on stderr where the input is at fault.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*words}:
        print(HELP)
        return 0
    try:
        asked = configured(words)
        settings = asked.settings
        planner = Planner(
            asked.config, asked.cluster, length=settings.sequence_length, precision=settings.precision,
            optimizers=asked.optimizers,
        )  # fmt: skip
        print(_head(planner))
        if asked.search:
            return _search(planner, asked)
        plan = planner.plan(
            asked.layout, rows=settings.batch_size, accumulate=settings.accumulate,
            checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip
        print(plan_text(planner, plan))
        return 0 if plan.fits else 1
    except ValueError as error:
        print(f"seqzoo-plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _search(planner: Planner, asked: Asked) -> int:
    found = search(planner, tokens=asked.tokens_per_step, timeout_seconds=asked.layout.timeout_seconds)
    print(f"\n{len(found.plans)} of {len(found.plans) + len(found.refused)} layouts fit")
    if found.plans:
        first = found.plans[0]
        print(f"\n{found_text(found.plans[: asked.shown])}")
        print(f"\nthe first of them: {words_of(first)}\n\n{plan_text(planner, first)}")
    if found.refused:
        print("\nwhat does not fit (replicate x shard x sequence x tensor):")
        for why in dict.fromkeys(why for _, why in found.refused):
            print(f"  {why}: {'; '.join(name for name, reason in found.refused if reason == why)}")
    return 0 if found.plans else 1


def words_of(plan: Plan) -> str:
    """What seqzoo-train is told."""
    names = ("replicate", "shard", "sequence", "tensor")
    sizes = (f" parallel.{name}={size}" for name, size in zip(names, plan.sizes, strict=True))
    layout = f"parallel=fsdp{''.join(sizes)} parallel.expert_parallel={str(plan.expert_parallel).lower()}"
    step = f"trainer.batch_size={plan.rows} trainer.accumulate={plan.accumulate}"
    return f"{layout} {step} trainer.gradient_checkpointing={str(plan.checkpointing).lower()}"


def _head(planner: Planner) -> str:
    cluster, cost = planner.cluster, planner.cost
    return (
        f"{cost.parameters / 1e9:,.3g} B parameters, {cost.active_parameters / 1e9:,.3g} B met by a token; rows of "
        f"{planner.length:,} tokens, {planner.precision}\n"
        f"{cluster.nodes} x {cluster.devices_per_node} {cluster.device} of {cluster.memory / 1e9:,.0f} GB\n"
        f"decoded from, a sequence of that length keeps {cost.state_bytes / 1e6:,.1f} MB of states in bf16"
    )


def plan_text(planner: Planner, plan: Plan) -> str:
    """All of one plan."""
    replicate, shard, sequence, tensor = plan.sizes
    text = [
        f"replicate {replicate} x shard {shard} x sequence {sequence} x tensor {tensor}, experts {_experts(plan)}",
        f"steps of {plan.accumulate} x {plan.rows} rows, activations "
        f"{'computed again' if plan.checkpointing else 'kept'}",
        "", "per device [GB]",
        *(f"  {size / 1e9:10.3f}  {LINES[name]}" for name, size in plan.memory.items()),
        f"  {plan.needs / 1e9:10.3f}  of {plan.has / 1e9:,.0f}: {'fits' if plan.fits else 'DOES NOT FIT'}",
        "", "exchanged per device and step [GB]   payload  over link  over network",
    ]  # fmt: skip
    for exchange in plan.exchanges:
        link, network = on_links(exchange, planner.cluster)
        name = f"{exchange.what}, {exchange.how} of {exchange.group.size}"
        text.append(f"  {name:34} {exchange.bytes / 1e9:9.3f}  {link / 1e9:9.3f}  {network / 1e9:12.3f}")
    times, tokens = plan.seconds, plan.rows * plan.accumulate * planner.length
    parts = ", ".join(f"{name} {times[name]:.3g}" for name in ("products", "memory", "link", "network"))
    useful = 3 * planner.cost.flops_per_token * tokens / planner.cluster.devices
    share = useful / planner.cluster.flops[planner.precision] / times["floor"]
    floor, ordered, readers = f"{times['floor']:.3g}", f"{times['ordered']:.3g}", replicate * shard
    text += [
        "",
        f"a step takes {floor} s at least ({parts}); {ordered} s at least as this code orders it",
        f"that is {tokens / times['floor']:,.0f} tokens/s at most, {share:.0%} of the devices' FLOP/s",
        f"largest micro-batch that fits: {plan.most_rows:,} rows, {plan.most_rows // readers:,} to each of "
        f"{readers} readers",
    ]
    return "\n".join(text)


def found_text(plans: list[Plan]) -> str:
    """A line for each."""
    lines = ["replicate x shard x sequence x tensor  experts   micro-batches  kept   GB    floor s  ordered s"]
    for plan in plans:
        name, steps = " x ".join(map(str, plan.sizes)), f"{plan.accumulate} x {plan.rows}"
        kept = "no" if plan.checkpointing else "yes"
        lines.append(
            f"{name:37}  {_experts(plan):8}  {steps:13}  {kept:4}  {plan.needs / 1e9:5.1f}  "
            f"{plan.seconds['floor']:7.3f}  {plan.seconds['ordered']:9.3f}"
        )
    return "\n".join(lines)


def _experts(plan: Plan) -> str:
    return "apart" if plan.expert_parallel else "gathered"
