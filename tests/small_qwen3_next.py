"""Random Qwen3-Next models of Transformers' own class: small, of varied shape, with weights that let errors show."""

import sys

import torch

_hidden = {name: sys.modules.get(name) for name in ("fla", "causal_conv1d")}
sys.modules.update(dict.fromkeys(_hidden))  # with them, Transformers calls GPU kernels on a CPU too; it looks only once
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM  # noqa: E402

for _name, _module in _hidden.items():
    if _module is None:
        del sys.modules[_name]
    else:
        sys.modules[_name] = _module

VOCAB = 53
BASE = dict(
    vocab_size=VOCAB, hidden_size=24, num_hidden_layers=4, intermediate_size=20, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
    linear_value_head_dim=5, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=10,
    shared_expert_intermediate_size=14, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
)  # fmt: skip
SHAPES = {
    "as published": dict(),
    "equal heads, tied": dict(
        linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=4, linear_value_head_dim=7,
        tie_word_embeddings=True, num_key_value_heads=4, partial_rotary_factor=1.0, rms_norm_eps=1e-5,
    ),
    "dense layers, biases, irregular": dict(
        num_hidden_layers=5, mlp_only_layers=[1], attention_bias=True, partial_rotary_factor=0.5,
        layer_types=["linear_attention", *["full_attention"] * 2, "linear_attention", "full_attention"],
        rope_parameters=dict(rope_type="default", rope_theta=500.0),
    ),
    "every second sparse, raw weights": dict(
        decoder_sparse_step=2, norm_topk_prob=False, linear_num_value_heads=6, linear_conv_kernel_dim=3,
        layer_types=["full_attention", "linear_attention"] * 2, num_experts_per_tok=3, num_key_value_heads=1,
        router_aux_loss_coef=0.05, output_router_logits=True,
    ),
    "all dense": dict(num_experts=0, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
}  # fmt: skip


def small(shape: str = "as published", dtype: torch.dtype = torch.float32, **other) -> Qwen3NextForCausalLM:
    """One of SHAPES, the same at every call."""
    config = Qwen3NextConfig(**{**BASE, **SHAPES[shape], **other})
    model = Qwen3NextForCausalLM(config).to(dtype)
    model.set_experts_implementation("eager")  # its grouped product wants widths that are multiples of four
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    return model.eval()
