"""Tiny random models whose late blocks read what earlier ones wrote: keys and values, or the tokens of an indexer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.families import EXPERTS, GQA, HEAD_DIM, HEADS, MOE, TOP_K, WINDOW, redraw, tokenizer

LAYERS = 6
KINDS = ["sliding_attention", "full_attention"] * 3
GEMMA: dict[str, Any] = {
    **GQA,
    "num_hidden_layers": LAYERS,
    "head_dim": HEAD_DIM,
    "sliding_window": WINDOW,
    "layer_types": KINDS,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
}


def _gemma3n() -> Any:
    """Four streams, of which blocks read one; the first block keeps half of its neurons."""
    sizes = {"intermediate_size": [96] * LAYERS, "activation_sparsity_pattern": [0.5] + [0.0] * 5}
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**{**GEMMA, **sizes}))


def _gemma4(**experts: Any) -> Any:
    config = transformers.Gemma4TextConfig(**{**GEMMA, "global_head_dim": 24, **experts})
    return transformers.Gemma4ForCausalLM(config)


def _gemma4_moe() -> Any:
    return _gemma4(enable_moe_block=True, num_experts=EXPERTS, top_k_experts=TOP_K, moe_intermediate_size=40)


def _mistral_large4() -> Any:
    """Blocks read compressed keys of the first or the second one, or the tokens that the block before them chose."""
    text = transformers.MistralLarge4TextConfig(
        **{**MOE, "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS},
        moe_intermediate_size=40,
        n_routed_experts=EXPERTS,
        kv_lora_rank=20,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        index_topk=6,
        index_head_dim=16,
        index_n_heads=3,
        no_rope_layers=[1, 0] * 3,
        kv_source_layers=[0, 1] * 3,
        indexer_types=["full", "shared", "full", "shared", "shared", "full"],
    )
    vision = {"model_type": "pixtral", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 3, "head_dim": 16, "image_size": 40, "patch_size": 8}
    config = transformers.MistralLarge4Config(text_config=text, vision_config=vision)
    return transformers.MistralLarge4ForConditionalGeneration(config)


SHARING = {
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "gemma4_moe": _gemma4_moe,
    "mistral_large4": _mistral_large4,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SHARING[name]()
        redraw(model, torch.Generator().manual_seed(0))
    return model.to(dtype).eval()


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    build(name, dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
