"""Tracing every promised family: the output stays what it was, the statistics are what the definition says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sinklens.kernels.reference import attention_reference
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import ModelInfo, OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.attention import AttentionTap, Mode, Site
from sinklens.tracers.batch import Batch, first_tensor, forward
from sinklens.tracers.executor import TracePlan, sites, trace_batch
from sinklens.tracers.recorder import Recorder
from sinklens.tracers.trace import PromptRecord
from tests.families import FAMILIES, build, inputs

ROUTED = [name for name, family in FAMILIES.items() if family.routed]
PADDED = [name for name in ROUTED if FAMILIES[name].padding and FAMILIES[name].kind in ("text", "encoder")]
LENGTHS = (7, 29)
"""Shorter and longer than the sliding window of 8."""


def opened(family: str, dtype: torch.dtype = torch.float32) -> OpenedModel:
    model = build(family, dtype=dtype)
    info = ModelInfo(family, None, family, 4, 4, 2, 64, 0, str(dtype))
    return OpenedModel(model, None, find_anatomy(model), info)


def batch_of(family: str, length: int, padding: str | None = None, batch: int = 2) -> Batch:
    given: dict[str, Any] = inputs(family, length=length, padding=padding, batch=batch)
    mask = given.get("attention_mask")
    return Batch(given, mask.bool() if mask is not None else None)


def real(output: Tensor, batch: Batch) -> Tensor:
    return (
        output[batch.valid] if batch.valid is not None and output.shape[:2] == batch.valid.shape else output
    )


def settings(model: nn.Module) -> list[Any]:
    """All that tracing may touch: hooks, implementations, modes."""
    configs = [getattr(m, "config", None) for m in model.modules()]
    names = [
        (c._attn_implementation, c._experts_implementation)
        for c in configs
        if c is not None and hasattr(c, "_attn_implementation")
    ]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    return [names, hooks]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", ROUTED)
def test_faithful_tracing_leaves_the_output_bit_identical(family: str, length: int) -> None:
    model, batch = opened(family), batch_of(family, length)
    before, state = first_tensor(forward(model.module, batch)), settings(model.module)
    traced = trace_batch(model, batch, TracePlan())
    assert torch.equal(first_tensor(traced.output), before)
    assert settings(model.module) == state
    assert traced.attention_calls == sum(block.attention is not None for block in model.anatomy.main.blocks)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", PADDED)
def test_faithful_tracing_is_bit_identical_on_padded_batches(family: str, padding: str) -> None:
    model, batch = opened(family), batch_of(family, 23, padding)
    before = first_tensor(forward(model.module, batch))
    assert torch.equal(
        real(first_tensor(trace_batch(model, batch, TracePlan()).output), batch), real(before, batch)
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", ROUTED)
def test_fused_tracing_gives_the_output_to_rounding(family: str, length: int) -> None:
    padding = "left" if family in PADDED else None
    model, batch = opened(family), batch_of(family, length, padding)
    before = real(first_tensor(forward(model.module, batch)), batch)
    after = real(first_tensor(trace_batch(model, batch, TracePlan(mode=Mode.FUSED)).output), batch)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", ROUTED)
def test_blocked_statistics_equal_the_dense_reference(family: str, length: int, mode: Mode) -> None:
    padding = "left" if family in PADDED else None
    model, batch = opened(family), batch_of(family, length, padding)
    worst: dict[Stat, float] = {}

    def compare(site: Site, call: AttentionCall, found: AttentionStatistics) -> None:
        want = recorder.attention.asks(site, call)
        _, dense = attention_reference(call, want)
        assert torch.equal(found.visible, dense.visible)  # type: ignore[arg-type]
        for stat in want.stats:
            # A distance is a difference of positions, so its rounding is that of positions.
            extent = call.key.shape[2] if stat is Stat.DISTANCE else 1
            scale = dense[stat].abs().max().clamp(min=extent)
            worst[stat] = max(worst.get(stat, 0.0), float((found[stat] - dense[stat]).abs().max() / scale))

    recorder = Recorder(batch, len(model.anatomy.main.blocks), TracePlan().signals, TracePlan().limits)
    tap = AttentionTap(
        sites(model.module, model.anatomy.main, "attention"), recorder.attention.asks, compare, mode=mode
    )
    tap.counted = batch.valid
    with tap.attached(model.module):
        forward(model.module, batch)
    assert worst
    assert max(worst.values()) < 1e-6, worst


@pytest.mark.parametrize("family", [name for name in ROUTED if FAMILIES[name].kind in ("text", "encoder")])
def test_recorded_attention_equals_the_models_own_eager_weights(family: str) -> None:
    model, batch = opened(family), batch_of(family, 29, "right")
    records = trace_batch(model, batch, TracePlan()).records
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        maps = model.module(**batch.inputs, output_attentions=True).attentions
    for row, record in enumerate(records):
        n = len(record["visible_queries"][0])
        for layer, weights in enumerate(maps):
            own = weights[row, :, :n, :n].double()
            received = own.sum(1) / torch.as_tensor(record[sig.VISIBLE_QUERIES][layer])
            kept = record[sig.KEPT_POSITIONS]
            np.testing.assert_allclose(record[sig.ATTENTION_RECEIVED][layer], received[:, kept], atol=2e-6)
            entropy = -torch.xlogy(own, own).sum(-1).mean(-1)
            np.testing.assert_allclose(record[sig.ATTENTION_ENTROPY][layer], entropy, atol=1e-5)


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.kind in ("text", "encoder")])
def test_a_batch_gives_what_one_by_one_gives(family: str) -> None:
    model = opened(family)
    both = batch_of(family, 23, "right")
    together = trace_batch(model, both, TracePlan()).records
    for row in range(2):
        n = int(both.valid[row].sum())  # type: ignore[index]
        alone = Batch(
            {"input_ids": both.inputs["input_ids"][row : row + 1, :n]}, torch.ones(1, n, dtype=torch.bool)
        )
        record = trace_batch(model, alone, TracePlan()).records[0]
        assert record.arrays.keys() == together[row].arrays.keys()
        for name, array in record.arrays.items():
            if name.endswith(("_pos", "_dim")) or name.startswith("router_choice"):
                continue  # near-ties may swap; the values are compared
            np.testing.assert_allclose(array, together[row].arrays[name], atol=2e-4, rtol=2e-4, err_msg=name)


UNROUTED = [name for name, family in FAMILIES.items() if not family.routed]
DIRECT = [name for name in UNROUTED if name.startswith("falcon")]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", UNROUTED)
def test_families_that_do_not_route_keep_their_output(family: str, padding: str) -> None:
    model, batch = opened(family), batch_of(family, 29, padding)
    before, state = real(first_tensor(forward(model.module, batch)), batch), settings(model.module)
    traced = trace_batch(model, batch, TracePlan())
    after = real(first_tensor(traced.output), batch)
    assert traced.attention_calls == 4
    assert settings(model.module) == state
    assert torch.equal(after, before) if family in DIRECT else torch.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in UNROUTED if name not in DIRECT])
def test_families_that_multiply_by_hand_are_read_from_their_own_weights(family: str) -> None:
    model, batch = opened(family), batch_of(family, 29, "right")
    record = trace_batch(model, batch, TracePlan()).records[1]
    with torch.no_grad():
        maps = model.module(**batch.inputs, output_attentions=True).attentions
    check_received(record, [weights[1] for weights in maps])
    assert sig.VALUE_NORM.name not in record.arrays


@pytest.mark.parametrize("family", DIRECT)
def test_families_that_call_the_kernel_are_read_from_its_arguments(family: str, monkeypatch: Any) -> None:
    model, batch = opened(family), batch_of(family, 29, "right")
    record = trace_batch(model, batch, TracePlan()).records[1]
    maps: list[Tensor] = []

    def dense(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **other: Any) -> Tensor:
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).double()
        assert attn_mask is not None
        scores = (
            scores.masked_fill(~attn_mask, -1e300) if attn_mask.dtype == torch.bool else scores + attn_mask
        )
        maps.append(scores.softmax(-1))
        return (maps[-1].to(v.dtype) @ v).to(v.dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", dense)
    forward(model.module, batch)
    check_received(record, [weights[1] for weights in maps])


def check_received(record: PromptRecord, maps: list[Tensor]) -> None:
    """The recorded shares against full maps `[head, query, key]`, real tokens first."""
    n = record["visible_queries"].shape[1]
    assert len(maps) == 4
    for layer, weights in enumerate(maps):
        received = weights[:, :n, :n].double().sum(1) / torch.as_tensor(record[sig.VISIBLE_QUERIES][layer])
        kept = record[sig.KEPT_POSITIONS]
        np.testing.assert_allclose(record[sig.ATTENTION_RECEIVED][layer], received[:, kept], atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "gpt_oss", "deepseek_v3", "bert", "gpt2"])
def test_half_precision_models_stay_bit_identical_too(family: str, dtype: torch.dtype) -> None:
    model, batch = opened(family, dtype), batch_of(family, 19, "right")
    before = real(first_tensor(forward(model.module, batch)), batch)
    assert torch.equal(real(first_tensor(trace_batch(model, batch, TracePlan()).output), batch), before)


def test_nothing_stays_on_the_model_after_an_error() -> None:
    model, batch = opened("qwen3_moe"), batch_of("qwen3_moe", 9)
    state = settings(model.module)
    broken = replace(batch, inputs={**batch.inputs, "input_ids": batch.inputs["input_ids"] + 10_000})
    with pytest.raises(IndexError):
        trace_batch(model, broken, TracePlan())
    assert settings(model.module) == state


def test_generation_under_the_tap_gives_the_same_tokens() -> None:
    model = opened("gemma3_text")
    ids = inputs("gemma3_text", batch=1, length=11)["input_ids"]
    plain = model.module.generate(ids, max_new_tokens=9, do_sample=False)  # type: ignore[operator]
    recorder = Recorder(Batch({"input_ids": ids}, None), 4, TracePlan().signals, TracePlan().limits)
    seen: list[tuple[int, int]] = []
    tap = AttentionTap(
        sites(model.module, model.anatomy.main, "attention"),
        recorder.attention.asks,
        lambda site, call, statistics: seen.append((call.query.shape[2], call.key.shape[2])),
    )
    with tap.attached(model.module):
        traced = model.module.generate(ids, max_new_tokens=9, do_sample=False)  # type: ignore[operator]
    assert torch.equal(plain, traced)
    assert any(query == 1 and key > 1 for query, key in seen)
