"""Mixers beside each other: how they are mixed, and dropped. The laws of a mixer are in test_mixers.py."""

from copy import deepcopy

import pytest
import torch
import traced
from hydra import compose, initialize_config_module
from runs import run, written
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from seqzoo.layers.registry import build, complete
from seqzoo.layers.state import map_state
from seqzoo.train import model_config

D = 12
FULL = dict(kind="attention", num_heads=2, num_kv_heads=1, head_width=6)
WINDOW = {**FULL, "window": 4}
DELTA = dict(kind="gated_deltanet", num_key_heads=1, num_value_heads=1, key_width=5, value_width=4)
THREE = {"window": WINDOW, "delta": DELTA, "full": FULL}


def parallel(branches=THREE, **how):
    part = build("mixers", dict(kind="parallel", branches=branches, **how), D).double()
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return part


def by_hand(part, x, shares):
    """sum_i w_i weight_i o_i / rms(o_i)"""
    y = 0
    for name, share in shares.items():
        o = part.branches[name](x)[0]
        y = y + share * part.norms[name].weight * o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y


def test_mean_of_normed_outputs():
    part, x = parallel().eval(), torch.randn(2, 7, D).double()
    assert_close(part(x)[0], by_hand(part, x, dict.fromkeys(THREE, 1 / 3)))


def test_learned_shares_are_equal_at_the_start_and_sum_to_one():
    part, x = parallel(merge="learned").eval(), torch.randn(2, 7, D).double()
    part.reset_parameters()
    assert_close(part(x)[0], by_hand(part, x, dict.fromkeys(THREE, 1 / 3)))
    with torch.no_grad():
        part.share_logits.copy_(torch.tensor([0.5, -1.0, 2.0]))  # by the names' order: delta, full, window
    shares = dict(zip(("delta", "full", "window"), part.share_logits.softmax(0), strict=True))
    assert_close(part(x)[0], by_hand(part, x, shares))


@pytest.mark.parametrize("merge", ["mean", "learned"])
def test_a_dropped_branch_is_not_there(merge):
    """What comes out in training is always a layer of fewer branches."""
    p = {"window": 0.5, "delta": 0.25}
    part, x = parallel(merge=merge, branch_dropout=p).train(), torch.randn(1, 5, D).double()
    logits = torch.zeros(3) if merge == "mean" else part.share_logits.detach()
    layers = {}
    for gone in ((), ("window",), ("delta",), ("delta", "window")):
        names = [name for name in sorted(THREE) if name not in gone]
        weights = logits[[sorted(THREE).index(name) for name in names]].softmax(0)
        layers[gone] = by_hand(part, x, dict(zip(names, weights, strict=True)))
    seen = set()
    for _ in range(30):
        y, _ = part(x)
        (found,) = [gone for gone, wanted in layers.items() if torch.allclose(y, wanted)]
        seen.add(found)
    assert seen == set(layers)


def test_branches_are_dropped_as_often_as_asked_for():
    part = parallel(branch_dropout={"window": 0.5, "delta": 0.25}).train()
    drawn = [tuple(part._draw()) for _ in range(4000)]
    expected = {(0, 1, 2): 0.375, (0, 1): 0.375, (1, 2): 0.125, (1,): 0.125}  # delta, full, window
    assert {kept: drawn.count(kept) / 4000 for kept in set(drawn)} == pytest.approx(expected, abs=0.03)


def test_never_all_are_dropped():
    part, x = parallel({"a": WINDOW, "b": DELTA}, branch_dropout={"a": 0.9, "b": 0.9}).train(), torch.randn(1, 3, D)
    assert all(part(x.double())[0].abs().max() > 0 for _ in range(50))


def test_nothing_is_dropped_in_use_or_with_a_state():
    part, x = parallel(branch_dropout=dict.fromkeys(THREE, 0.9)), torch.randn(2, 6, D).double()
    whole = part.eval()(x)[0]
    assert_close(whole, by_hand(part, x, dict.fromkeys(THREE, 1 / 3)))
    y, _ = part.train()(x, state=part.init_state(2, device=x.device, dtype=x.dtype))
    assert_close(y, whole)


def test_a_dropped_branch_gets_no_gradient_and_the_draw_is_repeated_under_checkpointing():
    part, x = parallel(branch_dropout={"window": 0.5, "full": 0.5}).train(), torch.randn(1, 9, D).double()
    seen = set()
    for seed in range(12):
        grads = []
        for call in (lambda z: part(z)[0], lambda z: checkpoint(lambda h: part(h)[0], z, use_reentrant=False)):
            torch.manual_seed(seed)
            part.zero_grad(set_to_none=True)
            call(x).square().sum().backward()
            grads.append({name: p.grad for name, p in part.named_parameters()})
        assert [name for name in grads[0] if (grads[0][name] is None) != (grads[1][name] is None)] == []
        for name, grad in grads[0].items():
            if grad is not None:
                assert torch.equal(grad, grads[1][name]), name
        seen.add(tuple(name for name in THREE if grads[0][f"norms.{name}.weight"] is not None))
    assert len(seen) == 4


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path):
    model = ["model=spikingbrain_parallel_nano", "+model.mixers.near.branch_dropout.window=0.5"]
    how = dict(model=model, steps=4, checkpoint_every=2, sample_tokens=0)
    run(tmp_path / "whole", **how)
    start = tmp_path / "whole" / "checkpoints" / "step-00000002"
    run(tmp_path / "resumed", **how, resume=start)
    assert written(tmp_path / "resumed") == [line for line in written(tmp_path / "whole") if line["step"] > 2]


def test_order_of_branches_means_nothing():
    """To the bit: a config that comes back from JSON is sorted."""
    one, other = parallel(), parallel(dict(reversed(THREE.items())))
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 7, D).double()
    assert torch.equal(one.eval()(x)[0], other.eval()(x)[0])
    assert list(one.state_dict()) == list(other.state_dict())


def test_states_nest_and_are_copied():
    outer = parallel({"inner": dict(kind="parallel", branches=THREE), "window": WINDOW}).eval()
    x = torch.randn(2, 9, D).double()
    whole = outer(x)[0]
    with torch.no_grad():
        _, state = outer(x[:, :4], state=outer.init_state(2, device=x.device, dtype=x.dtype))
        (inner, window) = deepcopy(map_state(lambda t: t.flip(0), state))
        assert len(inner) == 3 and inner[0].memory.shape == (2, 1, 5, 4)
        y, _ = outer(x.flip(0)[:, 4:], state=(inner, window))
    assert_close(y, whole.flip(0)[:, 4:])


TRACED = """
import torch
from seqzoo.layers import Parallel

torch.manual_seed(0)
window = dict(kind="attention", num_heads=2, num_kv_heads=1, head_width=8, window=16)
linear = dict(kind="linear_attention", num_heads=2, num_kv_heads=1, key_width=8, value_width=8)
part, x = Parallel(16, branches=dict(window=window, linear=linear)), torch.randn(2, 40, 16)
run = lambda x: part(x)[0]
for learns in (False, True):
    x.requires_grad_(learns)
    with torch.set_grad_enabled(learns):
        traced = torch.compile(run, backend="aot_eager", fullgraph=True)(x)  # first: nothing native is there yet
        torch.testing.assert_close(traced, run(x))
(ours,), (plain,) = torch.autograd.grad(traced.square().sum(), x), torch.autograd.grad(run(x).square().sum(), x)
torch.testing.assert_close(ours, plain)
"""


def test_compiles():
    """Traced into one graph by a process that has run nothing before."""
    traced.passes(TRACED)


def test_costs_add_up():
    part = parallel()
    for count in (lambda m: m.state_bytes(100, torch.bfloat16), lambda m: m.flops(100)):
        assert count(part) == sum(count(branch) for branch in part.branches.values())


def test_specs_are_completed_inside():
    spec = complete("mixers", dict(kind="parallel", branches={"p": dict(kind="parallel", branches={"a": WINDOW})}))
    assert spec["branches"]["p"]["branches"]["a"]["rope_theta"] == 10_000.0 and spec["branch_dropout"] is None
    with pytest.raises(ValueError, match=r"layers/mixers/attention.py: .*hed_width"):
        complete("mixers", dict(kind="parallel", branches={"a": {**WINDOW, "hed_width": 3}}))


def test_yaml_composes_branches():
    parts = ["+mixer@model.mixers.both=parallel", "+mixer@model.mixers.both.branches.delta=gated_deltanet",
             "+mixer@model.mixers.both.branches.window=attention"]  # fmt: skip
    more = ["model.mixers.both.branches.window.window=64", "model.pattern=[both/mlp]", "~model.mixers.full"]
    with initialize_config_module("seqzoo.configs", version_base=None):
        config = model_config(compose("train", overrides=["model=transformer", *parts, *more]))
    branches = config.mixers["both"]["branches"]
    assert branches["window"]["window"] == 64 and branches["delta"]["kind"] == "gated_deltanet"


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(branches={}), "branches: expected a mixer or more, by name, got {}"),
        (dict(merge="sum"), "merge: expected one of .*'mean'.*, got 'sum'"),
        (dict(norm="none"), "norm: expected one of .*, got 'none'"),
        (dict(branch_dropout={"other": 0.5}), "branch_dropout: expected names of .*, got 'other'"),
        (dict(branch_dropout={"full": 1.0}), "branch_dropout: full: expected 0 to less than 1, got 1.0"),
        (dict(branch_dropout={"full": "0.5"}), "branch_dropout: full: expected 0 to less than 1, got '0.5'"),
        (dict(branch_dropout=0.5), "branch_dropout: expected a mapping or null, got 0.5"),
        (dict(branches={"a.b": FULL}), "branches: expected names that modules can have, got 'a.b'"),
        (dict(branches={"keys": FULL}), "branches: expected names that modules can have, got 'keys'"),
        (dict(branches={3: FULL}), "branches: expected names that modules can have, got 3"),
    ],
    ids=str,
)
def test_errors_name_the_argument(wrong, named):
    with pytest.raises(ValueError, match=f"parallel: {named}"):
        parallel(**wrong)
