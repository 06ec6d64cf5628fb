"""Verification passes on true anatomies and fails on each kind of false one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import Anatomy
from sinklens.models.verify import AnatomyCheck, verify_anatomy
from tests.families import FAMILIES, build, inputs

NORMS = {
    "llama": {"pre_attention": "input_layernorm", "pre_mlp": "post_attention_layernorm"},
    "olmo2": {"post_attention": "post_attention_layernorm", "post_mlp": "post_feedforward_layernorm"},
    "gemma2": {
        "pre_attention": "input_layernorm",
        "post_attention": "post_attention_layernorm",
        "pre_mlp": "pre_feedforward_layernorm",
        "post_mlp": "post_feedforward_layernorm",
    },
    "gpt_neox": {"pre_attention": "input_layernorm", "pre_mlp": "post_attention_layernorm"},
    "gptj": {"pre_attention": "ln_1", "pre_mlp": "ln_1"},
    "gpt_oss": {"pre_attention": "input_layernorm", "pre_mlp": "post_attention_layernorm"},
    "opt": {"pre_attention": "self_attn_layer_norm", "pre_mlp": "final_layer_norm"},
    "opt_post_ln": {"pre_mlp": "self_attn_layer_norm"},
    "bert": {"pre_mlp": "attention.output.LayerNorm"},
    "falcon": {"pre_attention": "ln_attn", "pre_mlp": "ln_mlp"},
    "dinov2": {"pre_attention": "norm1", "pre_mlp": "norm2"},
}


def runner(family: str, model: nn.Module, **options: Any) -> Callable[[], Any]:
    given = inputs(family, length=11, **options)
    return lambda: model(**given)


def verified(family: str, anatomy: Anatomy | None = None) -> list[AnatomyCheck]:
    model = build(family)
    return verify_anatomy(model, anatomy or find_anatomy(model), runner(family, model))


@pytest.mark.parametrize("family", FAMILIES)
def test_true_anatomies_pass(family: str) -> None:
    checks = verified(family)
    assert [check for check in checks if not check.passed] == []
    for tower in FAMILIES[family].towers:
        about = [check.name for check in checks if check.name.startswith(f"{tower}: ")]
        assert len(about) >= 6
    shared = any("shared_down_proj" in check.name for check in checks)
    assert shared == FAMILIES[family].shared_experts


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert", "bloom", "gemma3"])
def test_nothing_stays_on_the_model(family: str) -> None:
    model = build(family)
    given = inputs(family, length=11)
    before = model(**given)[0]
    verify_anatomy(model, find_anatomy(model), lambda: model(**given))
    assert torch.equal(before, model(**given)[0])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("failing_pass", [1, 2, 4])
def test_hooks_are_removed_when_the_model_fails(failing_pass: int) -> None:
    model = build("llama")
    calls = []

    def run() -> None:
        calls.append(1)
        model(torch.tensor([[5, 6, 10**6 if len(calls) == failing_pass else 7]]))

    with pytest.raises(IndexError):
        verify_anatomy(model, find_anatomy(model), run)
    assert len(calls) == failing_pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", NORMS)
def test_norm_roles_by_identity_of_tensors(family: str) -> None:
    model = build(family)
    anatomy = find_anatomy(model)
    assert all(block.norms == {} for block in anatomy.main.blocks)
    verify_anatomy(model, anatomy, runner(family, model))
    for block in anatomy.main.blocks:
        assert block.norms == {role: f"{block.path}.{name}" for role, name in NORMS[family].items()}


def with_block(anatomy: Anatomy, index: int, **changes: str | None) -> Anatomy:
    tower = anatomy.main
    block = tower.blocks[index]
    paths = {role: f"{block.path}.{name}" if name else None for role, name in changes.items()}
    blocks = [replace(block, **paths) if block.index == index else block for block in tower.blocks]
    return replace(anatomy, towers=(replace(tower, blocks=tuple(blocks)), *anatomy.towers[1:]))


FALSE: list[tuple[str, dict[str, str | None], str]] = [
    ("llama", {"down_proj": "mlp.gate_proj"}, "down_proj writes"),
    ("llama", {"attention_output": "self_attn.q_proj"}, "attention_output writes"),
    ("opt", {"attention_output": "self_attn.v_proj"}, "attention_output writes"),
    ("bert", {"attention_output": "attention.self.value"}, "attention_output writes"),
    ("gpt2", {"down_proj": "mlp.c_fc"}, "down_proj writes"),
    ("gemma2", {"attention_output": "self_attn.v_proj"}, "attention_output writes"),
    ("deepseek_v3", {"shared_down_proj": "mlp.shared_experts.up_proj"}, "shared_down_proj writes"),
    ("bert", {"residual_norm": None}, "residual stream"),
    ("llama", {"residual_norm": "post_attention_layernorm"}, "residual stream"),
]


@pytest.mark.parametrize(("family", "changes", "name"), FALSE)
def test_a_false_role_in_one_block_fails(family: str, changes: dict[str, str | None], name: str) -> None:
    anatomy = with_block(find_anatomy(build(family)), 2, **changes)
    failed = [check for check in verified(family, anatomy) if not check.passed]
    assert any(name in check.name for check in failed)
    assert all(check.detail for check in failed)


@pytest.mark.parametrize("family", ["llama", "clip", "bert", "vit"])
def test_a_false_direction_fails(family: str) -> None:
    anatomy = find_anatomy(build(family))
    tower = replace(anatomy.main, causal=not anatomy.main.causal)
    failed = [
        c for c in verified(family, replace(anatomy, towers=(tower, *anatomy.towers[1:]))) if not c.passed
    ]
    assert len(failed) == 1
    assert "attention is" in failed[0].name


def test_a_false_width_and_a_false_order_fail() -> None:
    anatomy = find_anatomy(build("llama"))
    wide = replace(anatomy, towers=(replace(anatomy.main, hidden_size=63),))
    assert [c.name for c in verified("llama", wide) if not c.passed] == ["text: residual width"]
    swapped = tuple(anatomy.main.blocks[i] for i in (0, 2, 1, 3))
    checks = verified("llama", replace(anatomy, towers=(replace(anatomy.main, blocks=swapped),)))
    assert [(check.name, check.passed) for check in checks] == [("text: blocks run in order", False)]
    assert "call 1" in checks[0].detail


def test_a_tower_that_does_not_run_is_left_out() -> None:
    model = build("llava")
    ids = torch.randint(5, 300, (2, 9))
    checks = verify_anatomy(model, find_anatomy(model), lambda: model(input_ids=ids))
    assert all(check.passed for check in checks)
    assert not any(check.name.startswith("vision") for check in checks)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "bloom", "bert"])
def test_padding_and_bfloat16(family: str, padding: str) -> None:
    model = build(family, dtype=torch.bfloat16)
    given = inputs(family, length=17, padding=padding)
    checks = verify_anatomy(model, find_anatomy(model), lambda: model(**given))
    assert [check for check in checks if not check.passed] == []
