"""Dense models as mixtures of experts: what is the same at the start, and how near the rest is."""

import pytest
import torch
from torch.testing import assert_close

from seqzoo.layers.registry import build
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.upcycle import fill, gain, upcycle

D, WIDTH, N = 12, 20, 16
SPIKING = dict(kind="moe", num_experts=N, num_experts_per_token=1, expert_width=WIDTH, shared_width=WIDTH,
               shared_gate=False, renormalise=False)  # fmt: skip


def pair(std=0.3, **changes):
    """A gated MLP and a mixture whose router is zero."""
    mlp, moe = build("channels", dict(kind="swiglu", width=WIDTH), D), build("channels", {**SPIKING, **changes}, D)
    for part in (mlp, moe):
        for p in part.parameters():
            torch.nn.init.normal_(p, std=std)
    torch.nn.init.zeros_(moe.router.weight)
    return mlp.double(), moe.double()


VARIANTS = {
    "spiking": (dict(), 1 + 1 / 16),
    "several": (dict(num_experts_per_token=3), 1 + 3 / 16),
    "sigmoid": (dict(num_experts_per_token=3, router_score="sigmoid"), 1 + 3 / 2),
    "renormalised": (dict(num_experts_per_token=2, renormalise=True), 2.0),
    "gated": (dict(shared_gate=True), 0.5 + 1 / 16),
    "alone": (dict(shared_width=0, num_experts_per_token=2), 2 / 16),
}
every = pytest.mark.parametrize("changes, c", VARIANTS.values(), ids=VARIANTS)


@every
def test_exact_with_a_router_of_zero(changes, c):
    """Copies alone give c times the MLP; all of the scale on the last matrix gives the MLP."""
    mlp, moe = pair(**changes)
    x = torch.randn(3, 50, D).double()
    assert gain(moe) == pytest.approx(c)
    fill(moe, mlp, scale="none")
    assert_close(moe(x)[0], c * mlp(x)[0], atol=1e-12, rtol=1e-12)
    fill(moe, mlp, scale="down")
    assert_close(moe(x)[0], mlp(x)[0], atol=1e-12, rtol=1e-12)


def test_the_cube_root_is_near_and_not_exact():
    """On all three matrices, for silu(a g) is not a silu(g): 0.98 each for 1 + 1/16."""
    errors = {}
    for std in (0.003, 0.3, 3.0):  # small: silu is about g / 2, and large: about max(g, 0)
        mlp, moe = pair(std)
        fill(moe, mlp)
        assert_close(moe.down_proj[0], 0.98 * mlp.down_proj.weight, rtol=1e-4, atol=0)
        x = torch.randn(1, 400, D).double()
        y, wanted = moe(x)[0], mlp(x)[0]
        errors[std] = ((y - wanted).norm() / wanted.norm()).item()
    assert 1e-3 < errors[0.3] < 2e-2 and errors[0.003] < 1e-3 and errors[3.0] < 1e-3, errors


@pytest.mark.parametrize("std, low, high", [(0.05, 1.05, 1.15), (1.2, 4.0, 5.0)])
def test_a_random_router_weighs_more_than_its_share(std, low, high):
    """Only p = 1/N makes a_MoE = (S + k/N) a_dense: the chosen expert is the one with the largest p."""
    mlp, moe = pair()
    fill(moe, mlp, scale="down")
    torch.nn.init.normal_(moe.router.weight, std=std * D**-0.5)
    x = torch.randn(1, 4000, D).double()
    y, wanted = moe(x)[0], mlp(x)[0]
    ratio = (y * wanted).sum(-1) / wanted.square().sum(-1)  # of one token: a multiple of the dense output
    assert_close(y, ratio[..., None] * wanted)
    weight = ratio * (1 + 1 / N) - 1
    assert low < weight.mean() * N < high


def test_renormalised_weights_make_it_exact_whatever_the_router():
    mlp, moe = pair(renormalise=True, num_experts_per_token=2)
    fill(moe, mlp, scale="down")
    torch.nn.init.normal_(moe.router.weight)
    x = torch.randn(2, 9, D).double()
    assert_close(moe(x)[0], mlp(x)[0])


def dense(**other):
    full = dict(kind="attention", num_heads=2, num_kv_heads=1, head_width=6)
    config = SeqZooConfig(
        hidden_size=D, vocab_size=31, num_hidden_layers=4, pattern=["a/mlp", "b/mlp"],
        mixers=dict(a=full, b={**full, "window": 3}), channels=dict(mlp=dict(kind="swiglu", width=WIDTH)), **other,
    )  # fmt: skip
    model = SeqZooForCausalLM(config).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(
    "blocks, pattern",
    [
        (None, ["a/moe", "b/moe"]),
        ([1, 3], ["a/mlp", "b/moe"]),
        ([2], ["a/mlp", "b/mlp", "a/moe", "b/mlp"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("tie", [False, True], ids=["", "tied words"])
def test_a_model(blocks, pattern, tie):
    model = dense(tie_word_embeddings=tie)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    new = upcycle(model, {**SPIKING, "renormalise": True}, blocks=blocks, scale="down")
    assert new.config.pattern == pattern and not new.training and new.dtype == torch.double
    assert set(new.config.channels) == {entry.split("/")[1] for entry in pattern}
    ids = torch.randint(0, 31, (2, 9))
    assert_close(new(ids).logits, model(ids).logits)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert any(b.channel.router.weight.std() > 0 for b in new.stack.blocks if hasattr(b.channel, "router"))


def test_a_tied_model_keeps_its_period():
    model = dense(tied=True)
    new = upcycle(model, {**SPIKING, "renormalise": True}, blocks=[1], scale="down")
    assert new.config.pattern == ["a/mlp", "b/moe"] and len(new.stack.blocks) == 2 and new.stack.depth == 4
    ids = torch.randint(0, 31, (2, 9))
    assert_close(new(ids).logits, model(ids).logits)


def test_the_dense_model_keeps_its_own_generation_config():
    old = dense()
    upcycle(old, SPIKING).generation_config.max_new_tokens = 7
    assert old.generation_config.max_new_tokens is None


def test_a_new_model_is_saved_and_opened(tmp_path):
    new = upcycle(dense(), SPIKING)
    new.save_pretrained(tmp_path)
    again = SeqZooForCausalLM.from_pretrained(tmp_path, dtype=torch.double).eval()
    ids = torch.randint(0, 31, (1, 9))
    assert torch.equal(again(ids).logits, new(ids).logits)


@pytest.mark.parametrize(
    "how, named",
    [
        (dict(blocks=[4]), r"blocks: expected some of \[0, 1, 2, 3\], .*got \[4\]"),
        (dict(blocks=[]), r"blocks: .*got \[\]"),
        (dict(scale="half"), "scale: expected one of .*, got 'half'"),
        (dict(blocks=1), "blocks: expected numbers of blocks, .* got 1"),
        (dict(name="mlp"), "name: expected one that no channel has, got 'mlp'"),
        (dict(name="full/moe"), "name: expected one without a slash, got 'full/moe'"),
        (dict(moe=dict(kind="swiglu", width=20)), "moe: expected kind moe, got 'swiglu'"),
        (dict(moe={**SPIKING, "expert_width": 8}), "expert_width: expected the width of the MLP, 20, got 8"),
        (dict(moe={**SPIKING, "shared_width": 8}), "shared_width: expected the width of the MLP, 20, got 8"),
    ],
    ids=str,
)
def test_errors(how, named):
    with pytest.raises(ValueError, match=named):
        upcycle(dense(), **{"moe": SPIKING, **how})
