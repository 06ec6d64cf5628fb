"""The vision tower beside the language model: output untouched, and every number what its definition says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens.inputs.vision import load_pictures
from sinklens.models.opening import open_model
from sinklens.tracers import signals as sig
from sinklens.tracers.attention import Mode
from sinklens.tracers.batch import Batch, collate, forward
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.record_vision import vision_tower
from tests.inputs.vision.painting import noise
from tests.tracers.test_families import settings
from tests.vlms import VISION, VLMS, build, processor

PICTURES = [noise(30, 50, 1), noise(70, 33, 2)]


@pytest.fixture(scope="module", params=list(VLMS))
def given(request):
    """A model, and a prompt with two pictures of different shapes."""
    model = build(request.param)
    prompts = load_pictures([PICTURES], processor(request.param), model.config, question="how many ?")
    return open_model(model), collate(prompts.prompts)


def dense_calls(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The maps of the vision tower's attention calls, from what torch's kernel is given."""
    maps: list[np.ndarray] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
        if query.shape[1] == VISION["num_attention_heads"]:
            assert attn_mask is None
            assert not is_causal
            logits = query.double() @ key.double().transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
            maps.append(torch.softmax(logits, -1).numpy())
        return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        forward(model, batch)
    return maps


@pytest.mark.parametrize("mode", list(Mode))
def test_tracing_both_towers_leaves_the_output(given, mode):
    opened, batch = given
    plain = forward(opened.module, batch).logits
    before = settings(
        opened.module
    )  # after a pass: transformers itself leaves hooks that collect hidden states
    traced = trace_batch(opened, batch, TracePlan(mode=mode))
    if mode is Mode.FAITHFUL:
        assert torch.equal(plain, traced.output.logits)
    else:
        torch.testing.assert_close(plain, traced.output.logits, atol=1e-3, rtol=1e-4)
    assert torch.equal(plain, forward(opened.module, batch).logits)
    assert settings(opened.module) == before
    assert traced.vision_blocks == VISION["num_hidden_layers"]
    assert traced.attention_calls == 4


def test_received_attention_is_the_mean_over_who_sees_the_patch(given, monkeypatch):
    opened, batch = given
    maps = dense_calls(opened.module, batch, monkeypatch)
    record = trace_batch(opened, batch, TracePlan()).records[0]
    layers, patches = record[sig.VISION_RECEIVED].shape
    received: list[list[np.ndarray]] = [[] for _ in range(layers)]
    visible: list[list[np.ndarray]] = [[] for _ in range(layers)]
    layer = 0
    for weights in maps:
        received[layer] += [view.mean(1) for view in weights]  # [head, key]
        visible[layer] += [np.full(view.shape[-1], view.shape[1]) for view in weights]
        layer += sum(map(len, visible[layer])) == patches
    assert layer == layers
    for i in range(layers):
        per_head = np.concatenate(received[i], axis=-1)
        np.testing.assert_allclose(record[sig.VISION_RECEIVED][i], per_head.mean(0), atol=2e-6)
        np.testing.assert_array_equal(record[sig.VISION_VISIBLE][i], np.concatenate(visible[i]))
        np.testing.assert_allclose(record[sig.VISION_RECEIVED_PEAK][i], per_head.max(-1), atol=2e-6)
        np.testing.assert_array_equal(record["vision_received_peak_pos"][i], per_head.argmax(-1))


def test_norms_are_those_of_block_outputs_and_of_what_enters_the_text(given):
    opened, batch = given
    tower = vision_tower(opened.anatomy)
    assert tower is not None
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    model = opened.module
    hooks = [model.get_submodule(b.path).register_forward_hook(keep(b.path)) for b in tower.blocks]
    first = opened.anatomy.main.blocks[0].path
    hooks.append(
        model.get_submodule(first).register_forward_pre_hook(
            lambda _, args, kwargs: seen.__setitem__("in", args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    )
    forward(model, batch)
    for hook in hooks:
        hook.remove()
    record = trace_batch(opened, batch, TracePlan()).records[0]
    for block in tower.blocks:
        expected = np.linalg.norm(seen[block.path].detach().double().numpy(), axis=-1).ravel()
        np.testing.assert_allclose(record[sig.VISION_NORM][block.index], expected, rtol=1e-5)
    entering = np.linalg.norm(seen["in"][0].detach().double().numpy(), axis=-1)
    np.testing.assert_allclose(record[sig.EMBEDDED_NORM], entering, rtol=1e-5)


def test_members_are_places_of_the_patch_axis(given):
    """Every member exists, no patch has two cells of one grid, and no patch is shared by pictures."""
    opened, batch = given
    record = trace_batch(opened, batch, TracePlan()).records[0]
    patches = record[sig.VISION_NORM].shape[1]
    owners: dict[int, int] = {}
    assert record.spans is not None
    for grid in record.spans.grids:
        assert grid.members is not None
        places = grid.members[grid.members >= 0]
        assert places.max() < patches
        for place in places.tolist():
            assert owners.setdefault(place, grid.picture) == grid.picture


def test_only_what_is_asked_for_is_recorded(given):
    opened, batch = given
    record = trace_batch(opened, batch, TracePlan(frozenset({sig.VISION_NORM}))).records[0]
    assert sig.VISION_NORM.name in record.arrays
    assert not {name for name in record.arrays if name.startswith(("vision_received", "vision_visible"))}
    text = trace_batch(opened, batch, TracePlan(frozenset({sig.RESIDUAL_NORM})))
    assert text.vision_blocks is None
    assert sig.VISION_NORM.name not in text.records[0].arrays


def test_text_alone_has_no_vision_signals(given):
    opened, _ = given
    ids = torch.arange(20, 33)[None]
    batch = Batch({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
    traced = trace_batch(opened, batch, TracePlan())
    assert traced.vision_blocks is None
    assert not [name for name in traced.records[0].arrays if "vision" in name or "embedded" in name]
