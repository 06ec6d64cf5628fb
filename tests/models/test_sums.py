"""What a block adds: found by running in every family, and not claimed where it does not add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import Block, Tower
from sinklens.models.sums import find_sums, piece
from tests.families import FAMILIES, GQA, MOE, build, inputs, redraw

ATTENTION = {
    "llama": "self_attn",
    "gemma2": "post_attention_layernorm",
    "olmo2": "post_attention_layernorm",
    "bloom": "self_attention.dense",
    "dinov2": "layer_scale1",
    "gpt_neox": "attention",
    "opt": "self_attn",
}
MLP = {
    "llama": "mlp",
    "gemma2": "post_feedforward_layernorm",
    "bloom": "mlp.dense_4h_to_h",
    "mpt": "ffn.down_proj",
    "opt": "fc2",
    "bert": "output.dense",
    "deepseek_v3": "mlp",
}
GATES = {
    "llama": ("gate_proj", "all"),
    "phi3": ("gate_up_proj", "first half"),
    "gpt2": None,
    "gpt_neox": None,
}


def tower_of(family: str, model: nn.Module, **options: Any) -> Tower:
    given, tower = inputs(family, length=11, **options), find_anatomy(model).main
    find_sums(model, tower, lambda: model(**given))
    return tower


def local(block: Block, path: str) -> str:
    return path.removeprefix(f"{block.path}.")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_adds_up(family: str) -> None:
    for block in tower_of(family, build(family)).blocks:
        assert block.sum.checked
        assert block.sum.exact
        assert block.sum.error is not None
        assert block.sum.error < 1e-6
        assert (block.sum.middle is not None) == FAMILIES[family].post_ln
        assert all(write.scale == 1 for write in (*block.sum.attention, *block.sum.mlp))
        if block.experts is None:
            assert block.sum.feed_forward is not None
        if family in ATTENTION:
            assert [local(block, write.path) for write in block.sum.attention] == [ATTENTION[family]]
        if family in MLP:
            assert [local(block, write.path) for write in block.sum.mlp] == [MLP[family]]
        if family in GATES:
            inner, gate = block.sum.feed_forward, GATES[family]
            assert inner is not None
            assert inner.gate is None if gate is None else inner.gate is not None
            if gate is not None and inner.gate is not None:
                assert (inner.gate.path.rpartition(".")[2], inner.gate.part) == gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bloom", "mixtral", "bert"])
def test_half_precision_finds_the_same_modules(family: str, dtype: torch.dtype) -> None:
    exact, half = tower_of(family, build(family)), tower_of(family, build(family, dtype=dtype))
    for a, b in zip(exact.blocks, half.blocks, strict=True):
        assert b.sum.exact
        assert (a.sum.attention, a.sum.mlp, a.sum.middle) == (b.sum.attention, b.sum.mlp, b.sum.middle)


@pytest.mark.parametrize("multiplier", [0.22, 3.0])
def test_a_residual_multiplier_is_measured(multiplier: float) -> None:
    import transformers

    config = transformers.GraniteConfig(**GQA, residual_multiplier=multiplier)
    model: Any = transformers.GraniteForCausalLM(config).eval()
    redraw(model, torch.Generator().manual_seed(0))
    for block in tower_of("llama", model).blocks:
        assert block.sum.exact
        for write in (*block.sum.attention, *block.sum.mlp):
            assert write.scale == pytest.approx(multiplier, rel=1e-6)


def test_experts_and_a_shared_part_beside_each_other() -> None:
    """Granite's shared experts are a second module whose output is added to the mixture's."""
    import transformers

    config = transformers.GraniteMoeSharedConfig(
        **MOE, num_local_experts=4, shared_intermediate_size=40, residual_multiplier=0.5
    )
    model: Any = transformers.GraniteMoeSharedForCausalLM(config).eval()
    redraw(model, torch.Generator().manual_seed(0))
    for block in tower_of("llama", model).blocks:
        assert block.sum.exact
        assert [local(block, write.path) for write in block.sum.mlp] == ["block_sparse_moe", "shared_mlp"]
        assert [write.scale for write in block.sum.mlp] == pytest.approx([0.5, 0.5], rel=1e-6)


def test_what_is_changed_in_place_is_marked() -> None:
    """Falcon's parallel block adds the attention to the feed-forward output in place."""
    for block in tower_of("falcon", build("falcon")).blocks:
        assert [write.copied for write in block.sum.mlp] == [True]
        assert [write.copied for write in block.sum.attention] == [False]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_a_block_that_does_something_else_is_not_claimed(family: str) -> None:
    model = build(family)
    blocks = find_anatomy(model).main.blocks
    module = model.get_submodule(blocks[2].path)
    plain = module.forward
    module.forward = lambda *args, **kwargs: torch.tanh(plain(*args, **kwargs))
    tower = tower_of(family, model)
    assert [block.sum.exact for block in tower.blocks] == [True, True, False, True]
    assert tower.blocks[2].sum.checked
    assert not tower.blocks[2].sum.mlp


def test_nothing_stays_on_the_model_and_an_edit_of_the_output_is_not_taken_for_the_block() -> None:
    model = build("llama")
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: output * 0)
    tower = tower_of("llama", model)
    assert all(block.sum.exact for block in tower.blocks)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pieces_of_an_output() -> None:
    x = torch.arange(6)[None]
    parts = {
        "all": [0, 1, 2, 3, 4, 5],
        "first half": [0, 1, 2],
        "second half": [3, 4, 5],
        "even": [0, 2, 4],
        "odd": [1, 3, 5],
    }
    for part, expected in parts.items():
        assert piece(x, part).tolist() == [expected]
