"""Monotone MLP: order is kept, whatever is learned; and a model begins with it at a sensible scale."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from seqzoo.layers.channels.monotone_mlp import ACTIVATIONS, WEIGHTS, MonotoneMLP
from seqzoo.layers.registry import build
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM

D = 12
every = pytest.mark.parametrize("weights, activation", list(product(WEIGHTS, ACTIVATIONS)))


def channel(weights, activation, width=20) -> MonotoneMLP:
    spec = dict(kind="monotone_mlp", width=width, weights=weights, activation=activation)
    return build("channels", spec, D).double()


def pairs(N=4000, D=D):
    """a <= b: some apart in all channels, some in one, near and far. [1, N, D] each"""
    a = 2 * torch.randn(N, D, dtype=torch.double)
    rise = torch.randn(N, D, dtype=torch.double).exp()
    rise[: N // 2] *= torch.nn.functional.one_hot(torch.randint(D, (N // 2,)), D)
    return a[None], (a + rise * 10 ** torch.empty(N, 1, dtype=torch.double).uniform_(-4, 1))[None]


def falls(part, a, b) -> bool:
    """Whether any output channel falls from a to b, by more than rounding."""
    with torch.no_grad():
        low, high = part(a)[0], part(b)[0]
    return bool((high - low < -1e-13 * (1 + low.abs())).any())


@every
def test_order_is_kept(weights, activation):
    """When drawn, and after steps of training that would have signs change: towards an output that falls."""
    part, (a, b) = channel(weights, activation), pairs()
    assert not falls(part, a, b)
    optimizer, before = torch.optim.AdamW(part.parameters(), lr=0.3), part.up_raw.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        (part(a)[0] + a).square().mean().backward()
        optimizer.step()
    assert (part.up_raw - before).abs().mean() > 0.1
    assert all((m >= 0).all() for m in part.matrices())
    assert not falls(part, a, b)


@every
def test_one_weight_of_the_other_sign_breaks_it(weights, activation, monkeypatch):
    """The test above can fail."""
    part, (a, b) = channel(weights, activation, width=2), pairs()
    up, down = (m.detach().clone() for m in part.matrices())
    up[0, up[0].argmax()] *= -1
    monkeypatch.setattr(part, "matrices", lambda: (up, down))
    assert falls(part, a, b)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_relu_is_convex(weights):
    part, (a, b) = channel(weights, "relu"), pairs(500)
    with torch.no_grad():
        middle, ends = part((a + b) / 2)[0], (part(a)[0] + part(b)[0]) / 2
    assert (middle <= ends + 1e-12).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weight_decay_makes_weights_smaller(weights):
    """An optimizer's decay draws raw to 0, and with it most of all the weights, on the mean."""
    part = channel(weights, "relu", width=200)
    drawn = [m.mean() for m in part.matrices()]
    with torch.no_grad():
        for raw in (part.up_raw, part.down_raw):
            raw.mul_(0.1)
    assert all(m.mean() < 0.5 * before for m, before in zip(part.matrices(), drawn, strict=True))


@every
def test_the_scales_are_what_they_say(weights, activation):
    """f's moments, the activation's mean, and what follows: unit variance inside, a small output around zero."""
    D, width, N = 256, 512, 1000
    part = MonotoneMLP(D, width=width, weights=weights, activation=activation)
    for raw, (mean, square) in ((part.up_raw, WEIGHTS[weights][3:]), (part.down_raw, WEIGHTS[weights][3:])):
        f = part.positive(raw.detach())
        assert_close(f.mean().item(), mean, atol=0, rtol=0.02)
        assert_close(f.square().mean().item(), square, atol=0, rtol=0.04)
    act, centre = ACTIVATIONS[activation]
    assert abs(act(torch.randn(1_000_000)).mean() - centre) < 0.005
    x = torch.randn(1, N, D)
    with torch.no_grad():
        up, _ = part.matrices()
        y, _ = part(x)
    assert 0.9 < (x @ up.T).std() < 1.1
    assert 0.003 < y.std() < 0.05 and abs(y.mean()) < 0.005


def model(**changes) -> SeqZooForCausalLM:
    torch.manual_seed(0)
    return SeqZooForCausalLM(
        SeqZooConfig(
            hidden_size=64,
            vocab_size=50,
            num_hidden_layers=4,
            pattern=["full/mlp", "full/monotone"],
            mixers=dict(full=dict(kind="attention", num_heads=2, num_kv_heads=1, head_width=16)),
            channels=dict(mlp=dict(kind="swiglu", width=64), monotone=dict(kind="monotone_mlp", width=96) | changes),
        )
    )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_in_a_model_where_the_pattern_says(weights):
    """Every other block; drawn by the part itself, not as a matrix; and it learns, signs kept."""
    ours = model(weights=weights)
    parts = [block.channel for block in ours.stack.blocks]
    assert [type(part).__name__ for part in parts] == ["SwiGLU", "MonotoneMLP"] * 2
    _, mean, std, *_ = WEIGHTS[weights]
    for part in parts[1::2]:
        assert abs(part.up_raw.mean() - mean) < 0.1 * std and 0.95 < part.up_raw.std() / std < 1.05
        assert part.up_bias.abs().max() == part.down_bias.abs().max() == 0
    x = torch.randint(50, (1, 10)).repeat(4, 4)
    optimizer, losses = torch.optim.AdamW(ours.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = ours(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    a, b = pairs(500, 64)
    assert not any(falls(part.double(), a, b) for part in parts[1::2])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(width=0), "width: expected a whole number, at least 1, got 0"),
        (dict(width=2.5), "width: expected a whole number, got 2.5"),
        (dict(weights=["square"]), "weights: expected text, got .'square'"),
        (dict(weights="abs"), r"weights: expected one of \['softplus', 'square'\], got 'abs'"),
        (dict(activation="gelu"), "activation: expected one of .* got 'gelu'"),
    ],
    ids=str,
)
def test_errors_name_the_argument(wrong, message):
    with pytest.raises(ValueError, match=f"monotone_mlp: {message}"):
        build("channels", dict(kind="monotone_mlp", width=4) | wrong, D)
