"""W8ASpike: what rounding does to weights and models, and that a quantised model is a model like any other."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import traced
from hydra import compose, initialize_config_dir
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from seqzoo.kernels import native
from seqzoo.kernels.dispatch import use_backend
from seqzoo.kernels.spike import spike
from seqzoo.kernels.spike.reference import dequantised
from seqzoo.layers.linear import Linear
from seqzoo.layers.rounding import DAMPING, moments_of, quantised
from seqzoo.layers.spike_linear import W8ASpike, W8ASpikeExperts, W8ASpikeStack
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.cost import cost
from seqzoo.models.quantise import moments, quantisation_spec, quantise
from seqzoo.models.spiking import spike_report
from seqzoo.models.upcycle import upcycle
from seqzoo.train import model_config

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = ["transformer", "qwen3_next_nano", "spiking_nano"]
HALF = torch.bfloat16


def config(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return model_config(compose("train", [f"model={name}", *overrides]))


def model(name, *overrides):
    torch.manual_seed(0)
    ours = SeqZooForCausalLM(config(name, *overrides)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return ours


def ids(*shape):
    return torch.randint(0, 264, shape)


# Weights


@pytest.mark.parametrize(
    "shape, group", [((5, 128), 128), ((3, 200), 128), ((2, 4, 37), 16), ((6, 3), 1), ((1, 9), 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16, torch.float64], ids=str)
def test_weights_are_off_by_half_a_step(shape, group, dtype):
    weight = torch.randn(shape).mul(torch.logspace(-2, 1, shape[-1])).to(dtype)
    whole, scales = quantised(weight, group)
    assert whole.dtype == torch.int8 and whole.shape == weight.shape and scales.dtype == dtype
    assert scales.shape == (*shape[:-1], -(-shape[-1] // group))
    assert whole.min() >= -127
    step = scales.double().repeat_interleave(group, -1)[..., : shape[-1]]
    error = (dequantised(whole, scales, group).double() - weight.double()).abs()
    slack = 1e-5 if dtype in (torch.float32, torch.float64) else 0.6  # the largest, under a scale that was rounded down
    assert (error <= step * (0.5 + slack)).all()
    again, same = quantised(dequantised(whole, scales.float(), group).to(torch.float32), group)
    assert dtype != torch.float32 or torch.equal(again, whole)


def test_nothing_but_zeros():
    weight = torch.zeros(3, 8)
    weight[1, 5] = 2.0
    whole, scales = quantised(weight, 4)
    assert torch.equal(dequantised(whole, scales, 4), weight)
    assert (scales > 0).all()


def test_scales_that_are_hardly_numbers():
    """In float16 they have a single digit here: the largest weights are cut off, and none changes its sign."""
    weight = torch.tensor([[1e-5, -1e-5, 3e-6, 0.0]], dtype=torch.float16)
    whole, _ = quantised(weight, 4)
    assert whole[0, 0] == 127 and whole[0, 1] == -127 and 0 < whole[0, 2] < 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad):
    weight = torch.zeros(3, 8)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match=f"quantise: expected finite weights, got {bad}"):
        quantised(weight, 4)


def in_turn(weight, scales, moments):
    """By its definition: after a channel is rounded, the rest moves to where the whole's error is least."""
    left, damped = weight.double().clone(), moments.double()
    squares = damped.diagonal()
    damped = damped + torch.diag(torch.where(squares == 0, 1.0, DAMPING * squares[squares > 0].mean()))
    steps = torch.empty_like(left)
    for j in range(len(damped)):
        steps[:, j] = (left[:, j] / scales).round().clamp(-127, 127)
        error = left[:, j] - steps[:, j] * scales
        rest = damped[j:, j:]
        left[:, j + 1 :] += error[:, None] * torch.linalg.solve(rest[1:, 1:], rest[1:, 0])
    return steps


def inputs_that_go_together(rows, width):
    return torch.randn(rows, 3) @ torch.randn(3, width) + 0.1 * torch.randn(rows, width)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float64], ids=str)
def test_errors_make_up_for_each_other(dtype):
    """Group by group as defined, and on the inputs that were seen far nearer than to the nearest step."""
    x = inputs_that_go_together(400, 37)
    x[:, 5] = 0  # is never given
    weight, seen = torch.randn(70, 37).to(dtype), moments_of(x, 16)
    whole, scales = quantised(weight, 16, seen)
    nearest, same = quantised(weight, 16)
    assert torch.equal(scales, same) and torch.equal(whole[:, 5], nearest[:, 5]) and not torch.equal(whole, nearest)
    for g, a in enumerate(range(0, 37, 16)):
        b = min(37, a + 16)
        expected = in_turn(weight[:, a:b], scales[:, g].double(), seen[g, : b - a, : b - a])
        # in fp32 a weight may be so near the middle of two steps that it goes the other way, and those after it too
        assert (whole[:, a:b].double() == expected).all(-1).double().mean() > (0.999 if dtype == torch.float64 else 0.9)
    error = lambda steps: ((dequantised(steps, scales, 16).double() - weight.double()) @ x.double().T).norm()
    assert error(whole) < 0.5 * error(nearest)


def test_moments():
    """Of stacks each its own; none at all is the nearest step."""
    x, weight = inputs_that_go_together(50, 24), torch.randn(3, 9, 24)
    assert_close(moments_of(x, 16)[0], x[:, :16].T @ x[:, :16], atol=1e-4, rtol=1e-5)
    seen = torch.stack([moments_of(x, 16), 0 * moments_of(x, 16), moments_of(x.flip(0, 1), 16)])
    whole, scales = quantised(weight, 16, seen)
    for e in range(3):
        alone = quantised(weight[e], 16, seen[e])
        assert torch.equal(whole[e], alone[0]) and torch.equal(scales[e], alone[1])
    assert torch.equal(whole[1], quantised(weight[1], 16)[0])
    with pytest.raises(ValueError, match="quantise: expected finite inputs of a projection"):
        quantised(weight, 16, seen * float("nan"))
    wide = moments_of(x, 1000)  # a group that is wider than the matrix is the matrix
    assert wide.shape == (1, 24, 24)
    assert torch.equal(quantised(weight[0], 1000, wide)[0], quantised(weight[0], 24, moments_of(x, 24))[0])


# Layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_the_layer_is_the_fake_quantised_one(dtype, bias):
    linear = Linear(300, 40, bias=bias).to(dtype)
    ours = W8ASpike(300, 40, bias=bias, k=3.0, group=128)
    ours.fill(linear)
    x = torch.randn(2, 7, 300).to(dtype)
    weight = dequantised(ours.weight, ours.scales, 128).double()
    truth = F.linear(spike(x.float()).double(), weight, None if linear.bias is None else linear.bias.double())
    error = (ours(x).double() - truth).abs().max() / truth.abs().max()
    assert ours(x).dtype == dtype and error < (1e-2 if dtype == HALF else 2e-6)
    assert (linear(x) - ours(x)).norm() < 0.1 * linear(x).norm()


def test_what_learns():
    ours, x = W8ASpike(20, 6, group=8), torch.randn(3, 20, requires_grad=True)
    ours.fill(Linear(20, 6))
    ours(x).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["bias"]
    assert_close(ours.bias.grad, torch.full((6,), 3.0))
    assert_close(x.grad, dequantised(ours.weight, ours.scales, 8).sum(0).expand(3, 20))


def test_the_layer_moves_as_a_whole():
    ours = W8ASpike(20, 6, group=8)
    ours.fill(Linear(20, 6))
    weight = ours.weight.clone()
    ours.to(HALF)
    assert ours.weight.dtype == torch.int8 and torch.equal(ours.weight, weight) and ours.scales.dtype == HALF
    assert ours(torch.randn(2, 20, dtype=HALF)).dtype == HALF
    empty = W8ASpike(20, 6, group=8)
    with pytest.raises(RuntimeError, match="scales"):
        empty.load_state_dict({**ours.state_dict(), "scales": ours.scales[:, 1:]})


def test_what_does_not_fit_the_layer():
    for group in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"group: expected a whole number of channels, at least 1, got {group}"):
            W8ASpike(9, 4, group=group)
    ours = W8ASpike(9, 4)
    with pytest.raises(ValueError, match=r"fill: weight: expected shape \(4, 9\), got \(5, 9\)"):
        ours.fill(Linear(9, 5))
    with pytest.raises(ValueError, match=r"fill: bias: expected shape \(4,\), got None"):
        ours.fill(Linear(9, 4, bias=False))
    assert ours.weight.shape == (4, 9)


def test_experts_are_the_fake_quantised_ones():
    E, D, I, N, k = 5, 40, 24, 30, 2
    gate_up, down = torch.randn(E, 2 * I, D) * 0.2, torch.randn(E, D, I) * 0.2
    ours = W8ASpikeExperts(E, D, I, k=3.0, group=16)
    ours.fill(gate_up, down)
    x, weight = torch.randn(N, D), torch.rand(N, k)
    chosen = torch.rand(N, E - 1).topk(k).indices  # the last has nothing to do
    gate_up = dequantised(ours.gate_up_proj.weight, ours.gate_up_proj.scales, 16)
    down = dequantised(ours.down_proj.weight, ours.down_proj.scales, 16)
    truth = torch.zeros_like(x)
    for n in range(N):
        for e, w in zip(chosen[n], weight[n], strict=True):
            gate, up = (gate_up[e] @ spike(x[n])).chunk(2)
            truth[n] += w * (down[e] @ spike(F.silu(gate) * up))
    with use_backend("torch"):
        assert_close(ours(x, chosen, weight), truth, atol=1e-4, rtol=1e-4)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, chosen, weight).sum(), leaf)
    assert grad.isfinite().all() and grad.abs().max() > 0
    assert ours(x[:0], chosen[:0], weight[:0]).shape == (0, D)


# Models


@pytest.mark.parametrize("name", MODELS)
def test_every_projection_is_int8(name):
    ours = model(name)
    before = {n: p.numel() for n, p in ours.named_parameters()}
    quantise(ours)
    left = [n for n, p in ours.named_parameters() if p.dtype != torch.int8 and p.ndim > 1]
    assert [n for n in left if "conv" not in n] == ["embed_tokens.weight", "lm_head.weight"]
    assert sum(p.numel() for p in ours.parameters()) == sum(before.values())
    assert cost(ours, context=64)[:3] == cost(config(name), context=64)[:3]


@pytest.mark.parametrize("name", MODELS[:2])
def test_quantised_is_near(name):
    ours, x = model(name), ids(2, 20)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.02)
    truth = ours(x).logits
    after = quantise(ours, k=50.0)(x).logits  # fine counts: what is left is the weights' error
    assert (after - truth).norm() < 0.05 * truth.norm()
    assert not torch.equal(after, truth)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_to_disk_and_back(name, dtype, tmp_path):
    """Bit for bit, as whole numbers in the files, by either way in."""
    ours, x = quantise(model(name).to(dtype), k=2.5, group=32, skip=["out_proj"]), ids(2, 12)
    ours.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantisation"]
    assert said == dict(kind="w8aspike", k=2.5, group=32, head=False, skip=["out_proj"])
    for kind in (SeqZooForCausalLM, AutoModelForCausalLM):
        back = kind.from_pretrained(tmp_path).eval()
        mine, theirs = ours.state_dict(), back.state_dict()
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert theirs[key].dtype == value.dtype and torch.equal(theirs[key], value), key
        assert torch.equal(back(x).logits, ours(x).logits)
    assert back.lm_head.weight.dtype == dtype
    out = [m.generate(x, max_new_tokens=6, do_sample=False, num_beams=2) for m in (ours, back)]
    assert torch.equal(*out)


@pytest.mark.parametrize("name", ["qwen3_next_nano", "transformer"])
def test_calibrated(name):
    """On the text, nearly every projection's outputs are nearer to what its float weights give for its spikes."""
    floats, text = model(name), ids(6, 50)
    spec = quantisation_spec(dict(group=32))
    seen = moments(floats, spec, text)
    nearest, ours = quantise(model(name), group=32), quantise(model(name), group=32, calibration=text)
    state, better = floats.state_dict(), []
    whole = {n for n, module in ours.named_modules() if isinstance(module, W8ASpike | W8ASpikeStack)}
    assert seen.keys() == whole
    for key, x in seen.items():
        weight = state[f"{key.replace('.experts.', '.')}{'' if '.experts.' in key else '.weight'}"]
        errors = []
        for made in (ours, nearest):
            module = made.get_submodule(key)
            e = weight - dequantised(module.weight, module.scales, 32)
            parts = F.pad(e, (0, -e.shape[-1] % 32)).unflatten(-1, (-1, 32)).transpose(-2, -3)  # [..., G, out, group]
            errors.append(((parts @ x) * parts).sum())
        better.append(errors[0] < errors[1])
    assert sum(better) > 0.9 * len(better)
    assert floats.config.quantisation is None and all(p.dtype != torch.int8 for p in floats.parameters())
    assert ours(text).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"calibration: expected ids \[rows, T\], got torch.float32 of shape \(3,\)"):
        quantise(model(name), calibration=torch.ones(3))
    with pytest.raises(ValueError, match="calibration: expected ids"):
        quantise(model(name), calibration=text[:, :0])


def test_a_config_builds_room_for_a_state():
    ours, x = quantise(model("qwen3_next_nano")), ids(1, 5)
    empty = SeqZooForCausalLM(ours.config).eval()
    empty.load_state_dict(ours.state_dict())
    assert torch.equal(empty(x).logits, ours(x).logits)


def test_the_file_is_a_quarter():
    wide = ["model.hidden_size=256", "model.vocab_size=32", "model.channels.mlp.width=1024"]
    ours = model("transformer", *wide)
    floats = sum(p.numel() * 4 for p in ours.parameters())
    whole = sum(t.numel() * t.element_size() for t in quantise(ours).state_dict().values())
    assert 0.25 < whole / floats < 0.28


def test_generating_with_the_cache_is_the_full_forward():
    ours, prompt = quantise(model("qwen3_next_nano")).double(), ids(2, 9)
    out = [ours.generate(prompt, max_new_tokens=10, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*out)


def test_skip_and_head():
    ours = quantise(model("qwen3_next_nano"), skip=["blocks.3", "router", "shared_gate"], head=True)
    whole = {n for n, module in ours.named_modules() if isinstance(module, W8ASpike | W8ASpikeStack)}
    assert "lm_head" in whole and "stack.blocks.0.channel.experts.down_proj" in whole
    assert not any("blocks.3" in n or "router" in n or "shared_gate" in n for n in whole)
    ours(ids(1, 4))


def test_spikes_stay_where_weights_do():
    """What quantisation skips keeps the spikes it had; the rest has those of the quantisation."""
    ours = quantise(model("spiking_nano"), skip=["out_proj"])
    rows = {row["name"]: row for row in spike_report(ours, ids(2, 8))}
    assert "stack.blocks.1.mixer.out_proj" in rows and "stack.blocks.1.mixer.q_proj" in rows
    assert "stack.blocks.0.channel.experts.gate_up_proj" in rows
    assert len(rows) == len(spike_report(model("spiking_nano"), ids(2, 8)))


def test_training_around_frozen_weights():
    """What is left to learn does, under checkpointing and autocast alike."""
    ours, x = quantise(model("qwen3_next_nano")).train(), ids(2, 9)
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()  # its name from 5.23 on
    with torch.autocast("cpu", HALF):
        ours(x, labels=x).loss.backward()
    for name, p in ours.named_parameters():
        assert (p.grad is None) == (p.dtype == torch.int8), name
        assert p.grad is None or p.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=0.0), "quantisation: k: expected a positive number, got 0.0"),
        (dict(group=0), "quantisation: group: expected 1 to 16384 channels, got 0"),
        (dict(group=1.5), "quantisation: group: expected 1 to 16384 channels, got 1.5"),
        (dict(skip=["nothing_of_that"]), "quantisation: skip: expected a pattern that is found"),
        (dict(skip=["channel.gate_up_proj"]), "expected none of a mixture's matrices or all, got not .*down_proj"),
    ],
    ids=str,
)
def test_bad_options(change, message):
    ours = model("qwen3_next_nano")
    names = list(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        quantise(ours, **change)
    assert list(ours.state_dict()) == names and ours.config.quantisation is None


def test_refusals(tmp_path):
    ours = quantise(model("transformer"))
    with pytest.raises(ValueError, match="quantise: expected a model with float weights, got .*w8aspike"):
        quantise(ours)
    with pytest.raises(ValueError, match="quantisation: kind: expected one of w8aspike, got 'gptq'"):
        SeqZooConfig(quantisation=dict(kind="gptq"))
    with pytest.raises(ValueError, match="quantisation: head: expected false where the head is the embedding"):
        quantise(model("transformer", "+model.tie_word_embeddings=true"), head=True)
    moe = dict(kind="moe", num_experts=2, num_experts_per_token=1, expert_width=8)
    with pytest.raises(ValueError, match="upcycle: expected a model with float weights"):
        upcycle(ours, moe)
    odd = model("transformer")
    odd.stack.blocks[0].mixer.own = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="quantisation: stack.blocks.0.mixer.own: expected a linear layer"):
        quantise(odd)
    quantise(odd, skip=["own"])


@pytest.mark.parametrize("drop", ["weight", "scales"])
def test_a_file_that_lacks_one_is_refused(drop, tmp_path):
    from safetensors.torch import load_file, save_file

    quantise(model("transformer")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"stack.blocks.0.mixer.q_proj.{drop}"
    whole = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensors missing: {name}"):
        SeqZooForCausalLM.from_pretrained(tmp_path)
    save_file({**tensors, name: whole[:-1].contiguous()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        SeqZooForCausalLM.from_pretrained(tmp_path)
    if drop == "weight":  # whose fractions would be cut off
        save_file({**tensors, name: whole * 0.01}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{name}: expected dtype I8 beside scales, got F32"):
            SeqZooForCausalLM.from_pretrained(tmp_path)


def test_float_weights_in_a_quantised_folder_are_refused(tmp_path):
    """A config that says int8 over a file of floats: rounding them in silence would make noise of them."""
    ours = model("transformer")
    ours.config.quantisation = dict(kind="w8aspike")
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tensors missing: .*scales"):
        SeqZooForCausalLM.from_pretrained(tmp_path)


TRACED = """
import torch
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.quantise import quantise

torch.manual_seed(0)
mixer = dict(kind="attention", num_heads=2, num_kv_heads=1, head_width=8)
parts = dict(mixers=dict(m=mixer), channels=dict(c=dict(kind="swiglu", width=24)), spikes=dict(k=3.0))
ours = SeqZooForCausalLM(SeqZooConfig(16, 32, 1, pattern=["m/c"], **parts)).double().eval()
x = torch.randint(0, 32, (2, 6))
for model in (ours, quantise(ours)):
    with torch.no_grad():
        run = lambda x: model(x, use_cache=False).logits
        torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x))
"""


def test_compiles():
    """In a process without the type checks of tests, which cannot be traced."""
    traced.passes(TRACED)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_backends_agree_on_a_model():
    ours, x = quantise(model("qwen3_next_nano")), ids(1, 5)
    fast = ours.stack.blocks[0].mixer.qkv_proj
    hidden = torch.randn(3, 128)
    with use_backend("torch"):
        slow = fast(hidden)
    assert_close(fast(hidden), slow, atol=1e-5, rtol=1e-5)
    assert ours(x).logits.isfinite().all()
