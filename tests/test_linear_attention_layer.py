"""The mixer against its formulas, token by token, whatever the options; 16 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqzoo.layers.registry import build

D, H, G, K, V = 10, 4, 2, 6, 5
FEATURES = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
    "softmax": lambda x: torch.exp(x) / torch.exp(x).sum(),
}


def mixer(**options):
    sizes = dict(num_heads=H, num_kv_heads=G, key_width=K, value_width=V, decay_rank=3)
    return build("mixers", {"kind": "linear_attention", **(sizes | options)}, D)


def turned(x, t, width, theta):
    """The first `width` channels by their angles at place t, half against half."""
    out = x.clone()
    for i in range(width // 2):
        angle = torch.tensor(t * theta ** (-2 * i / width), dtype=torch.double)
        a, b = x[i], x[i + width // 2]
        out[i], out[i + width // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def fading(part, o, x, raw_key, g):
    """Of key head g: a number, or one per channel."""
    if o["decay"] == "fixed":
        return torch.tensor(1 - 2.0 ** (-5 - g), dtype=torch.double)
    if o["decay"] == "lightning":
        return torch.tensor(-8 * g / G * (1 - o["decay_depth"]), dtype=torch.double).exp()
    if o["decay"] == "key":
        return 1 - raw_key.sigmoid()
    if o["decay"] == "head":
        return part.decay_proj(x)[g].sigmoid() ** (1 / o["decay_scale"])
    if o["decay"] == "channel":
        return part.decay_up(part.decay_down(x))[g * K : (g + 1) * K].sigmoid() ** (1 / o["decay_scale"])
    return torch.ones((), dtype=torch.double)


def by_hand(part, xs, o):
    """xs [T, D] -> [T, D], of complete options."""
    raw = torch.cat([part.q_proj(xs), part.k_proj(xs), part.v_proj(xs)], dim=-1)
    if o["conv_width"]:
        W = o["conv_width"]
        padded = torch.cat([raw.new_zeros(W - 1, raw.shape[1]), raw])
        raw = F.silu(sum(part.conv.weight[:, w] * padded[w : w + len(raw)] for w in range(W)))
    S, z, ys = torch.zeros(G, K, V).double(), torch.zeros(G, K).double(), []
    for t, x in enumerate(xs):
        q, k, v = raw[t].split([H * K, G * K, G * V])
        for g in range(G):
            raw_key = k[g * K : (g + 1) * K]
            key = turned(FEATURES[o["feature"]](raw_key), t, o["rotary_width"], o["rope_theta"])
            fade = fading(part, o, x, raw_key, g).expand(K)
            S[g] = fade[:, None] * S[g] + torch.outer(key, v[g * V : (g + 1) * V])
            z[g] = fade * z[g] + key
        out = []
        for h in range(H):
            g = h // (H // G)
            query = turned(FEATURES[o["feature"]](q[h * K : (h + 1) * K]), t, o["rotary_width"], o["rope_theta"])
            y = query @ S[g] / K**0.5
            if o["normalise"]:
                y = y / (query @ z[g] / K**0.5)
            if o["output_norm"]:
                y = part.norm.weight * y / (y.square().mean() + o["norm_eps"]).sqrt()
            if o["output_gate"]:
                y = y * F.silu(part.gate_proj(x)[h * V : (h + 1) * V])
            out.append(y)
        ys.append(part.out_proj(torch.cat(out)))
    return torch.stack(ys)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(feature="relu", decay="channel", bias=True, decay_scale=3.0),
        dict(feature="sigmoid", decay="key", bias=True, output_gate=True, norm_eps=0.1),
        dict(feature="softmax", decay="head", conv_width=3, output_norm=False),
        dict(feature="elu", decay="fixed", normalise=True),
        dict(feature="sigmoid", decay="lightning", decay_depth=0.25, normalise=True, output_norm=False),
        dict(decay="lightning", rotary_width=4, rope_theta=50.0, output_norm=False, output_gate=True),
    ],
    ids=str,
)
def test_the_layer_is_its_formulas(options):
    defaults = dict(
        feature="identity", decay="none", decay_scale=16.0, decay_depth=0.0, normalise=False, rotary_width=0,
        rope_theta=10_000.0, conv_width=0, output_norm=True, output_gate=False, norm_eps=1e-6,
    )  # fmt: skip
    part, x = mixer(**options).double(), torch.randn(1, 9, D, dtype=torch.double)
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        assert_close(part(x)[0][0], by_hand(part, x[0], defaults | options), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("output", [dict(output_norm=False), dict(output_gate=True), dict()], ids=str)
@pytest.mark.parametrize("feature", ["relu", "elu"])
def test_small_weights_have_gradients_in_fp16(feature, output):
    """Where a denominator is small the gradient is not infinite: it is divided in fp32."""
    part = mixer(feature=feature, normalise=True, **output)
    torch.nn.init.normal_(part.k_proj.weight, std=0.01)
    x = torch.randn(2, 60, D)
    x[0] *= 0.02
    part(x)[0].square().mean().backward()
    truth = {name: p.grad for name, p in part.named_parameters()}
    half = mixer(feature=feature, normalise=True, **output)
    half.load_state_dict(part.state_dict())
    half.half()(x.half())[0].float().square().mean().mul(64.0).backward()
    for name, p in half.named_parameters():
        assert p.grad.isfinite().all(), name
        assert (p.grad.float() / 64 - truth[name]).norm() < 0.05 * truth[name].norm(), name


def test_sums_beyond_fp16_are_normed():
    part, x = mixer(feature="relu"), 30 * torch.randn(1, 300, D)
    with torch.no_grad():
        want = part(x)[0]
        got = part.half()(x.half())[0]
    assert (got.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_heads=4.0), "num_heads: expected a whole number, got 4.0"),
        (dict(key_width="6"), "key_width: expected a whole number, got '6'"),
        (dict(value_width=None), "value_width: expected a whole number, got None"),
        (dict(normalise="yes"), "normalise: expected true or false, got 'yes'"),
        (dict(decay_scale="16"), "decay_scale: expected a number, got '16'"),
        (dict(rotary_width=2.0), "rotary_width: expected a whole number, got 2.0"),
        (dict(rope_theta=-1.0), "rope_theta: expected more than 0, got -1.0"),
        (dict(decay="lightning", decay_depth=1.5), "decay_depth: expected 0 to 1, got 1.5"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        mixer(**options)
