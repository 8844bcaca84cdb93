"""All layouts of a cluster, the best first."""

from collections.abc import Iterator
from typing import NamedTuple

from seqzoo.training.layout import Layout
from seqzoo.training.plan import Plan, Planner


class Found(NamedTuple):
    plans: list[Plan]  # that fit, of each layout the best: the fastest first
    refused: list[tuple[str, str]]  # a layout that does not fit, and why


def search(planner: Planner, *, tokens: int, timeout_seconds: int) -> Found:
    """Layouts, checkpointing and micro-batches for steps of so many tokens. Sequences are cut and heads dealt inside a
    node only.

    Raises:
        ValueError: tokens that are no whole rows.
    """
    rows, over = divmod(tokens, planner.length)
    if over or not rows:
        raise ValueError(f"tokens_per_step: expected a multiple of sequence_length={planner.length}, got {tokens}")
    plans: list[Plan] = []
    refused: list[tuple[str, str]] = []
    for layout in _layouts(planner, timeout_seconds):
        replicate, shard, *_ = sizes = layout.sizes(planner.cluster.devices)
        name = " x ".join(map(str, sizes)) + (", experts apart" if layout.expert_parallel else "")
        try:
            standing, has = planner.standing(layout), planner.cluster.memory - planner.cluster.reserve
        except ValueError as error:
            refused.append((name, str(error)))
            continue
        if rows % (replicate * shard):
            refused.append((name, f"{rows} rows cannot be dealt to {replicate * shard}"))
        elif standing > has:
            refused.append((name, f"weights, gradients and optimizer states alone are {standing / 1e9:,.0f} GB"))
        else:
            tried = list(_steps(planner, layout, rows, replicate * shard))
            fitting = [plan for plan in tried if plan.fits]
            if fitting:
                plans.append(min(fitting, key=_order))
            else:
                least = min(tried, key=lambda plan: plan.needs)
                what, most = max(least.memory.items(), key=lambda part: part[1])
                refused.append((name, f"needs {least.needs / 1e9:,.0f} GB at least, {most / 1e9:,.0f} of them {what}"))
    return Found(sorted(plans, key=_order), refused)


def _order(plan: Plan) -> tuple[float, float, int]:
    """What takes the fewest seconds in the order of this code, then at best; then the least memory."""
    return round(plan.seconds["ordered"], 4), plan.seconds["floor"], plan.needs


def _layouts(planner: Planner, timeout_seconds: int) -> Iterator[Layout]:
    devices = planner.cluster.devices
    experts = any(w.by_expert for block in planner.blocks for w in block)
    pairs = ((a, b) for a in _divisors(planner.cluster.devices_per_node) for b in _divisors(a))
    for stretches, tensor in pairs:
        for replicate in _divisors(devices // stretches):
            for apart in (False, True) if experts and replicate < devices else (False,):
                yield Layout(
                    shard=devices // stretches // replicate, replicate=replicate, sequence=stretches // tensor,
                    tensor=tensor, expert_parallel=apart, timeout_seconds=timeout_seconds,
                )  # fmt: skip


def _steps(planner: Planner, layout: Layout, rows: int, readers: int) -> Iterator[Plan]:
    for accumulate in _divisors(rows // readers):
        for checkpointing in (False, True):
            yield planner.plan(layout, rows=rows // accumulate, accumulate=accumulate, checkpointing=checkpointing)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
