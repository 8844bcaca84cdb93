"""Random models of Transformers' own classes, one row for each architecture: small, of varied shape, with weights that
let errors show. `test_architectures.py` runs over all of them."""

from typing import Any, NamedTuple

import small_qwen3_next  # noqa: F401 - before transformers' models: it hides GPU kernels from them
import torch
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 53


class Small(NamedTuple):
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    shapes: dict[str, dict[str, Any]]  # what a shape has of its own
    base: dict[str, Any] = {}  # what all its shapes have
    cached: bool = True  # whether theirs generates with its cache what it does without (transformers 5.24)


_BASE = dict(
    vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, intermediate_size=20, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=10, head_dim=8)
_HYBRID = dict(
    num_hidden_layers=4, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
    linear_value_head_dim=5,
)  # fmt: skip
_WINDOWS = dict(use_sliding_window=True, sliding_window=7)
_YARN = dict(rope_type="yarn", rope_theta=1e3, factor=4.0, original_max_position_embeddings=24)

SMALL = {
    "kimi_linear": Small(
        KimiLinearConfig,
        KimiLinearForCausalLM,
        {
            "as published": {},
            "queries of few channels, biases": dict(
                q_lora_rank=8, attention_bias=True, num_hidden_layers=3, n_shared_experts=2,
                layer_types=["full_attention", "linear_attention", "full_attention"], moe_renormalize=False,
                mlp_layer_types=["sparse", "dense", "sparse"], linear_conv_kernel_dim=3, rms_norm_eps=1e-6,
            ),
        },
        dict(
            num_hidden_layers=5, num_key_value_heads=4, num_local_experts=6, num_experts_per_tok=2,
            moe_intermediate_size=10, linear_head_dim=6, linear_num_heads=3, kv_lora_rank=9, qk_rope_head_dim=4,
            qk_nope_head_dim=5, v_head_dim=7,
        ),
    ),
    "llama": Small(
        LlamaConfig,
        LlamaForCausalLM,
        {
            "plain": {},
            "biases, tied": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=4),
            "wide heads, llama3": dict(
                head_dim=10, num_key_value_heads=1, rms_norm_eps=1e-5,
                rope_parameters=dict(
                    rope_type="llama3", rope_theta=1e3, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=48,
                ),
            ),
            "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
            "yarn": dict(rope_parameters=_YARN),
            "yarn of every word": dict(
                rope_parameters=dict(
                    _YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9, truncate=False
                )
            ),
        },
    ),
    "minimax": Small(
        MiniMaxConfig,
        MiniMaxForCausalLM,
        {
            "plain": {},
            "weights, windows": dict(
                num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"], sliding_window=7,
                full_attn_alpha_factor=1.5, full_attn_beta_factor=0.5, linear_attn_alpha_factor=3.5,
                linear_attn_beta_factor=2.0, mlp_alpha_factor=0.7, mlp_beta_factor=1.2, num_experts_per_tok=1,
            ),
        },
        dict(num_local_experts=4, head_dim=8),
        cached=False,  # other tokens with a window, and after padding
    ),
    "mistral": Small(
        MistralConfig, MistralForCausalLM, {"window": dict(sliding_window=7), "no window": dict(sliding_window=None)}
    ),
    "olmo_hybrid": Small(
        OlmoHybridConfig,
        OlmoHybridForCausalLM,
        {
            "as published": dict(
                rope_parameters=dict(rope_type="default", rope_theta=None), linear_key_head_dim=3,
                linear_value_head_dim=7,
            ),
            "turned, biases, tied, steps up to 1": dict(
                rope_parameters=_YARN, attention_bias=True, tie_word_embeddings=True, linear_allow_neg_eigval=False,
                layer_types=["full_attention", "linear_attention"] * 2, num_key_value_heads=1,
                linear_conv_kernel_dim=3, linear_num_key_heads=2, linear_num_value_heads=2, rms_norm_eps=1e-4,
            ),
        },
        dict(num_hidden_layers=4),
    ),
    "qwen2": Small(
        Qwen2Config,
        Qwen2ForCausalLM,
        {"plain, tied": dict(tie_word_embeddings=True), "windows above": dict(_WINDOWS, max_window_layers=2)},
    ),
    "qwen3": Small(
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "plain": {},
            "biases, windows": dict(
                _WINDOWS, attention_bias=True, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
            ),
        },
        dict(head_dim=10),
    ),
    "qwen3_moe": Small(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "plain": {},
            "some dense, renormalised": dict(
                mlp_only_layers=[1], norm_topk_prob=True, attention_bias=True, num_experts_per_tok=3
            ),
            "windows, every second": dict(_WINDOWS, decoder_sparse_step=2, router_aux_loss_coef=0.05),
        },
        _EXPERTS,
    ),
    "qwen3_5_text": Small(
        Qwen3_5TextConfig,
        Qwen3_5ForCausalLM,
        {
            "as published": {},
            "tied, biases": dict(
                tie_word_embeddings=True, attention_bias=True, linear_num_value_heads=2, num_hidden_layers=2,
                layer_types=["full_attention", "linear_attention"],
            ),
        },
        _HYBRID,
    ),
    "qwen3_5_moe_text": Small(
        Qwen3_5MoeTextConfig,
        Qwen3_5MoeForCausalLM,
        {"as published": {}},
        dict(_HYBRID, **_EXPERTS | dict(head_dim=16), shared_expert_intermediate_size=14),
    ),
}  # fmt: skip


def small(kind: str, shape: str, dtype: torch.dtype = torch.float32, **other: Any) -> PreTrainedModel:
    """One of SMALL, the same at every call."""
    row = SMALL[kind]
    config = row.config(**{**_BASE, **row.base, **row.shapes[shape], **other})
    model = row.model(config).to(dtype)
    model.set_experts_implementation("eager")  # its grouped product wants widths that are multiples of four
    torch.manual_seed(1)
    for p in [*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("correction_bias"))]:
        torch.nn.init.normal_(p, std=0.25)
    return model.eval()
