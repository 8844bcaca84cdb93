"""SpikingBrain: the published sizes, and the 7B's checkpoint folders against the formulas, written out as loops."""

import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import seqzoo  # noqa: F401 - makes the auto classes know ours
from seqzoo.models import SeqZooConfig, SeqZooForCausalLM
from seqzoo.models.checkpoints import Folder
from seqzoo.models.convert import convert, gla_swa
from seqzoo.models.cost import cost
from seqzoo.train import model_config

D, V, HEADS, GROUPS, MLP, WINDOW, RANK = 24, 53, 4, 2, 20, 5, 16
WIDTH = D // HEADS
CONFIG = dict(  # the fields of the released file
    architectures=["GLAswaForCausalLM"], auto_map={"AutoConfig": "configuration_gla_swa.GLAswaConfig"},
    attention_dropout=0.0, attn_layers=[1, 3], attn_mode="chunk", bos_token_id=1, conv_size=4, elementwise_affine=True,
    eos_token_id=1, fuse_cross_entropy=True, hidden_act="swish", hidden_size=D, initializer_range=0.02,
    intermediate_size=MLP, max_position_embeddings=128, model_type="gla_swa", norm_eps=1e-5, num_attention_heads=HEADS,
    num_hidden_layers=4, num_key_value_heads=GROUPS, rope_theta=500.0, sliding_window=WINDOW,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.45.0", use_cache=True,
    use_short_conv=False, vocab_size=V,
)  # fmt: skip


def config(name):
    with initialize_config_module("seqzoo.configs", version_base=None):
        return model_config(compose("train", [f"model={name}"]))


def shapes(depth=4):
    """Names and shapes of the released checkpoint, at our size."""
    made = {"model.embeddings.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(depth):
        layer = {
            "attn_norm.weight": (D,), "mlp_norm.weight": (D,), "attn.q_proj.weight": (D, D), "attn.q_proj.bias": (D,),
            "attn.o_proj.weight": (D, D), "mlp.gate_proj.weight": (MLP, D), "mlp.up_proj.weight": (MLP, D),
            "mlp.down_proj.weight": (D, MLP),
        }  # fmt: skip
        for x in "kv":
            layer |= {f"attn.{x}_proj.weight": (GROUPS * WIDTH, D), f"attn.{x}_proj.bias": (GROUPS * WIDTH,)}
        if i % 2 == 0:
            layer |= {
                "attn.gk_proj.0.weight": (RANK, D), "attn.gk_proj.1.weight": (GROUPS * WIDTH, RANK),
                "attn.gk_proj.1.bias": (GROUPS * WIDTH,), "attn.g_norm.weight": (WIDTH,),
            }  # fmt: skip
        made |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return made


def folder(path: Path, dtype=torch.bfloat16, extra=None, depth=4, **fields) -> Path:
    path.mkdir()
    changed = dict(num_hidden_layers=depth, attn_layers=list(range(1, depth, 2))) | fields
    text = json.dumps({k: v for k, v in (CONFIG | changed).items() if v != "absent"}, indent=2)
    (path / "config.json").write_text(text)
    torch.manual_seed(1)
    tensors = {name: (0.3 * torch.randn(shape)).to(dtype) for name, shape in shapes(depth).items()}
    if fields.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    save_file(tensors | (extra or {}), path / "model.safetensors", metadata={"format": "pt"})
    return path


def rms(x, weight):
    return weight * x / math.sqrt(sum(a * a for a in x.tolist()) / len(x) + CONFIG["norm_eps"])


def linear_layer(xs, w):
    """One memory per query head, as the formula has it, token by token."""
    S, ys = torch.zeros(HEADS, WIDTH, WIDTH, dtype=torch.double), []
    for x in xs:
        q, k, v = (w[f"{n}_proj.weight"] @ x + w[f"{n}_proj.bias"] for n in "qkv")
        q, k = q.clamp(min=0), k.clamp(min=0)
        a = w["gk_proj.1.weight"] @ (w["gk_proj.0.weight"] @ x) + w["gk_proj.1.bias"]
        fade = a.sigmoid() ** (1 / 16)
        o = []
        for h in range(HEADS):
            part = slice(h * GROUPS // HEADS * WIDTH, (h * GROUPS // HEADS + 1) * WIDTH)
            S[h] = fade[part, None] * S[h] + torch.outer(k[part], v[part])
            o.append(rms(q[h * WIDTH : (h + 1) * WIDTH] @ S[h] / math.sqrt(WIDTH), w["g_norm.weight"]))
        ys.append(w["o_proj.weight"] @ torch.cat(o))
    return ys


def window_layer(xs, w):
    """Token t sees t - WINDOW + 1 to t."""

    def turned(head, t):
        half, out = WIDTH // 2, head.clone()
        for i in range(half):
            angle = t * CONFIG["rope_theta"] ** (-2 * i / WIDTH)
            a, b = head[i], head[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    q, k, v = ([w[f"{n}_proj.weight"] @ x + w[f"{n}_proj.bias"] for x in xs] for n in "qkv")
    ys = []
    for t in range(len(xs)):
        o = []
        for h in range(HEADS):
            part = slice(h * GROUPS // HEADS * WIDTH, (h * GROUPS // HEADS + 1) * WIDTH)
            mine, seen = turned(q[t][h * WIDTH : (h + 1) * WIDTH], t), range(max(0, t - WINDOW + 1), t + 1)
            scores = torch.stack([mine @ turned(k[s][part], s) for s in seen]) / math.sqrt(WIDTH)
            o.append(sum(p * v[s][part] for p, s in zip(scores.softmax(0), seen, strict=True)))
        ys.append(w["o_proj.weight"] @ torch.cat(o))
    return ys


def logits_by_hand(tensors, ids, depth=4):
    """[T] -> [T, V], in fp64 and from the formulas alone."""
    w = {name: x.double() for name, x in tensors.items()}
    h = [w["model.embeddings.weight"][i] for i in ids]
    for i in range(depth):
        own = {n.removeprefix(f"model.layers.{i}."): x for n, x in w.items() if n.startswith(f"model.layers.{i}.")}
        attn = {n.removeprefix("attn."): x for n, x in own.items() if n.startswith("attn.")}
        ys = (window_layer if i % 2 else linear_layer)([rms(x, own["attn_norm.weight"]) for x in h], attn)
        h = [x + y for x, y in zip(h, ys, strict=True)]
        for t, x in enumerate(h):
            u = rms(x, own["mlp_norm.weight"])
            gate = own["mlp.gate_proj.weight"] @ u
            inner = gate * gate.sigmoid() * (own["mlp.up_proj.weight"] @ u)
            h[t] = x + own["mlp.down_proj.weight"] @ inner
    head = w.get("lm_head.weight", w["model.embeddings.weight"])
    return torch.stack([head @ rms(x, w["model.norm.weight"]) for x in h])


def assert_same_folder(one: Path, other: Path):
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("depth, fields", [(4, {}), (3, dict(tie_word_embeddings=True))], ids=["", "tied"])
def test_logits_are_the_formulas(tmp_path, depth, fields):
    theirs = folder(tmp_path / "theirs", torch.float32, depth=depth, **fields)
    convert(theirs, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.double)
    ids = torch.randint(V, (2, 13))
    tensors = load_file(theirs / "model.safetensors")
    wanted = torch.stack([logits_by_hand(tensors, row.tolist(), depth) for row in ids])
    assert_close(ours(ids).logits, wanted, atol=1e-5, rtol=1e-5)  # memories are fp32
    with torch.no_grad():
        first = ours(ids[:, :6], use_cache=True)
        pieces, past = [first.logits], first.past_key_values
        for t in range(6, 13):
            step = ours(ids[:, t : t + 1], past_key_values=past, use_cache=True)
            pieces.append(step.logits)
    assert_close(torch.cat(pieces, 1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_way_back_is_identical(tmp_path, dtype, depth):
    """Also of what is beside the weights; and a folder without the origin's record gives the same tensors."""
    theirs = folder(tmp_path / "theirs", dtype, depth=depth)
    (theirs / "tokenizer_config.json").write_text("{}")
    convert(theirs, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_folder(theirs, tmp_path / "back")
    (tmp_path / "ours" / "seqzoo_origin.json").unlink()
    convert(tmp_path / "ours", tmp_path / "fresh", to="gla_swa")
    a, b = load_file(theirs / "model.safetensors"), load_file(tmp_path / "fresh" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    ours = gla_swa.to_ours(json.loads((theirs / "config.json").read_text()))
    assert gla_swa.to_ours(json.loads((tmp_path / "fresh" / "config.json").read_text())).to_dict() == ours.to_dict()


def test_the_published_config_is_our_yaml():
    """Their class's defaults are the 7B's fields."""
    published = dict(model_type="gla_swa", attn_layers=list(range(1, 28, 2)), torch_dtype="bfloat16")
    ours, yaml = gla_swa.to_ours(published), config("spikingbrain_7b")
    yaml.mixers["window"]["rotary_width"] = 128
    assert (ours.pattern, ours.mixers, ours.channels) == (yaml.pattern, yaml.mixers, yaml.channels)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "norm", "norm_eps", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(yaml, name), name


def test_what_was_made_here_goes_there(tmp_path):
    SeqZooForCausalLM(config("spikingbrain_nano")).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["model_type"] == "gla_swa" and written["attn_layers"] == [1, 3] and written["sliding_window"] == 128
    assert "model.layers.2.attn.gk_proj.1.bias" in Folder(tmp_path / "theirs").heads


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(use_short_conv=True), "use_short_conv: expected False, got True"),
        (dict(hidden_act="gelu"), "hidden_act: expected 'swish', got 'gelu'"),
        (dict(attention_dropout=0.1), "attention_dropout: expected 0, got 0.1"),
        (dict(elementwise_affine=False), "elementwise_affine"),
        (dict(rope_scaling={"type": "yarn"}), "rope_scaling: expected None"),
        (dict(quant_weight_group_size=128), "quant_weight_group_size: expected None, got 128"),
        (dict(attn_layers=[0, 2]), r"attn_layers: expected \[1, 3\], which they derive, got \[0, 2\]"),
        (dict(attn_gate=True), r"no field of gla_swa that is known: \['attn_gate'\]"),
        (dict(num_attention_heads=5), "num_attention_heads: expected heads of an even width in hidden_size=24, got 5"),
        (dict(num_attention_heads=8), "num_attention_heads: expected heads of an even width"),
        (dict(num_hidden_layers=0), "num_hidden_layers: expected 1 or more, got 0"),
        (dict(num_key_value_heads=3), "num_kv_heads=3"),
        (dict(num_key_value_heads="2"), "num_key_value_heads: expected 1 or more, or null, got '2'"),
        (dict(norm_eps=None), "norm_eps: expected a number above 0, got None"),
        (dict(rope_theta="x"), "rope_theta: expected a number above 0, got 'x'"),
    ],
    ids=str,
)
def test_what_ours_lacks_is_refused_by_name(tmp_path, change, named):
    theirs = folder(tmp_path / "theirs")
    (theirs / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=named):
        convert(theirs, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("field", ["attn_layers", "attn_mode", "use_cache", "torch_dtype"])
def test_a_field_may_be_absent(tmp_path, field):
    theirs = folder(tmp_path / "theirs", **{field: "absent"})
    convert(theirs, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_folder(theirs, tmp_path / "back")


@pytest.mark.parametrize(
    "extra", ["model.layers.0.attn.q_proj.weight_quantizer.scales", "model.layers.2.attn.gk_proj.weight"]
)
def test_quantized_folders_are_refused(tmp_path, extra):
    theirs = folder(tmp_path / "theirs", extra={extra: torch.ones(3)})
    with pytest.raises(ValueError, match=f"{extra}: expected plain weights, got those of a quantized .W8ASpike."):
        convert(theirs, tmp_path / "ours")


def test_a_missing_tensor_is_named(tmp_path):
    theirs = folder(tmp_path / "theirs")
    tensors = load_file(theirs / "model.safetensors")
    del tensors["model.layers.2.attn.g_norm.weight"]
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(ValueError, match="missing: model.layers.2.attn.g_norm.weight"):
        convert(theirs, tmp_path / "ours")


@pytest.mark.parametrize(
    "part, change, named",
    [
        ("linear", dict(feature="elu"), "layer 0 mixer feature: 'elu', not 'relu'"),
        ("linear", dict(output_gate=True), "output_gate"),
        ("linear", dict(decay_rank=8), "decay_rank: 8, not 16"),
        ("linear", dict(num_heads=8), "config.json: num_attention_heads.*got 8"),
        ("window", dict(qk_norm="zero_centred"), "qk_norm"),
        ("window", dict(out_bias=None), "out_bias"),
        ("window", dict(rotary_width=2), "rotary_width: 2, not 6"),
        ("mlp", dict(kind="moe"), "layer 0, .*moe"),
        ("norm", "zero_centred", "norm: 'zero_centred', not 'rms'"),
    ],
    ids=str,
)
def test_what_theirs_cannot_express_is_named(part, change, named):
    ours = gla_swa.to_ours(CONFIG)
    if part == "norm":
        ours.norm = change
    else:
        {**ours.mixers, **ours.channels}[part].update(change)
    with pytest.raises(ValueError, match=f"SpikingBrain-7B cannot express: .*{named}"):
        gla_swa.to_theirs(ours)


def test_two_linear_layers_in_turn_are_refused():
    ours = SeqZooConfig.from_dict(gla_swa.to_ours(CONFIG).to_dict() | dict(pattern=["linear/mlp"]))
    with pytest.raises(ValueError, match=r"layer 1, \['linear_attention', 'swiglu'\]; it has \['attention', "):
        gla_swa.to_theirs(ours)


def test_published_size_of_the_7b():
    """Its parameters counted from the published table of tensors, and what it keeps however long the sequence."""
    D, I, V, kv, rank = 3584, 18944, 152064, 512, 16
    layer = 2 * D + 2 * D * D + D + 2 * (kv * D + kv) + 3 * I * D
    linear = rank * D + kv * rank + kv + 128
    counted = cost(config("spikingbrain_7b"), context=131_072)
    assert counted.parameters == 28 * layer + 14 * linear + 2 * V * D + D == 7_616_542_976
    assert counted.active_parameters == counted.parameters
    linear, window = 4 * 128 * 128 * 4 + 8, 2 * 4 * 128 * 4096 * 2 + 4096 + 16  # counters, and what may be seen
    assert counted.state_bytes == 14 * (linear + window)  # 3.5 MiB and 112 MiB but for those


def test_reported_size_of_the_76b():
    """76 B of them, 12 B touched by a token; full-width experts are what makes it so."""
    ours = config("spikingbrain_76b_a12b")
    counted = cost(ours, context=4096)
    assert 76e9 < counted.parameters < 77e9 and 11.9e9 < counted.active_parameters < 12.8e9
    expert = 3 * 3584 * 18944
    assert counted.parameters - counted.active_parameters == 21 * 15 * expert
    layers = range(1, 29)
    assert [i for i, entry in zip(layers, ours.pattern, strict=True) if entry.endswith("/mlp")] == [
        1,
        2,
        3,
        5,
        7,
        9,
        11,
    ]
    assert [i for i, entry in zip(layers, ours.pattern, strict=True) if entry.startswith("far/")] == [7, 14, 21, 28]
    assert ours.mixers["far"]["branches"]["full"]["window"] is None
    assert ours.mixers["far"]["branches"]["linear"] == ours.mixers["near"]["branches"]["linear"]
