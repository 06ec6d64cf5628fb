"""The anatomy of every promised family: towers, counts, widths, and where each role sits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sinklens.core.errors import ModelError
from sinklens.models.anatomy import find_anatomy
from sinklens.models.parts import linear_shape
from sinklens.models.spec import Anatomy, Block, Tower
from tests.families import EXPERTS, FAMILIES, TOP_K, VOCAB, build

LLAMA = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
MOE = ("self_attn", "self_attn.o_proj", "mlp", None)
NEOX = ("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h")
BLOOM = ("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h")
GPT2 = ("attn", "attn.c_proj", "mlp", "mlp.c_proj")
GPTJ = ("attn", "attn.out_proj", "mlp", "mlp.fc_out")
OPT = ("self_attn", "self_attn.out_proj", None, "fc2")
BERT = ("attention.self", "attention.output.dense", None, "output.dense")
CLIP = ("self_attn", "self_attn.out_proj", "mlp", "mlp.fc2")
VIT = ("attention", "attention.o_proj", "mlp", "mlp.fc2")
QWEN_VISION = ("attn", "attn.proj", "mlp", "mlp.fc2")

PLACES = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen2_window", "qwen3", "olmo2", "phi3", "gemma2", "gemma3_text"],
        (LLAMA,),
    ),
    **dict.fromkeys(
        ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"], (MOE,)
    ),
    "gpt2": (GPT2,),
    "gpt_neox": (NEOX,),
    "gptj": (GPTJ,),
    "codegen": (GPTJ,),
    "gpt_neo": (("attn.attention", "attn.attention.out_proj", "mlp", "mlp.c_proj"),),
    "mpt": (("attn", "attn.out_proj", "ffn", "ffn.down_proj"),),
    **dict.fromkeys(["bloom", "falcon", "falcon_alibi"], (BLOOM,)),
    **dict.fromkeys(["opt", "opt_post_ln"], (OPT,)),
    **dict.fromkeys(["bert", "roberta", "bert_mlm"], (BERT,)),
    **dict.fromkeys(["vit", "dinov2", "dinov2_registers"], (VIT,)),
    "dinov3": (("attention", "attention.o_proj", "mlp", "mlp.down_proj"),),
    **dict.fromkeys(["clip_vision", "siglip_vision"], (CLIP,)),
    **dict.fromkeys(["clip", "siglip"], (CLIP, CLIP)),
    **dict.fromkeys(["llava", "gemma3"], (LLAMA, CLIP)),
    "qwen2_vl": (LLAMA, QWEN_VISION),
    "qwen2_5_vl": (LLAMA, ("attn", "attn.proj", "mlp", "mlp.down_proj")),
    "qwen3_vl": (LLAMA, ("attn", "attn.proj", "mlp", "mlp.linear_fc2")),
}
"""Attention, W_O, feed-forward and its output in the last block of each tower, read off the printed modules."""

FINAL_NORMS = {
    "llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm", "opt_post_ln": None, "bloom": "transformer.ln_f",
    "mpt": "transformer.norm_f", "bert": None, "vit": "layernorm", "dinov3": "norm", "clip_vision": "post_layernorm",
    "clip": "text_model.final_layer_norm", "llava": "model.language_model.norm", "gemma3": "model.language_model.norm",
}  # fmt: skip
EMBEDDINGS = {
    "llama": "model.embed_tokens", "gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in",
    "opt": "model.decoder.embed_tokens", "bloom": "transformer.word_embeddings",
    "bert": "embeddings.word_embeddings", "clip": "text_model.embeddings.token_embedding",
    "qwen2_vl": "model.language_model.embed_tokens", "vit": None,
}  # fmt: skip


def within(block: Block, path: str | None) -> str | None:
    return None if path is None else path.removeprefix(f"{block.path}.")


def paths(anatomy: Anatomy) -> list[str]:
    roles = ("path", "attention", "attention_output", "mlp", "down_proj", "shared_down_proj")
    roles += ("experts", "router", "residual_norm")
    own = [getattr(block, role) for tower in anatomy.towers for block in tower.blocks for role in roles]
    return [
        path for path in [*own, *(p for t in anatomy.towers for p in (t.embedding, t.final_norm))] if path
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_counts_and_widths(family: str) -> None:
    spec, model = FAMILIES[family], build(family)
    anatomy = find_anatomy(model)
    assert anatomy.family == model.config.model_type
    assert anatomy.routed is spec.routed
    assert anatomy.skipped == ()
    assert tuple(tower.name for tower in anatomy.towers) == spec.towers
    assert tuple(len(tower.blocks) for tower in anatomy.towers) == spec.layers
    main = anatomy.main
    assert (main.heads, main.kv_heads, main.causal) == (spec.heads, spec.kv_heads, spec.causal)
    for tower in anatomy.towers:
        width = 48 if tower.name == "vision" else 64
        assert tower.hidden_size == width
        assert [block.index for block in tower.blocks] == list(range(len(tower.blocks)))
        for block in tower.blocks:
            for writer in (block.attention_output, block.down_proj, block.shared_down_proj):
                assert writer is None or linear_shape(model.get_submodule(writer))[1] == width  # pyright: ignore


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_exists_and_roles_do_not_overlap(family: str) -> None:
    model = build(family)
    anatomy = find_anatomy(model)
    for path in paths(anatomy):
        assert isinstance(model.get_submodule(path), nn.Module)
    for block in anatomy.main.blocks:
        owners = [
            block.attention,
            block.attention_output,
            block.down_proj,
            block.shared_down_proj,
            block.experts,
        ]
        given = [owner for owner in owners if owner]
        assert len(set(given)) == len(given)
        assert not (block.down_proj and block.attention and block.down_proj.startswith(f"{block.attention}."))


@pytest.mark.parametrize("family", FAMILIES)
def test_places_of_the_roles(family: str) -> None:
    anatomy = find_anatomy(build(family))
    for tower, expected in zip(anatomy.towers, PLACES[family], strict=True):
        block = tower.blocks[-1]
        found = (block.attention, block.attention_output, block.mlp, block.down_proj)
        assert tuple(within(block, path) for path in found) == expected


@pytest.mark.parametrize("family", [name for name, spec in FAMILIES.items() if spec.moe])
def test_experts(family: str) -> None:
    spec, model = FAMILIES[family], build(family)
    tower = find_anatomy(model).main
    assert (tower.n_experts, tower.top_k) == (EXPERTS, TOP_K)
    for block in tower.blocks:
        dense = block.index < spec.dense_layers
        assert (block.experts is None, block.router is None) == (dense, dense)
        assert (block.down_proj is not None) == dense
        assert (block.shared_down_proj is not None) == (spec.shared_experts and not dense)
        if not dense:
            assert model.get_submodule(block.experts or "").down_proj.shape[0] == EXPERTS  # pyright: ignore
            assert model.get_submodule(block.router or "").weight.shape == (EXPERTS, 64)  # pyright: ignore


@pytest.mark.parametrize("family", [name for name, spec in FAMILIES.items() if not spec.moe])
def test_dense_models_have_no_experts(family: str) -> None:
    for tower in find_anatomy(build(family)).towers:
        assert (tower.n_experts, tower.top_k) == (0, 0)
        assert all(
            block.experts is None and block.router is None and block.down_proj for block in tower.blocks
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_post_layernorm_blocks_name_the_norm_whose_input_is_the_residual(family: str) -> None:
    post = FAMILIES[family].post_ln
    for block in find_anatomy(build(family)).main.blocks:
        assert (block.residual_norm is not None) == post
        if post:
            assert within(block, block.residual_norm) in ("final_layer_norm", "output.LayerNorm")


@pytest.mark.parametrize("family", FINAL_NORMS)
def test_final_norm(family: str) -> None:
    assert find_anatomy(build(family)).main.final_norm == FINAL_NORMS[family]


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_token_embedding(family: str) -> None:
    model = build(family)
    path = find_anatomy(model).main.embedding
    assert path == EMBEDDINGS[family]
    assert path is None or model.get_submodule(path).num_embeddings == VOCAB  # pyright: ignore


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3", "bert", "qwen2_5_vl", "bloom"])
def test_needs_no_weights(family: str) -> None:
    with torch.device("meta"):
        shell = FAMILIES[family].make()
    assert find_anatomy(shell) == find_anatomy(build(family))


def test_gated_maps_as_wide_as_the_residual_do_not_confuse() -> None:
    """GPT-OSS has equal hidden and intermediate sizes; here gate, up and down all map 64 to 64."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    blocks = find_anatomy(transformers.LlamaForCausalLM(config)).main.blocks
    assert [block.down_proj for block in blocks] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert [block.attention_output for block in blocks] == [
        f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)
    ]


def test_adapters_are_seen_as_the_map_they_wrap() -> None:
    class Wrapped(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Wrapped(layer.mlp.down_proj)
    assert find_anatomy(model) == find_anatomy(build("llama"))


def test_hybrid_blocks_without_attention() -> None:
    """Qwen3-Next mixes linear attention and softmax attention; only the latter counts."""
    import transformers

    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=0, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    )  # fmt: skip
    tower = find_anatomy(transformers.Qwen3NextForCausalLM(config)).main
    assert [block.attention is not None for block in tower.blocks] == [False, False, False, True]
    assert [block.down_proj for block in tower.blocks] == [
        f"model.layers.{i}.mlp.down_proj" for i in range(4)
    ]


def test_main_tower_is_text_and_one_tower_is_routed_alone() -> None:
    tower = Tower("vision", (), 8, 2, 2, False, routed=False)
    anatomy = Anatomy("x", (tower, replace(tower, name="text", routed=True)), routed=False)
    assert anatomy.main.name == "text"
    assert anatomy.main.routed


def tiny(name: str, config: str, **settings: object) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**settings))


T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}
ALBERT = {"vocab_size": VOCAB, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
XLNET = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
REFUSALS = {
    "t5": (("T5ForConditionalGeneration", "T5Config", T5), "encoder-decoder"),
    "mamba": (("MambaForCausalLM", "MambaConfig", MAMBA), "no softmax attention"),
    "albert": (("AlbertModel", "AlbertConfig", ALBERT), "stages or groups"),
    "swin": (("SwinModel", "SwinConfig", SWIN), "stages or groups"),
    "xlnet": (("XLNetLMHeadModel", "XLNetConfig", XLNET), "XLNetRelativeAttention"),
    "bart": (("BartForCausalLM", "BartConfig", BART), "two attentions per block"),
    "resnet": (("ResNetModel", "ResNetConfig", RESNET), "no softmax attention"),
}


@pytest.mark.parametrize("family", REFUSALS)
def test_refusals_name_the_family_and_what_was_found(family: str) -> None:
    (name, config, settings), reason = REFUSALS[family]
    with pytest.raises(ModelError) as caught:
        find_anatomy(tiny(name, config, **settings))
    message = str(caught.value)
    assert family in message
    assert reason in message
    assert len(message.splitlines()) <= 4
    assert caught.value.exit_code == 3


def test_blocks_that_the_config_does_not_know_are_refused() -> None:
    model = build("llama")
    model.model.layers.append(model.model.layers[0])
    with pytest.raises(ModelError, match=r"uses one attention module in several blocks"):
        find_anatomy(model)
    model = build("llama")
    del model.model.layers[2]
    with pytest.raises(ModelError, match=r"found 3 blocks in 'model.layers', but its config says 4"):
        find_anatomy(model)


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential is not a transformers model"):
        find_anatomy(nn.Sequential(nn.Linear(3, 5)))


def test_an_unreadable_side_stack_is_reported_and_the_text_is_read() -> None:
    """BLIP-2's Q-Former has cross attention; language model and vision encoder can still be read."""
    import transformers

    vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
    qformer = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
    }
    config = transformers.Blip2Config(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        qformer_config={**qformer, "intermediate_size": 40, "encoder_hidden_size": 48},
        text_config={**text, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    )
    anatomy = find_anatomy(transformers.Blip2ForConditionalGeneration(config))
    assert [(tower.name, len(tower.blocks)) for tower in anatomy.towers] == [("text", 3), ("vision", 2)]
    assert len(anatomy.skipped) == 1
    assert "qformer" in anatomy.skipped[0]
    assert "two attentions per block" in anatomy.skipped[0]


def test_a_text_stack_beside_the_language_model_does_not_hide_it() -> None:
    """InstructBLIP's Q-Former has a vocabulary and cross attention; the language model is the text tower."""
    import transformers

    with torch.device("meta"):
        anatomy = find_anatomy(
            transformers.InstructBlipForConditionalGeneration(transformers.InstructBlipConfig())
        )
    assert anatomy.main.blocks[0].path.startswith("language_model.")
    assert any("qformer" in reason for reason in anatomy.skipped)


def test_blocks_of_different_widths_are_refused() -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.Sam2HieraDetModel(transformers.Sam2HieraDetConfig())
    with pytest.raises(ModelError, match=r"changes its width between blocks[\s\S]*writes 96 values"):
        find_anatomy(model)
