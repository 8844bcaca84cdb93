"""Momentum attention beyond the laws of every mixer: the shear as a filter, what it leaves alone, and induction."""

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from seqzoo.layers import Attention, MomentumAttention
from seqzoo.layers.mixers.momentum_attention import SHEARS, shear
from seqzoo.layers.span import Span

B, T, D = 2, 11, 16
HEADS = dict(num_heads=4, num_kv_heads=2, head_width=6)
GAMMAS = [0.1, 0.5, 1.0, 2.0, 4.17]
EXACT = dict(atol=1e-10, rtol=1e-10)


def layer(*, width=D, **options):
    part = MomentumAttention(width, **{**HEADS, "gamma": 1.5, **options}).double()
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return part


@pytest.mark.parametrize("first", ["zero_momentum", "zero_input"])
@pytest.mark.parametrize("placement, which", [*product(["post", "pre"], SHEARS)])
@pytest.mark.parametrize(
    "options", [{}, dict(window=4, qk_norm="zero_centred", temperature=True)], ids=["plain", "window"]
)
def test_without_gamma_it_is_attention_to_the_bit(placement, which, first, options):
    ours = layer(gamma=0.0, placement=placement, shear=which, first=first, **options)
    plain = Attention(D, **HEADS, **{name: x for name, x in options.items() if name != "temperature"}).double()
    plain.load_state_dict(ours.state_dict())
    x, valid = torch.randn(B, T, D).double(), torch.arange(T).expand(B, -1) > 1
    starts = torch.arange(T).expand(B, -1) == 5
    positions = torch.arange(T).expand(B, -1)
    for span in (None, Span(positions, valid), Span(positions, starts=starts)):
        states = [part.init_state(B, device=x.device, dtype=x.dtype) for part in (ours, plain)]
        assert torch.equal(ours(x, span)[0], plain(x, span)[0])
        for span_, piece in ((span, x), (None, x[:, :1])):
            (y, states[0]), (z, states[1]) = ours(piece, span_, states[0]), plain(piece, span_, states[1])
            assert torch.equal(y, z)


@pytest.mark.parametrize("gamma", [*GAMMAS, -0.4])
def test_gain_and_phase(gamma):
    """e^{iwt} comes out as H(w) e^{iwt}, H = 1 + gamma (1 - e^{-iw}), behind the first token."""
    for w in (0.0, 0.3, 1.0, 2.0, math.pi):
        wave = torch.exp(1j * w * torch.arange(T, dtype=torch.float64))[None, :, None, None].expand(B, T, 1, 1)
        out = torch.complex(*(shear(part, gamma) for part in (wave.real, wave.imag)))
        gain = (out / wave)[:, 1:]
        assert_close(gain.abs().square(), torch.full_like(gain.real, 1 + 2 * gamma * (1 + gamma) * (1 - math.cos(w))))
        assert_close(gain, torch.full_like(gain, 1 + gamma * (1 - complex(math.cos(w), -math.sin(w)))))


def test_gain_at_rest_and_at_its_fastest():
    still, alternating = torch.ones(B, T, 1, 1), torch.tensor([1.0, -1.0]).repeat(T)[:T, None, None].expand(B, T, 1, 1)
    assert_close(shear(still, 1.5), still)
    assert_close(shear(alternating, 1.5)[:, 1:], (4 * alternating)[:, 1:])
    assert_close(shear(alternating, -0.4)[:, 1:], (0.2 * alternating)[:, 1:])  # lowered


def test_the_first_token():
    x, gamma = torch.randn(B, T, 2, 3), torch.tensor([[0.3], [2.0]])
    borders = (torch.arange(T) == 6).expand(B, -1)
    assert torch.equal(shear(x, gamma, borders=borders)[:, [0, 6]], x[:, [0, 6]])
    assert_close(shear(x, gamma, borders=borders, first="zero_input")[:, [0, 6]], ((1 + gamma) * x)[:, [0, 6]])
    for first in ("zero_momentum", "zero_input"):
        y = shear(x, gamma, borders=borders, first=first)
        assert_close(y[:, 7], (1 + gamma) * x[:, 7] - gamma * x[:, 6])
        assert_close(y[:, 6:], shear(x[:, 6:], gamma, first=first))
        rest = shear(x[:, 3:], gamma, last=x[:, 2], begun=torch.tensor([True, False]), first=first)
        assert_close(shear(x, gamma, first=first)[0, 3:], rest[0])
        assert_close(shear(x[:, 3:], gamma, first=first)[1], rest[1])


def test_the_adjoint():
    """dx_t = (1 + gamma) dy_t - gamma dy_{t+1}; the first token's own tap is 1."""
    x, dy, gamma = torch.randn(B, T, 2, 3).double().requires_grad_(), torch.randn(B, T, 2, 3).double(), 0.7
    (dx,) = torch.autograd.grad(shear(x, gamma), x, dy)
    want = (1 + gamma) * dy - gamma * torch.cat([dy[:, 1:], torch.zeros_like(dy[:, :1])], 1)
    want[:, 0] -= gamma * dy[:, 0]
    assert_close(dx, want)


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_only_relative_positions_matter(placement):
    part, x = layer(placement=placement), torch.randn(B, T, D).double()
    positions = torch.arange(T).expand(B, -1)
    ours, plain = (p(x, Span(positions + 37))[0] - p(x, Span(positions))[0] for p in (part, layer(gamma=0.0)))
    assert ours.abs().max() < 1e-5 and plain.abs().max() > 1e-8  # angles are in fp32, there too
    assert not torch.allclose(part(x, Span(2 * positions))[0], part(x, Span(positions))[0])


def test_where_the_turn_stands():
    """A token that repeats has momentum if its turns are compared, and none before them."""
    x = torch.randn(B, 1, D).double().expand(B, T, D)
    for placement, same in (("pre", True), ("post", False)):
        ours = layer(placement=placement)
        still = layer(placement=placement, gamma=0.0)
        still.load_state_dict(ours.state_dict())
        seen = []
        for part in (ours, still):
            part.look = lambda q, k, v, *_, seen=seen: seen.append(k) or (torch.zeros_like(q), None)
            part(x)
        assert torch.allclose(*seen) == same


def test_each_key_head_has_its_gamma():
    """And its query heads share it."""
    part, x = layer(learned=True), torch.randn(B, T, D).double()
    with torch.no_grad():
        part.gamma.copy_(torch.tensor([0.0, 2.0]))
    q, (k, _) = part.queries(x), part.keys(x)
    span = Span.whole(x)
    new_q, new_k = part._shear(q, k, span, None)
    assert torch.equal(new_q[:, :, :2], q[:, :, :2]) and torch.equal(new_k[:, :, :1], k[:, :, :1])
    assert_close(new_q[:, :, 2:], shear(q[:, :, 2:], 2.0))
    assert_close(new_k[:, :, 1:], shear(k[:, :, 1:], 2.0))


@pytest.mark.parametrize("which, sides", [("qk", 2), ("k_only", 1), ("q_only", 1)])
def test_temperature_takes_the_growth_back(which, sides):
    """Of logits of uncorrelated neighbours: the spread is that of no shear."""
    torch.manual_seed(0)
    part = layer(width=256, gamma=1.3, shear=which, temperature=True, rotary_width=0)
    x = torch.randn(4, 400, 256).double()
    q, (k, _) = part.queries(x), part.keys(x)
    new_q, new_k = part._shear(q, k, Span.whole(x), None)
    spread = lambda q, k: torch.einsum("btk,bsk->bts", q[:, :, 0], k[:, :, 0]).std()
    assert_close(spread(new_q, new_k), spread(q, k), rtol=0.05, atol=0)
    growth = 2.3**2 + 1.3**2
    assert_close(
        spread(*_without_temperature(part, q, k, x)) / spread(new_q, new_k),
        torch.tensor(growth ** (sides / 2)).double(),
    )


def _without_temperature(part, q, k, x):
    part.temperature = False
    return part._shear(q, k, Span.whole(x), None)


def test_the_law_of_depth():
    law = {1: 4.17, 2: 2.50, 3: 1.85, 4: 1.49, 6: 1.11, 8: 0.90, 12: 0.66, 24: 0.40}
    for depth, gamma in law.items():
        assert round(MomentumAttention(D, **HEADS, law_depth=depth).start, 2) == gamma
    learned = MomentumAttention(D, **HEADS, law_depth=4, learned=True)
    assert_close(learned.gamma.detach(), torch.full((2,), 4.17 * 4**-0.74))


def hand_built(vocab, sign, shear, gamma, keys_only_of=None):
    """One head, no positions, on one-hot tokens: a token's key is `sign` times its query, its value is itself."""
    part = MomentumAttention(
        vocab, num_heads=1, num_kv_heads=1, head_width=vocab, rotary_width=0, gamma=gamma, shear=shear
    ).double()
    eye = torch.eye(vocab).double()
    with torch.no_grad():
        matched = eye if keys_only_of is None else eye * (torch.arange(vocab) < keys_only_of)
        part.q_proj.weight.copy_(40.0 * matched)
        part.k_proj.weight.copy_(sign * matched)
        part.v_proj.weight.copy_(eye)
        part.out_proj.weight.copy_(eye)
    return part


def induction(n=256, vocab=64, length=32):
    """Tokens all different, then one of them again, but not the last: the next is what followed it."""
    tokens = torch.stack([torch.randperm(vocab)[:length] for _ in range(n)])
    at = torch.randint(length - 1, (n, 1))
    return torch.cat([tokens, tokens.gather(1, at)], 1), tokens.gather(1, at + 1)[:, 0]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_layer_does_induction_with_keys_alone(gamma):
    """A kernel that repels the same token, -c, sends the query to what came behind it: +gamma c."""
    tokens, target = induction()
    x = torch.eye(64).double()[tokens]
    with torch.no_grad():
        right = {which: hand_built(64, -1.0, which, gamma)(x)[0][:, -1] for which in SHEARS}
    assert (right["k_only"].argmax(-1) == target).all()
    both = right["qk"].gather(1, torch.stack([target, tokens[:, -2]], 1))
    assert_close(both[:, 0], both[:, 1])  # a tie with the token before the query
    assert (right["q_only"].argmax(-1) == target).double().mean() < 0.1


@pytest.mark.parametrize("which", ["qk", "k_only"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_layer_recalls_pairs(which, gamma):
    """16 keys, each before its value, of vocabularies apart: no tie, as values have no kernel."""
    n, pairs = 256, 16
    keys, values = (torch.stack([torch.randperm(32)[:pairs] for _ in range(n)]) for _ in range(2))
    at = torch.randint(pairs, (n, 1))
    tokens = torch.cat([torch.stack([keys, 32 + values], 2).flatten(1), keys.gather(1, at)], 1)
    with torch.no_grad():
        y, _ = hand_built(64, -1.0, which, gamma, keys_only_of=32)(torch.eye(64).double()[tokens])
    assert (y[:, -1].argmax(-1) == 32 + values.gather(1, at)[:, 0]).all()
    with torch.no_grad():
        y, _ = hand_built(64, -1.0, which, 0.0, keys_only_of=32)(torch.eye(64).double()[tokens])
    assert (y[:, -1].argmax(-1) == 32 + values.gather(1, at)[:, 0]).double().mean() < 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gamma=None), "expected one of gamma and law_depth, got gamma=None, law_depth=None"),
        (dict(law_depth=3), "expected one of gamma and law_depth, got gamma=1.5, law_depth=3"),
        (dict(gamma=-0.1), "gamma: expected 0 or more, or allow_negative, got -0.1"),
        (dict(gamma=math.nan, allow_negative=True), "gamma: expected a finite number, got nan"),
        (dict(gamma=None, law_depth=0), "law_depth: expected 1 layer or more, got 0"),
        (dict(shear="v"), r"shear: expected one of \['qk', 'q_only', 'k_only'\], got 'v'"),
        (dict(placement="both"), r"placement: expected one of \['post', 'pre'\], got 'both'"),
        (dict(first="zero"), "first: expected one of .*, got 'zero'"),
        (dict(window=0), "momentum_attention: window=0 is not a number of tokens"),
        (dict(window=2.5), "window: expected a whole number or null, got 2.5"),
        (dict(rope_theta=0), "rope_theta=0 is not above 0"),
        (dict(num_heads=4.0), "num_heads: expected a whole number, got 4.0"),
        (dict(num_heads=0), "num_heads=0 is not 1 or more, and whole"),
        (dict(gamma="1"), "gamma: expected a number or null, got '1'"),
        (dict(gamma=True), "gamma: expected a number or null, got True"),
        (dict(gamma=None, law_depth=2.5), "law_depth: expected a whole number or null, got 2.5"),
        (dict(learned="yes"), "learned: expected true or false, got 'yes'"),
        (dict(shear=None), "shear: expected text, got None"),
        (dict(out_bias=0), "out_bias: expected true or false or null, got 0"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"momentum_attention: {message.removeprefix('momentum_attention: ')}"):
        layer(**options)


def test_states_do_not_hold_the_prompt():
    """What is kept of the last token is a copy, no view of all queries; and nothing where that side is not sheared."""
    x = torch.randn(B, 50, D)
    for which, (queries, keys) in SHEARS.items():
        part = MomentumAttention(D, **HEADS, gamma=1.0, shear=which)
        _, state = part(x, state=part.init_state(B, device=x.device, dtype=x.dtype))
        assert state.q.untyped_storage().nbytes() == 4 * B * 6 * 4 * queries
        assert state.k.untyped_storage().nbytes() == 4 * B * 6 * 2 * keys


def test_a_call_that_is_all_padding():
    """The first real token comes in a later call, and still has nothing before it."""
    part, x = layer(), torch.randn(B, T, D).double()
    state = part.init_state(B, device=x.device, dtype=x.dtype)
    nothing = torch.zeros(B, 4, dtype=torch.int64)
    _, state = part(torch.randn(B, 4, D).double(), Span(nothing, nothing.bool()), state)
    y, _ = part(x, Span.whole(x), state)
    assert_close(y, part(x)[0], **EXACT)
