"""Interventions against the plainest form of each: explicit masks, zeroed weights, edited outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError
from sinklens.inputs.spec import Prompt
from sinklens.kernels.reference import attention_reference
from sinklens.kernels.spec import AttentionCall, Want
from sinklens.models.spec import OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.attention import AttentionTap, Site
from sinklens.tracers.batch import Batch, collate, first_tensor, forward
from sinklens.tracers.blocked_key import KeyBlocked
from sinklens.tracers.executor import TracePlan, edited_output, sites, trace_batch
from sinklens.tracers.experts import ExpertsTap
from sinklens.tracers.interventions import (
    EntriesSet,
    Entry,
    ExpertsPruned,
    HeadsZeroed,
    Intervention,
    MedianEntriesZeroed,
    ProjectionZeroed,
    WriteZeroed,
)
from sinklens.tracers.states import residual_tap
from tests.families import FAMILIES
from tests.tracers.test_families import PADDED, batch_of, opened, real, settings

UNROUTED = [name for name, family in FAMILIES.items() if not family.routed and family.kind == "text"]
MOE = [name for name, family in FAMILIES.items() if family.moe]
FLOAT_SOFTMAX = {"gemma2", "gemma3", "gpt_oss"}
"""Their eager attention takes its softmax in float32 whatever the model's type is."""
HEADED = [name for name in (*PADDED, *UNROUTED)]


def exact(family: str) -> tuple[OpenedModel, float]:
    """A model in double precision where its family computes in it, and how exact a comparison can be."""
    if family in FLOAT_SOFTMAX:
        return opened(family), 2e-5
    model = opened(family, torch.float64)
    module: Any = model.module
    if FAMILIES[family].moe:
        module.set_experts_implementation("eager")  # the grouped kernel has no double precision
    return model, 1e-6


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[Prompt]:
    """Random token ids, indices that are not places in the batch."""
    generator = np.random.default_rng(seed)
    made = [(1, *generator.integers(5, 290, size=n - 1).tolist()) for n in lengths]
    return [Prompt(3 + 2 * i, ids, tuple(map(str, ids)), f"made:{i}") for i, ids in enumerate(made)]


def output(model: OpenedModel, batch: Batch, change: Intervention | None = None) -> Tensor:
    if change is None:
        return real(first_tensor(forward(model.module, batch)), batch)
    with change.applied(model, batch):
        return real(first_tensor(forward(model.module, batch)), batch)


def states(model: OpenedModel, batch: Batch, change: Intervention | None = None) -> dict[int, Tensor]:
    """The residual stream after every block."""
    seen: dict[int, Tensor] = {}
    hooks: Callable[..., Any] = residual_tap
    if change is None:
        with hooks(model.module, model.anatomy.main, seen.__setitem__):
            forward(model.module, batch)
        return seen
    with change.applied(model, batch), hooks(model.module, model.anatomy.main, seen.__setitem__):
        forward(model.module, batch)
    return seen


def explicitly_masked(position: int, valid: Tensor) -> Callable[[Site, AttentionCall, Tensor], Tensor]:
    """The attention output by the dense reference, with the key masked by hand."""
    places = [int(row.nonzero()[position]) for row in valid if int(row.sum()) > position]
    rows = [i for i, row in enumerate(valid) if int(row.sum()) > position]

    def edit(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        length = call.key.shape[2]
        mask = call.mask
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool)
            mask = (mask.tril() if call.causal else mask)[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
        mask = mask.double().expand(len(valid), *mask.shape[1:]).clone()
        for row, place in zip(rows, places, strict=True):
            own = mask[row, :, place, place].clone()
            mask[row, :, :, place] = float("-inf")
            mask[row, :, place, place] = own
        made, _ = attention_reference(replace(call, mask=mask, causal=False), Want(frozenset()))
        return made.reshape(output.shape)

    return edit


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", PADDED)
def test_a_blocked_key_equals_attention_under_an_explicit_mask(family: str, padding: str) -> None:
    (model, limit), batch = exact(family), batch_of(family, 19, padding)
    assert batch.valid is not None
    usual = output(model, batch)
    for position in (0, 5):
        wanted = real(
            first_tensor(edited_output(model, batch, explicitly_masked(position, batch.valid))), batch
        )
        found = output(model, batch, KeyBlocked(position))
        torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
        assert (found - usual).abs().max() > 1e-3


@pytest.mark.parametrize("family", UNROUTED)
def test_a_key_can_be_blocked_outside_the_attention_registry(family: str) -> None:
    """Nothing after the position depends on its token any more, and everything before stays as it was."""
    model, batch = opened(family, torch.float64), batch_of(family, 13)
    other = Batch({**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}, batch.valid)
    other.inputs["input_ids"][:, 4] = (other.inputs["input_ids"][:, 4] + 7) % 300
    assert (output(model, batch) - output(model, other)).abs().max() > 1e-3
    one, two = (output(model, item, KeyBlocked(4)).view(2, 13, -1) for item in (batch, other))
    torch.testing.assert_close(one[:, 5:], two[:, 5:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one[:, :4], output(model, batch).view(2, 13, -1)[:, :4], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert", "gemma2", "deepseek_v3"])
def test_the_sink_can_be_measured_while_its_key_is_blocked(family: str) -> None:
    model, batch = opened(family), batch_of(family, 17, "left")
    plan = TracePlan(
        frozenset({sig.ATTENTION_RECEIVED, sig.ATTENTION_SELF, sig.KEPT_POSITIONS, sig.VISIBLE_QUERIES})
    )
    before = trace_batch(model, batch, plan).records
    with KeyBlocked(3).applied(model, batch) as acted:
        after = trace_batch(model, batch, plan).records
    assert acted.edited == 2 * len(model.anatomy.main.blocks)
    for usual, record in zip(before, after, strict=True):
        assert (usual["visible_queries"][:, 3] > 1).all()
        assert (record["visible_queries"][:, 3] == 1).all()
        received = record["attention_received"][:, :, 3]
        np.testing.assert_allclose(received, record["attention_self"][:, :, 3], rtol=1e-6)


def test_prompts_that_lack_the_position_are_left_as_they_are() -> None:
    model = opened("llama")
    batch = collate(prompts((19, 7)))
    usual = first_tensor(forward(model.module, batch))
    for change in (KeyBlocked(9), WriteZeroed(1, "mlp", 9), EntriesSet((Entry(None, 1, 9, 3, 50.0),))):
        with change.applied(model, batch) as acted:
            changed = first_tensor(forward(model.module, batch))
        assert torch.equal(changed[1, :7], usual[1, :7])
        assert not torch.equal(changed[0], usual[0])
        assert acted.edited > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "olmo2", "gpt_oss"])
def test_entries_are_overwritten_and_shifted_where_they_were_asked_for(family: str, side: Any) -> None:
    model, batch = opened(family), collate(prompts((11, 17)), side=side)
    usual = states(model, batch)
    entries = (Entry(5, 1, 4, 7, 25.0), Entry(None, 1, 2, 9, -3.0, add=True), Entry(99, 1, 2, 9, 77.0))
    with EntriesSet(entries).applied(model, batch) as acted:
        forward(model.module, batch)
    assert acted.edited == 3
    changed = states(model, batch, EntriesSet(entries))
    start = 6 if side == "left" else 0
    wanted = usual[1].clone()
    wanted[1, 4, 7] = 25.0
    wanted[0, start + 2, 9] -= 3.0
    wanted[1, 2, 9] -= 3.0
    assert torch.equal(changed[1], wanted)
    assert torch.equal(changed[0], usual[0])
    assert not torch.equal(changed[2], usual[2])


def test_the_median_control_zeroes_as_many_entries_of_median_size() -> None:
    model, batch = opened("llama"), collate(prompts((11, 17)), side="left")
    usual, change = states(model, batch), MedianEntriesZeroed(((3, 2, 4),))
    changed = states(model, batch, change)
    assert torch.equal(changed[2][1], usual[2][1])
    gone = (changed[2] != usual[2]).nonzero()
    assert len(gone) == 4
    assert (gone[:, 0] == 0).all()
    assert (gone[:, 1] >= 6).all()
    sizes = usual[2][0, 6:].abs().flatten()
    removed = torch.stack([usual[2][tuple(place)].abs() for place in gone])
    assert ((removed - sizes.median()).abs() <= (sizes - sizes.median()).abs().kthvalue(4).values).all()


@pytest.mark.parametrize("family", MOE)
def test_pruning_equals_ablation_at_the_experts_seam(family: str) -> None:
    model, batch = opened(family), batch_of(family, 11, "right")
    where = sites(model.module, model.anatomy.main, "experts")
    layer = max(site.layer for site in where.values())
    with ExpertsTap(where, ablate=[(layer, 2), (layer, 5)]).attached():
        wanted = output(model, batch)
    change = ExpertsPruned(frozenset([(layer, 2), (layer, 5)]))
    torch.testing.assert_close(output(model, batch, change), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(model, batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_a_pruned_expert_is_still_seen_by_the_trace(family: str) -> None:
    model, batch = opened(family), batch_of(family, 11, "right")
    layer = max(block.index for block in model.anatomy.main.blocks if block.experts)
    usual = trace_batch(model, batch, TracePlan()).records
    with ExpertsPruned(frozenset([(layer, 2)])).applied(model, batch) as acted:
        records = trace_batch(model, batch, TracePlan()).records
    for one, other in zip(usual, records, strict=True):
        np.testing.assert_array_equal(one["expert_max"], other["expert_max"])
    assert batch.valid is not None
    assert acted.edited >= sum(int(record["expert_tokens"][layer, 2]) for record in records) > 0


@pytest.mark.parametrize("family", PADDED)
def test_a_silenced_head_equals_one_whose_attention_output_is_zero(family: str) -> None:
    (model, limit), batch = exact(family), batch_of(family, 11, "left")

    def silence(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        if site.layer != 1:
            return output
        output = output.clone()
        output[:, :, [0, 3]] = 0
        return output

    wanted = real(first_tensor(edited_output(model, batch, silence)), batch)
    found = output(model, batch, HeadsZeroed(frozenset([(1, 0), (1, 3)])))
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
    assert not torch.allclose(found, output(model, batch))


@pytest.mark.parametrize("part", ["mlp", "attention"])
@pytest.mark.parametrize("family", HEADED)
def test_a_zeroed_write_changes_one_position_of_its_block(family: str, part: Any) -> None:
    model, batch = opened(family), batch_of(family, 13, "right" if FAMILIES[family].padding else None)
    usual, changed = states(model, batch), states(model, batch, WriteZeroed(2, part, 4))
    assert torch.equal(changed[1], usual[1])
    moved = ((changed[2] - usual[2]).abs() > 1e-6).any(-1)
    assert moved[:, 4].all()
    assert int(moved.sum()) == 2


def test_without_its_feed_forward_write_a_position_keeps_what_attention_left() -> None:
    model, batch = opened("llama"), batch_of("llama", 13)
    block: Any = model.module.get_submodule(model.anatomy.main.blocks[2].path)
    made: list[Tensor] = []
    handle = block.mlp.register_forward_hook(lambda *given: made.append(given[2]))
    usual = states(model, batch)[2]
    handle.remove()
    changed = states(model, batch, WriteZeroed(2, "mlp", 4))[2]
    torch.testing.assert_close(changed[:, 4], usual[:, 4] - made[0][:, 4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in MOE if FAMILIES[name].shared_experts])
def test_a_shared_projection_can_be_zeroed(family: str) -> None:
    model, batch = opened(family), batch_of(family, 11)
    block = next(b for b in model.anatomy.main.blocks if b.shared_down_proj)
    found = output(model, batch, ProjectionZeroed(block.index))
    usual = output(model, batch)
    weight: Any = model.module.get_submodule(str(block.shared_down_proj))
    with torch.no_grad():
        weight.weight.zero_()
    torch.testing.assert_close(found, output(model, batch), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, usual)


CHANGES: dict[str, Intervention] = {
    "entries": EntriesSet((Entry(None, 1, 2, 3, 9.0), Entry(None, 2, 2, 3, 9.0))),
    "median": MedianEntriesZeroed(((3, 1, 2),)),
    "experts": ExpertsPruned(frozenset([(1, 2), (2, 0)])),
    "key": KeyBlocked(2),
    "heads": HeadsZeroed(frozenset([(0, 1), (2, 3)])),
    "mlp": WriteZeroed(1, "mlp", 2),
    "attention": WriteZeroed(1, "attention", 2),
    "projection": ProjectionZeroed(0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_stays_on_the_model_not_even_after_an_error(name: str) -> None:
    family = {"experts": "qwen3_moe"}.get(name, "llama")
    model, batch, change = opened(family), collate(prompts((11, 17))), CHANGES[name]
    before, usual = settings(model.module), first_tensor(forward(model.module, batch))
    with pytest.raises(RuntimeError, match="stop"), change.applied(model, batch):
        raise RuntimeError("stop")
    assert settings(model.module) == before
    with change.applied(model, batch) as acted:
        changed = first_tensor(trace_batch(model, batch, TracePlan()).output)
    assert acted.edited > 0
    assert not torch.equal(changed, usual)
    assert settings(model.module) == before
    assert torch.equal(first_tensor(forward(model.module, batch)), usual)


def test_what_the_model_has_no_place_for_is_said() -> None:
    model, batch = opened("llama"), batch_of("llama", 11)
    for change, changed in (
        (ExpertsPruned(frozenset([(1, 0)])), model),
        (HeadsZeroed(frozenset([(1, 0)])), _without_output(model)),
    ):
        before = settings(model.module)
        with pytest.raises(ModelError, match="Block 1"), change.applied(changed, batch):
            pass
        assert settings(model.module) == before


def _without_output(model: OpenedModel) -> OpenedModel:
    """A model whose output projections are not known."""
    main = model.anatomy.main
    blocks = tuple(replace(block, attention_output=None) for block in main.blocks)
    anatomy = replace(model.anatomy, towers=(replace(main, blocks=blocks),))
    return replace(model, anatomy=anatomy)


def test_an_attention_tap_beside_an_intervention_sees_the_changed_model() -> None:
    """Two seams at once: the tap edits outputs while a key is blocked, and both are undone."""
    model, batch = opened("llama"), batch_of("llama", 11)
    before = settings(model.module)
    calls: list[AttentionCall] = []

    def watch(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        calls.append(call)
        return output

    tap = AttentionTap(
        sites(model.module, model.anatomy.main, "attention"),
        lambda *_: Want(frozenset()),
        lambda *_: None,
        edit=watch,
    )
    with KeyBlocked(2).applied(model, batch), tap.attached(model.module):
        forward(model.module, batch)
    assert len(calls) == 4
    for call in calls:
        assert call.mask is not None
        assert not call.mask[:, :, 3:, 2].any()
        assert call.mask[:, :, 2, 2].all()
    assert settings(model.module) == before
