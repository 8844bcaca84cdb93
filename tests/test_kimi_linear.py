"""Kimi Linear: the published config and names, what is refused, and its parts beside what they are made from."""

import json

import pytest
import torch
from checkpoints import small
from safetensors.torch import load_file
from test_convert import assert_relative, rewrite, there_and_back
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.kernels.kimi_delta_rule import kimi_delta_rule
from seqzoo.layers import LatentAttention
from seqzoo.models.convert import convert, kimi_linear
from seqzoo.models.convert.rules import describe, differences
from seqzoo.train import named_model

SHAPE = "as published"
PUBLISHED = dict(  # Kimi-Linear-48B-A3B's config.json, what says something about shapes
    model_type="kimi_linear", hidden_act="silu", hidden_size=2304, intermediate_size=9216, kv_lora_rank=512,
    mla_use_nope=True, model_max_length=1048576, moe_intermediate_size=1024, moe_layer_freq=1, moe_renormalize=True,
    moe_router_activation_func="sigmoid", num_attention_heads=32, num_expert_group=1, num_experts=256,
    num_experts_per_token=8, num_hidden_layers=27, num_key_value_heads=32, num_shared_experts=1, q_lora_rank=None,
    qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-5, routed_scaling_factor=2.446, topk_group=1,
    use_grouped_topk=True, v_head_dim=128, vocab_size=163840, first_k_dense_replace=1, tie_word_embeddings=False,
    linear_attn_config=dict(
        full_attn_layers=[4, 8, 12, 16, 20, 24, 27], head_dim=128, num_heads=32, short_conv_kernel_size=4,
        kda_layers=[1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
    ),
)  # fmt: skip


def test_published_config_is_ours_by_name():
    here = describe(named_model("kimi_linear_48b_a3b"))
    known = {name for name in here if name.startswith("layer ") or name in ("hidden_size", "norm", "norm_eps")}
    there = describe(kimi_linear.to_ours(PUBLISHED))
    here, there = (kimi_linear._settled({name: x[name] for name in known}) for x in (here, there))
    assert differences(here, there) == []


@pytest.mark.parametrize(
    "wrong",
    [dict(mla_use_nope=False), dict(moe_router_activation_func="softmax"), dict(moe_layer_freq=2),
     dict(num_expert_group=8), dict(num_key_value_heads=8), dict(tie_word_embeddings=True), dict(hidden_act="gelu"),
     dict(quantization_config=dict(bits=8))],
    ids=str,
)  # fmt: skip
def test_what_ours_lacks_is_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"config.json: {name}: expected .*, got {value!r}".replace("{", r"\{")):
        kimi_linear.to_ours(PUBLISHED | wrong)


def test_what_theirs_lacks_is_refused():
    ours = named_model("kimi_linear_nano")
    theirs = kimi_linear.to_theirs(ours)
    assert theirs["linear_head_dim"] == 32 and theirs["routed_scaling_factor"] == 2.446
    for part, changes in (
        ("mixers.delta", dict(value_width=16)), ("mixers.full", dict(rope_theta=1e4)),
        ("mixers.delta", dict(gate_rank=8)), ("channels.moe", dict(router_score="softmax")),
        ("channels.moe", dict(bias_update_rate=0.0)),
        ("channels.moe", dict(shared_width=65)),
    ):  # fmt: skip
        family, name = part.split(".")
        other = named_model("kimi_linear_nano")
        getattr(other, family)[name] |= changes
        with pytest.raises(ValueError, match=f"Kimi Linear cannot express: .*{next(iter(changes))}"):
            kimi_linear.to_theirs(other)


def test_a_dense_layer_under_its_published_name(tmp_path):
    """transformers writes block_sparse_moe where the release has mlp: both open, and each goes back to itself."""
    theirs, ids = small("kimi_linear", SHAPE), torch.arange(12)[None]
    theirs.save_pretrained(tmp_path / "theirs")

    def published(tensors):
        for x in ("gate", "up", "down"):
            name = f"model.layers.0.block_sparse_moe.{x}_proj.weight"
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)

    rewrite(tmp_path / "theirs", published)
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "theirs" / "model.safetensors")
    ours = AutoModelForCausalLM.from_pretrained(there_and_back(tmp_path / "theirs", tmp_path))
    assert_relative(ours(ids).logits, theirs(ids).logits)


def test_a_model_made_here_is_written_as_published(tmp_path):
    small("kimi_linear", SHAPE).save_pretrained(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "ours")
    (tmp_path / "ours" / "seqzoo_origin.json").unlink()
    convert(tmp_path / "ours", tmp_path / "theirs")
    names = set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_conv1d.weight"} <= names
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "kimi_linear"


def test_one_rate_for_all_channels_is_the_gated_delta_rule():
    q, k, v = (torch.randn(2, 70, 3, n, dtype=torch.float64) for n in (5, 5, 4))
    k, g = torch.nn.functional.normalize(k, dim=-1), -torch.rand(2, 70, 3, dtype=torch.float64)
    beta = torch.rand(2, 70, 3, dtype=torch.float64)
    ours = kimi_delta_rule(q, k, v, g[..., None].expand_as(k), beta)
    for a, b in zip(ours, gated_delta_rule(q, k, v, g, beta), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("T", [1, 3])
def test_latents_are_read_as_their_keys_are(T, monkeypatch):
    """Few queries over many kept tokens never make keys: the same outputs and gradients, by way of other products."""
    layer = LatentAttention(
        16, num_heads=3, key_width=5, shared_width=2, value_width=4, latent_width=7, rope_theta=100.0
    ).double()
    x, found, ways = torch.randn(2, 40 + T, 16, dtype=torch.float64), [], []
    was = LatentAttention._is_few
    for few in (True, False):
        monkeypatch.setattr(LatentAttention, "_is_few", lambda self, T, S, few=few: few and T < S)
        leaf = x.clone().requires_grad_()
        state = layer.init_state(2, device=x.device, dtype=x.dtype)
        _, state = layer(leaf[:, :40], None, state)
        y, _ = layer(leaf[:, 40:], None, state)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)
    ways = [was(layer, T, S) for S in (T, 41)]
    assert ways == [False, True]
