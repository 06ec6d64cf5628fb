"""PAINT equals its definition, from the attention of the class token to the raised logits, however a prompt is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.kernels.spec import AttentionCall
from sinklens.mitigations import PAINT, NothingEdited
from sinklens.mitigations.class_token import chosen
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics, sites
from sinklens.tracers.executor import trace
from sinklens.tracers.record_vision import vision_tower

from ..families import LAYERS, build, inputs
from ..pictures import opened_vlm, picture_prompt
from .dense import full_map
from .layerwise import held_against, visual_of
from .test_generating import generated
from .test_layer_by_layer import last_rows, raised_call
from .test_visual_gates import stepwise
from .test_with import logits, state


def by_class_token(model: Any, given: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Local and summary patches of every picture, from whole maps of the vision tower."""
    tower: Any = vision_tower(find_anatomy(model))
    rows: dict[int, Tensor] = {}

    def keep(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        rows[site.layer] = full_map(call)[:, :, 0, 1:].sum(1)
        return output

    with AttentionTap(sites(model, tower, "attention"), no_statistics, ignore, edit=keep).attached(model):
        logits(model, given)
    found = []
    for first, late in zip(rows[0].numpy(), rows[len(rows) - 2].numpy(), strict=True):
        low, high = np.percentile(late, [25, 75])
        summary = late > high + 1.5 * (high - low)
        local = np.zeros_like(summary)
        local[np.argsort(-first, kind="stable")[: int(len(first) * 0.25)]] = True
        found.append((torch.tensor(local & ~summary), torch.tensor(summary)))
    return found


def strengths(model: Any, given: dict[str, Tensor], first: int | None = None) -> Tensor:
    """alpha or beta of every visual key in the rows that choose `[batch row key]`."""
    visual = visual_of(given)
    rows = last_rows(given["attention_mask"] != 0, first)
    strength = torch.zeros_like(visual, dtype=torch.float64)
    for row, (local, summary) in enumerate(by_class_token(model, given)):
        strength[row, visual[row]] = 0.7 * local.double() + 0.4 * summary.double()
    return rows[:, :, None] * strength[:, None]


def llava(outlier: bool = True) -> Any:
    """With sharper attention in the tower, so that it has outliers."""
    model = build("llava")
    if outlier:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vision_tower" in name and "q_proj.weight" in name:
                    parameter *= 3.0
    return model


@pytest.mark.parametrize("padding", ["left", "right"])
def test_it_equals_its_definition(padding: str) -> None:
    model, given = llava(), inputs("llava", batch=3, length=17, padding=padding)
    real, gain = given["attention_mask"] != 0, strengths(model, given)
    assert bool((gain == 0.4).any())
    assert bool((gain == 0.7).any())

    def definition(site: Site, call: AttentionCall) -> Tensor:
        return raised_call(call, gain if site.layer >= 2 else 0 * gain)

    before = state(model)
    with PAINT()(model) as effect, held_against(model, real, definition) as apart:
        logits(model, given)
    assert apart[0] == apart[1] == 0.0
    assert min(apart[2], apart[3]) > 1e-3
    assert set(effect.by_layer) == {2, 3}
    assert state(model) == before


def test_it_decodes_the_rows_of_the_definition() -> None:
    model, given = llava(), inputs("llava", batch=2, length=15, padding="left")
    prompt = given["input_ids"].shape[1] - 4
    gain = strengths(model, given, first=prompt)

    def edit(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        return raised_call(call, gain).to(output.dtype) if site.layer >= 2 else output

    tap = AttentionTap(sites(model, find_anatomy(model).main, "attention"), no_statistics, ignore, edit=edit)
    with tap.attached(model):
        expected = logits(model, {**given, "use_cache": False}).double()  # type: ignore[dict-item]
    with PAINT()(model):
        found = stepwise(model, given, prompt)
    limit = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected[:, prompt - 1 :], rtol=0, atol=limit)


WAYS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "pieces": {"prefill_chunk_size": 5},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beams", [1, 2])
def test_every_way_to_generate_gives_the_same(way: str, beams: int) -> None:
    model, given = llava(), inputs("llava", batch=2, length=15, padding="left")
    plain = generated(model, given, num_beams=beams)
    with PAINT()(model) as effect:
        expected = generated(model, given, num_beams=beams)
        found = generated(model, given, num_beams=beams, **WAYS[way])
    torch.testing.assert_close(found.sequences, expected.sequences)
    for step, values in enumerate(found.logits):
        torch.testing.assert_close(values, expected.logits[step], rtol=0, atol=3e-4)
    assert not torch.allclose(expected.logits[0], plain.logits[0], atol=1e-3)
    assert effect.acted


def test_a_trace_of_a_prompt_with_a_picture() -> None:
    """Kinds come from the prompt's spans, and the vision tower is recorded beside."""
    opened, prompt = opened_vlm("llava"), picture_prompt("llava", 19)
    plain = trace(opened, [prompt]).records[0]
    with PAINT(start=0)(opened) as effect:
        found = trace(opened, [prompt]).records[0]
    assert effect.acted
    vision = [name for name in plain.arrays if name.startswith("vision")]
    assert vision
    assert all((found.arrays[name] == plain.arrays[name]).all() for name in vision)


def test_outliers_of_a_box_plot() -> None:
    draw = torch.Generator().manual_seed(3)
    first, late = torch.rand(4, 41, generator=draw), torch.rand(4, 41, generator=draw) ** 6
    local, summary = chosen(first, late, 0.25)
    for row in range(4):
        low, high = np.percentile(late[row].double().numpy(), [25, 75])
        assert summary[row].tolist() == (late[row].double() > high + 1.5 * (high - low)).tolist()
        top = set(first[row].topk(10).indices.tolist())
        assert set(local[row].nonzero()[:, 0].tolist()) == top - set(summary[row].nonzero()[:, 0].tolist())
    assert bool(summary.any())
    assert not bool((local & summary).any())


def test_what_cannot_be_told_is_refused() -> None:
    model, given = llava(), inputs("llava", batch=2, length=13)
    plain, before = logits(model, given), state(model)
    with PAINT(alpha=0.0, beta=0.0)(model) as effect:
        assert effect.identity
        assert torch.equal(logits(model, given), plain)
    for family in ("qwen2_vl", "qwen2_5_vl", "gemma3"):
        with pytest.raises(ModelError, match="class token, and this one has none"), PAINT()(build(family)):
            pass
    with pytest.raises(ModelError, match="needs a model that reads pictures"), PAINT()(build("llama")):
        pass
    text = {"input_ids": torch.randint(5, 300, (1, 9))}
    with pytest.warns(NothingEdited, match="no prompt has visual tokens"), PAINT()(model):
        logits(model, text)
    unseen = {key: value for key, value in given.items() if key != "pixel_values"}
    with PAINT()(model):
        logits(model, given)
        with pytest.raises(ModelError, match="did not read the pictures of this prompt"):
            logits(model, unseen)
    with pytest.raises(UsageError, match="there is no layer 4"), PAINT(start=LAYERS)(model):
        pass
    assert state(model) == before
    for bad in ({"alpha": -0.1}, {"beta": float("inf")}, {"local": 1.5}, {"start": 3, "end": 3}):
        with pytest.raises(UsageError):
            PAINT(**bad)  # type: ignore[arg-type]
