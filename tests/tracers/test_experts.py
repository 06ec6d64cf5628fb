"""The experts seam against the plainest reference: one token and one expert at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers.batch import first_tensor, forward
from sinklens.tracers.executor import TracePlan, sites, trace_batch
from sinklens.tracers.experts import ExpertsTap, Routed, expert_output, routed_experts
from tests.families import FAMILIES, build

from .test_families import batch_of, opened

MOE = [name for name, family in FAMILIES.items() if family.moe]


def captured_calls(model: nn.Module, batch: Any) -> dict[int, tuple[Any, Tensor, Tensor, Tensor]]:
    """Module and inputs of every experts call, by layer."""
    calls: dict[int, tuple[Any, Tensor, Tensor, Tensor]] = {}
    where = sites(model, find_anatomy(model).main, "experts")

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            calls[layer] = (module, *args)

        return hook

    handles = [module.register_forward_pre_hook(keep(site.layer)) for module, site in where.items()]
    forward(model, batch)
    for handle in handles:
        handle.remove()
    return calls


def one_expert(module: Any, expert: int, x: Tensor) -> Tensor:
    """`down_proj` output of one expert for one token, from the weights."""
    gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
    bias, bias_down = 0, 0
    if hasattr(module, "gate_up_proj_bias"):
        gate_up, down = gate_up.T, down.T
        bias, bias_down = module.gate_up_proj_bias[expert], module.down_proj_bias[expert]
    inner = gate_up @ x + bias
    if hasattr(module, "gate_up_proj_bias"):  # GPT-OSS: interleaved, clamped, (up + 1) * swish
        gate, up = inner[0::2].clamp(max=module.limit), inner[1::2].clamp(-module.limit, module.limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    else:
        gate, up = inner.chunk(2)
        hidden = module.act_fn(gate) * up
    return down @ hidden + bias_down


@pytest.mark.parametrize("family", MOE)
def test_maxima_equal_a_loop_over_tokens_and_experts(family: str) -> None:
    model, batch = opened(family), batch_of(family, 11, "right")
    records = trace_batch(model, batch, TracePlan()).records
    assert batch.valid is not None
    for layer, (module, hidden, index, _) in captured_calls(model.module, batch).items():
        for row, record in enumerate(records):
            width = batch.valid.shape[1]
            tokens = [row * width + int(place) for place in batch.valid[row].nonzero()]
            for expert in range(8):
                outputs = [
                    one_expert(module, expert, hidden[token]).abs().max().item()
                    for token in tokens
                    if expert in index[token]
                ]
                first = next(
                    (
                        one_expert(module, expert, hidden[token]).abs().max().item()
                        for slot in range(index.shape[1])
                        for token in tokens
                        if index[token, slot] == expert
                    ),
                    np.nan,
                )
                largest = max(outputs, default=np.nan)
                np.testing.assert_allclose(abs(record["expert_max"][layer, expert]), largest, rtol=1e-5)
                np.testing.assert_allclose(record["expert_first_row"][layer, expert], first, rtol=1e-5)
                assert record["expert_tokens"][layer, expert] == len(outputs)


@pytest.mark.parametrize("family", MOE)
def test_ablation_equals_a_zeroed_down_projection_bit_for_bit(family: str) -> None:
    model, batch = opened(family), batch_of(family, 11)
    where = sites(model.module, model.anatomy.main, "experts")
    layer = max(site.layer for site in where.values())
    with ExpertsTap(where, ablate=[(layer, 2), (layer, 5)]).attached():
        ablated = first_tensor(forward(model.module, batch))
    module: Any = next(module for module, site in where.items() if site.layer == layer)
    with torch.no_grad():
        for expert in (2, 5):
            module.down_proj[expert] = 0
            if hasattr(module, "down_proj_bias"):
                module.down_proj_bias[expert] = 0
    assert torch.equal(first_tensor(forward(model.module, batch)), ablated)
    assert not torch.equal(first_tensor(forward(build(family), batch)), ablated)


@pytest.mark.parametrize("family", MOE)
def test_the_models_own_experts_can_give_the_output(family: str) -> None:
    model, batch = opened(family), batch_of(family, 11)
    before = first_tensor(forward(model.module, batch))
    loop = trace_batch(model, batch, TracePlan())
    beside = trace_batch(model, batch, TracePlan(own_experts=True))
    assert torch.equal(first_tensor(beside.output), before)
    for one, other in zip(loop.records, beside.records, strict=True):
        np.testing.assert_array_equal(one["expert_max"], other["expert_max"])


def test_rows_say_where_the_largest_entry_is() -> None:
    model, batch = opened("qwen3_moe"), batch_of("qwen3_moe", 7, batch=1)
    seen: list[Routed] = []
    with ExpertsTap(
        sites(model.module, model.anatomy.main, "experts"), lambda _, rows: seen.append(rows)
    ).attached():
        forward(model.module, batch)
    (module, hidden, index, _), routed = captured_calls(model.module, batch)[0], seen[0]
    for row in range(len(routed.expert)):
        token, slot = divmod(row, routed.slots)
        y = one_expert(module, int(index[token, slot]), hidden[token]).detach()
        assert int(routed.dim[row]) == int(y.abs().argmax())
        assert float(routed.value[row]) == pytest.approx(float(y[routed.dim[row]]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 37, 600])
def test_rows_that_are_added_change_no_bit(dtype: torch.dtype, tokens: int) -> None:
    """In half precision experts are given rows of zeros too, and outputs are weighted some tokens at a time."""
    module = next(m for m in build("qwen3_moe", dtype=dtype).modules() if hasattr(m, "gate_up_proj"))
    hidden, slots = module.gate_up_proj.shape[2], 2
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    index = torch.rand(tokens, module.num_experts, generator=generator).topk(slots).indices
    weights = torch.rand(tokens, slots, generator=generator).to(dtype)
    with torch.no_grad():
        output, routed = routed_experts(module, x, index, weights)
        each = torch.zeros(tokens, slots, hidden, dtype=dtype)
        for expert in range(module.num_experts):
            row, slot = (index == expert).nonzero().T
            if len(row):
                each[row, slot] = expert_output(module, expert, x[row])
        expected = (each * weights[..., None]).sum(1)
    assert torch.equal(output, expected)
    assert torch.equal(routed.value.view(tokens, slots).abs(), each.abs().amax(-1).float())


def test_experts_outside_the_interface_are_refused_by_name() -> None:
    """Llama 4 multiplies all its experts at once in its own code."""
    import transformers

    from tests.families import GQA

    config = transformers.Llama4TextConfig(
        **GQA, head_dim=16, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=96
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    where = sites(model, find_anatomy(model).main, "experts")
    with pytest.raises(ModelError, match="Llama4TextExperts"), ExpertsTap(where).attached():
        raise AssertionError
    assert not any(hasattr(module, "has_gate") for module in where)
