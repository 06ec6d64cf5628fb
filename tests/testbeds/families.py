"""Tiny random decoders of every family that can be planted in, with co-prime sizes and grouped queries."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sinklens.testbeds.controls import random_control

LAYERS, HEADS, KV_HEADS, DIMS, VOCABULARY, EXPERTS, BOS = 6, 6, 3, 60, 101, 5, 7
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2")
MOE = ("qwen3_moe", "mixtral")


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": None}
    if family == "gpt2":
        sizes: dict[str, Any] = {"n_embd": DIMS, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 96}
    else:
        sizes = {
            "hidden_size": DIMS,
            "intermediate_size": 77,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "pad_token_id": None,
        }
    extra: dict[str, dict[str, Any]] = {
        # Without its own head_dim: Qwen2 has no such setting.
        "llama": {"head_dim": 14},
        "mistral": {"head_dim": 14, "sliding_window": None},
        "qwen3": {"head_dim": 14},
        "gemma2": {"head_dim": 14, "query_pre_attn_scalar": 14},
        # Multiples of 4: the grouped kernel of the experts asks for rows of 16 bytes.
        "qwen3_moe": {
            "head_dim": 14,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 36,
            "norm_topk_prob": True,
        },
        "mixtral": {
            "head_dim": 14,
            "intermediate_size": 36,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
        },
    }
    return AutoConfig.for_model(family, **{**common, **sizes, **extra.get(family, {}), **changes})


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return random_control(tiny_config(family, **changes), seed)
