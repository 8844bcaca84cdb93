"""The laws of a channel mixer, and Qwen3-Next's mixture of experts against Transformers'."""

import math
import sys
from inspect import signature

import pytest
import torch
from cases import ACTIVE_PARAMETERS, CHANNELS
from torch.testing import assert_close

from seqzoo.layers.registry import build, complete, kinds
from seqzoo.layers.span import Span

B, T, D = 2, 12, 16
every = pytest.mark.parametrize("name", CHANNELS)
mixtures = pytest.mark.parametrize("name", [n for n in CHANNELS if CHANNELS[n].get("kind", n) == "moe"])


def channel(name, dtype=torch.double, **changes):
    part = build("channels", {"kind": name, **CHANNELS[name], **changes}, D).to(dtype).eval()
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return part


def tokens(B=B, dtype=torch.double):
    return torch.randn(B, T, D, dtype=dtype)


def padded(x, pads):
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return Span(positions, positions >= torch.tensor(pads)[:, None])


def same_stats(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert_close(a[key], b[key], msg=lambda m, key=key: f"{key}: {m}")


def test_every_channel_has_a_row():
    assert set(kinds("channels")) == {spec.get("kind", name) for name, spec in CHANNELS.items()}


@every
def test_config_json_is_complete(name):
    spec = complete("channels", {"kind": name, **CHANNELS[name]})
    assert set(spec) == {"kind", *list(signature(type(channel(name))).parameters)[1:]}


@every
def test_wrong_types_are_named(name):
    for argument in list(signature(type(channel(name))).parameters)[1:]:
        with pytest.raises(ValueError, match=f"{argument}: expected .*, got <object"):
            channel(name, **{argument: object()})


@every
def test_token_wise(name):
    """Permuting tokens permutes outputs and leaves the sums alone; so does calling on one token at a time."""
    part, x = channel(name), tokens()
    y, stats = part(x)
    order = torch.randperm(T)
    mixed, mixed_stats = part(x[:, order])
    assert_close(mixed, y[:, order])
    same_stats(mixed_stats, stats)
    assert_close(torch.cat([part(x[:, t : t + 1])[0] for t in range(T)], dim=1), y)


@every
def test_gradients(name):
    part, x = channel(name), tokens().requires_grad_()
    y, stats = part(x)
    loss = part.loss(stats) if stats else 0
    grads = torch.autograd.grad(y.square().mean() + loss, [x, *part.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)


@every
def test_stats_add_up_and_padding_is_not_in_them(name):
    part, x = channel(name), tokens()
    both = part(x)[1]
    parts = [part(x[:1])[1], part(x[1:])[1]]
    same_stats(both, {key: parts[0][key] + parts[1][key] for key in both})
    pads = [3, 0]
    without = [part(x[i : i + 1, pad:])[1] for i, pad in enumerate(pads)]
    same_stats(part(x, padded(x, pads))[1], {key: without[0][key] + without[1][key] for key in both})


@every
def test_active_parameters_and_flops(name):
    part, expected = channel(name), ACTIVE_PARAMETERS[name]
    assert part.active_parameters() == expected
    assert part.flops(7) == 2 * expected


@mixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_near(name, dtype):
    part, x = channel(name), tokens()
    chosen, *_ = part._route(x.flatten(0, 1))
    y, _ = part(x)
    low = channel(name).to(dtype)
    low.load_state_dict(part.state_dict())
    same_choice = (low._route(x.to(dtype).flatten(0, 1))[0].sort().values == chosen.sort().values).all(-1).view(B, T)
    assert same_choice.float().mean() > 0.7  # a near tie may fall the other way in few bits
    error = (low(x.to(dtype))[0].double() - y)[same_choice].abs().max() / y.abs().max()
    assert error < (5e-2 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_computes_in_the_lower_precision():
    part, x = channel("moe", torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = part(x)
        experts = part._experts(x.flatten(0, 1), *part._route(x.flatten(0, 1))[:2])
    assert experts.dtype == y.dtype == torch.bfloat16


def transformers_qwen3_next():
    sys.modules.setdefault("fla", None)  # its Triton kernels would be picked up, on a machine without a GPU too
    from transformers.models.qwen3_next import modeling_qwen3_next

    return modeling_qwen3_next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_qwen3_next(dtype):
    theirs = transformers_qwen3_next()
    config = theirs.Qwen3NextConfig(
        hidden_size=32, num_experts=11, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True,
        shared_expert_intermediate_size=40,
    )  # fmt: skip
    block = theirs.Qwen3NextSparseMoeBlock(config)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = build(
        "channels",
        dict(kind="moe", num_experts=11, num_experts_per_token=3, expert_width=24, shared_width=40),
        32,
    )
    names = {"gate.": "router.", "experts.": "", "shared_expert.": "shared.", "shared_expert_gate.": "shared_gate."}
    rename = lambda key: next(new + key.removeprefix(old) for old, new in names.items() if key.startswith(old))
    ours.load_state_dict({rename(key): value for key, value in block.state_dict().items()})
    x = torch.randn(2, 37, 32).to(dtype)
    y, truth = ours.to(dtype)(x)[0], block.to(dtype)(x)
    tolerance = (
        dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.05 * truth.abs().max().item(), rtol=0)
    )
    assert_close(y, truth, **tolerance)


@pytest.mark.parametrize("pads", [None, [4, 0]], ids=["whole", "padded"])
def test_pooled_balance_loss_is_transformers(pads):
    theirs = transformers_qwen3_next()
    layers = [channel("moe", torch.float32) for _ in range(3)]
    xs = [tokens(dtype=torch.float32) for _ in layers]
    span = None if pads is None else padded(xs[0], pads)
    stats = [layer(x, span)[1] for layer, x in zip(layers, xs, strict=True)]
    pooled = {key: sum(s[key] for s in stats) for key in stats[0]}
    logits = tuple(layer.router(x.flatten(0, 1)) for layer, x in zip(layers, xs, strict=True))
    spec = CHANNELS["moe"]
    mask = None if span is None else span.valid
    truth = theirs.load_balancing_loss_func(logits, spec["num_experts"], spec["num_experts_per_token"], mask)
    assert_close(layers[0].loss(pooled), 0.001 * truth)
    routers = [layer.router.weight for layer in layers]
    ours = torch.autograd.grad(layers[0].loss(pooled), routers, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(0.001 * truth, routers), strict=True):
        assert_close(a, b)


def test_metrics():
    part = channel("moe")
    even = {"selected": torch.full((6,), 4.0), "probability": torch.rand(6), "tokens": torch.tensor(12.0)}
    assert part.metrics(even) == pytest.approx({"load_entropy": 1, "load_max": 1, "unused_experts": 0})
    half = {**even, "selected": torch.tensor([8.0, 8, 8, 0, 0, 0])}
    expected = {"load_entropy": math.log(3) / math.log(6), "load_max": 2, "unused_experts": 0.5}
    assert part.metrics(half) == pytest.approx(expected)


def test_bias_moves_the_choice_and_not_the_weights():
    part, x = channel("moe-bias"), tokens()
    chosen, weight, probability = part._route(x.flatten(0, 1))
    assert_close(weight, torch.nn.functional.normalize(probability.gather(-1, chosen), p=1, dim=-1))
    part.expert_bias[3] = 2  # above every probability
    chosen, weight, _ = part._route(x.flatten(0, 1))
    assert (chosen == 3).any(-1).all()
    assert_close(weight, torch.nn.functional.normalize(probability.gather(-1, chosen), p=1, dim=-1))


def test_sigmoid_scores_do_not_compete():
    part, x = channel("moe-sigmoid"), tokens().flatten(0, 1)
    chosen, weight, probability = part._route(x)
    score = part.router(x).sigmoid()
    assert_close(weight, 2.5 * score.gather(-1, chosen))  # its routed_scale
    assert_close(probability, torch.nn.functional.normalize(score, p=1, dim=-1))
    assert torch.equal(chosen.sort().values, part.router(x).topk(2).indices.sort().values)


def test_after_step_evens_the_load():
    part, x = (
        channel("moe-bias", bias_update_rate=0.02),
        torch.rand(2, 64, D, dtype=torch.double),
    )  # all positive: skewed
    before = part.metrics(part(x)[1])
    for _ in range(60):
        part.after_step(part(x)[1])
    after = part.metrics(part(x)[1])
    assert after["load_max"] < 1.15 < 1.5 < before["load_max"]
    moved = part.expert_bias.clone()
    part.after_step({"selected": torch.tensor([1.0, 2, 3, 2, 2, 2])})
    step = torch.tensor([1.0, 0, -1, 0, 0, 0], dtype=torch.double)
    assert_close(part.expert_bias - moved, 0.02 * step)


def test_bias_is_in_the_checkpoint_only_where_it_moves():
    assert "expert_bias" in channel("moe-bias").state_dict()
    assert "expert_bias" not in channel("moe").state_dict()
    channel("moe").after_step({"selected": torch.zeros(6)})  # nothing to move


@pytest.mark.parametrize(
    "wrong",
    [dict(num_experts_per_token=7), dict(num_experts_per_token=0), dict(shared_width=-1), dict(bias_update_rate=-0.1),
     dict(router_score="tanh"), dict(routed_scale=0.0), dict(expert_width=0), dict(expert_width=1.5)],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected .* got {next(iter(wrong.values()))!r}"):
        channel("moe", **wrong)


def test_a_width_below_1_is_named():
    with pytest.raises(ValueError, match="swiglu: width: expected a whole number, at least 1, got 0"):
        channel("swiglu", width=0)


@pytest.mark.parametrize(
    "changes", [dict(), dict(renormalise=True), dict(renormalise=True, bias_update_rate=0.1)], ids=str
)
def test_scores_of_nothing_are_no_nan(changes):
    """Sigmoids that are all 0 in fp32: no expert is there, and nothing is divided by 0."""
    part = channel("moe-sigmoid", dtype=torch.float, **changes)
    torch.nn.init.constant_(part.router.weight, -10.0)
    x = tokens(dtype=torch.float).abs().requires_grad_()
    y, stats = part(x)
    (y.square().sum() + part.loss(stats)).backward()
    assert_close(y, part.shared(x))
    assert all(p.grad is None or p.grad.isfinite().all() for p in (x, *part.parameters()))
