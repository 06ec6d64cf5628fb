"""A streamed trace is that of the model in memory, to the last bit, and every tensor is read once."""

from __future__ import annotations

import pytest
import torch

from sinklens.tracers.executor import trace
from tests.families import FAMILIES

from .cases import PLAN, differences, in_memory, opened, prompts, saved

TEXT = [name for name, family in FAMILIES.items() if family.kind in ("text", "encoder", "vlm")]


@pytest.mark.parametrize("family", TEXT)
def test_every_family(family, tmp_path):
    folder = saved(family, tmp_path)
    model = opened(folder)
    found = trace(model, prompts((23, 17, 9)), PLAN)
    assert len(found.signals) > 30
    assert not differences(trace(in_memory(family), prompts((23, 17, 9)), PLAN), found)
    _read_once(model)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "gptj")),
        ("qwen3_moe", torch.float16),
    ],
)
def test_half_precision_and_shards(family, dtype, tmp_path):
    folder = saved(family, tmp_path, dtype, shard="60kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    model = opened(folder)
    assert next(model.module.parameters()).dtype == dtype
    found = trace(model, prompts((23, 17, 31)), PLAN)
    assert not differences(trace(opened(folder, stream=False), prompts((23, 17, 31)), PLAN), found)
    _read_once(model)


def _read_once(model):
    """Every tensor's bytes were read once, those of every block's when it was loaded the only time."""
    blocks, stored = model.blocks, model.blocks.recipes.stored
    assert blocks.loads == [1] * len(blocks)
    assert stored.bytes_read == {key: stored.where[key][1].nbytes for key in stored.bytes_read}
    used = {key for recipe in blocks.recipes.groups.values() for key in recipe.keys}
    assert stored.bytes_read.keys() == used
    assert not any(block.is_meta for name, block in model.module.named_parameters() if _outside(model, name))
    assert all(p.is_meta for name, p in model.module.named_parameters() if not _outside(model, name))


def _outside(model, name):
    return not any(name.startswith(f"{block.path}.") for block in model.blocks.blocks)


def test_an_ordinary_pass_works_too(tmp_path):
    folder = saved("mixtral", tmp_path)
    model, reference = opened(folder), opened(folder, stream=False)
    ids = torch.tensor([prompts()[0].token_ids])
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model.module(ids).logits, reference.module(ids).logits)
    assert model.blocks.loads == [2] * 4


def test_experts_are_fused_without_a_second_copy(tmp_path):
    """Experts stored one by one are read into their place; transformers' conversion is not needed for them."""
    model = opened(saved("qwen3_moe", tmp_path))
    recipe = model.blocks.recipes.groups[1]
    assert not recipe.conversions
    fused = [parts for parts in recipe.parts.values() if len(parts) > 1]
    assert sorted(len(parts) for parts in fused) == [8, 16]
