"""Planted visual sinks are found in the patch of the original picture that shows the mark, through the whole path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.core.errors import ModelError, UsageError
from sinklens.inputs.spans import PatchGrid
from sinklens.inputs.spec import Prompt
from sinklens.inputs.vision import load_pictures
from sinklens.pipeline.profile import profile
from sinklens.testbeds.planting.pictures import Marked, VisualTruth, covered, painted, plant_visual
from tests.inputs.vision.painting import noise
from tests.vlms import build, processor

Box = tuple[int, int, int, int]
DIM, LAYER_IN, STRENGTH = 11, 0, 3.0
HEADS = tuple((layer, head) for layer in (1, 2, 3) for head in range(4))
SIZES = {
    "llava": [(80, 80), (80, 120), (120, 80)],
    "qwen2_vl": [(48, 64), (64, 40), (40, 40)],
    "qwen2_5_vl": [(48, 64), (64, 40), (40, 40)],
    "qwen3_vl": [(48, 64), (64, 40), (40, 40)],
    "llava_next": [(64, 64), (32, 96), (64, 32)],
    "internvl": [(64, 64), (64, 128), (128, 64)],
}
"""Heights and widths whose cells end between pixels, so that a mark covers cells whole or not at all."""
ANALYZERS = (
    "visual-sinks",
    "image-centric-heads",
    "contribution-norm",
    "vision-tower-sinks",
    "background-share",
)


@dataclass
class Planted:
    model: Any
    processor: Any
    truth: VisualTruth
    family: str

    def run(self, pictures: list[Any], **options: Any) -> Any:
        return profile(
            self.model, tokenizer=self.processor.tokenizer, processor=self.processor, images=pictures,
            question="how many ?", bos="on", analyzers=options.pop("analyzers", ANALYZERS), verify=False, **options,
        )  # fmt: skip


def load(family_processor: Any, model: Any, picture: np.ndarray) -> Prompt:
    given = load_pictures([[picture]], family_processor, model.config, question="how many ?", bos="on")
    return given.prompts[0]


def coarsest(prompt: Prompt) -> PatchGrid:
    """The view with the largest cells: a mark over one of them covers whole cells of every view."""
    assert prompt.visual is not None
    return max(prompt.visual.spans.grids, key=lambda grid: area(grid.cell_box(0, 0)))


def area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def mark_in(prompt: Prompt, rng: np.random.Generator) -> tuple[tuple[int, int], Box]:
    """A cell of the coarsest view at random, and its box in the original picture."""
    grid = coarsest(prompt)
    row, col = int(rng.integers(grid.shape[0])), int(rng.integers(grid.shape[1]))
    left, top, right, bottom = grid.cell_box(row, col)
    return (row, col), (round(left), round(top), round(right), round(bottom))


@cache
def planted(family: str) -> Planted:
    model, made = build(family), processor(family)
    for name, parameter in model.named_parameters():
        if name.endswith("v_proj.bias"):
            torch.nn.init.zeros_(parameter)  # or a sink's value could not drain
    rng, calibration = np.random.default_rng(0), list[Marked]()
    for i in range(18):
        picture = noise(*SIZES[family][i % 3], seed=i)
        prompt, boxes = load(made, model, picture), []
        if i % 6:
            _, box = mark_in(prompt, rng)
            prompt, boxes = load(made, model, painted(picture, box)), [(0, box)]
        calibration.append(covered(prompt, boxes))
    truth = plant_visual(model, calibration, heads=HEADS, dim=DIM, layer_in=LAYER_IN, strength=STRENGTH)
    return Planted(model, made, truth, family)


@pytest.mark.parametrize("family", list(SIZES))
def test_planted_sinks_are_found_in_the_right_patch_of_the_original(family: str) -> None:
    bed = planted(family)
    rng = np.random.default_rng(7)
    pictures, boxes, cells = [], [], []
    for i in range(6):
        picture = noise(*SIZES[family][i % 3], seed=100 + i)
        cell, box = mark_in(load(bed.processor, bed.model, picture), rng)
        pictures.append(painted(picture, box))
        boxes.append(box)
        cells.append(cell)
    clean = noise(*SIZES[family][0], seed=200)
    run = bed.run([*pictures, clean])
    finding = run.findings["visual-sinks"]
    assert finding.summary["dims"] == str(DIM)
    assert finding.summary["provenance"] == "discovered"
    spans = [record.spans for record in run.trace]
    for index, box in enumerate(boxes):
        rows = [row for row in finding.rows if row["prompt"] == index]
        shown = {
            (number, row, col)
            for number, grid in enumerate(spans[index].grids)
            for row, col in np.argwhere(grid.positions >= 0).tolist()
            if inside(grid.cell_box(row, col), box)
        }
        number = {int(p): i for i, grid in enumerate(spans[index].grids) for p in grid.positions.ravel()}
        assert {(number[row["position"]], row["row"], row["col"]) for row in rows} == shown
        assert any((row["row"], row["col"]) == cells[index] for row in rows), "the cell that was chosen"
        assert {(row["first_layer"], row["last_layer"]) for row in rows} == {(1, 3)}
        assert min(row["phi"] for row in rows) > 6
    assert not [row for row in finding.rows if row["prompt"] == 6], "a picture without a mark"
    assert finding.status == "found"
    check_the_rest(run)


def inside(cell: tuple[float, float, float, float], box: Box) -> bool:
    """Whether a cell lies in a box, up to the softness of resized edges."""
    left, top, right, bottom = cell
    return left > box[0] - 0.1 and top > box[1] - 0.1 and right < box[2] + 0.1 and bottom < box[3] + 0.1


def check_the_rest(run: Any) -> None:
    """A sink gets many times the attention of another visual token in the planted heads, and adds less all the same."""
    added = run.findings["contribution-norm"]
    assert added.status == "found"
    assert {row["layer"] for row in added.rows} == {1, 2, 3}
    assert 0.5 * np.exp(STRENGTH) < added.summary["attention_ratio"] < 2 * np.exp(STRENGTH)
    assert added.summary["value_ratio"] < 0.1
    assert added.summary["contribution_ratio"] < 1
    assert added.summary["attending"] == 1.0
    assert run.findings["background-share"].status == "not-applicable"


def test_sinks_planted_on_the_background_are_found_there() -> None:
    """Objects fill the left 40 % of every picture by its mask, and every mark is to the right of them."""
    bed, rng, rows = planted("llava"), np.random.default_rng(11), []
    for i in range(12):
        picture = noise(80, 80, seed=400 + i)
        mask = np.zeros((80, 80), dtype=np.uint8)
        mask[:, :32] = 255
        col, row = int(rng.integers(2, 5)), int(rng.integers(5))
        marked = painted(picture, (16 * col, 16 * row, 16 * col + 16, 16 * row + 16))
        rows.append({"image": marked, "mask": mask, "question": "how many ?"})
    run = profile(
        bed.model, tokenizer=bed.processor.tokenizer, processor=bed.processor, images=rows, bos="on",
        analyzers=("background-share",), verify=False,
    )  # fmt: skip
    finding = run.findings["background-share"]
    assert finding.status == "found"
    assert finding.summary["sinks"] == 12
    assert finding.summary["background"] == 1.0
    assert finding.summary["base_rate"] == pytest.approx(0.6)
    assert finding.summary["ci_low"] == pytest.approx(0.4)


def test_the_bundled_model_grew_no_visual_sink_and_says_so() -> None:
    run = profile("bundled:vlm-shapes", n=4, analyzers=ANALYZERS, verify=False)
    finding = run.findings["visual-sinks"]
    assert finding.status == "not-found"
    assert finding.verdict.startswith(
        "No visual sink in 4 pictures: the model has no sink dims that a token could be large in."
    )
    assert "large for the other tokens too" in finding.verdict
    reasons = {name: found.reason for name, found in run.findings.items() if found.status == "not-applicable"}
    assert reasons.keys() == {"image-centric-heads", "contribution-norm", "background-share"}
    assert all(reason is not None and "no sink dims" in reason for reason in reasons.values())


def test_random_models_have_no_visual_sink() -> None:
    for family in ("llava", "qwen2_vl", "llava_next"):
        model, made = build(family, seed=3), processor(family)
        bed = Planted(model, made, planted(family).truth, family)
        finding = bed.run(
            [noise(*size, seed=9) for size in SIZES[family]], analyzers=("visual-sinks",)
        ).findings["visual-sinks"]
        assert finding.status != "found"
        assert not finding.rows


def test_sink_dims_can_be_named_and_must_be_known_to_be_published() -> None:
    bed = planted("llava")
    pictures = [noise(80, 80, seed=5)]
    run = bed.run(pictures, analyzers=("visual-sinks",), sink_dims="11,12")
    assert run.findings["visual-sinks"].summary["dims"] == "11, 12"
    assert run.findings["visual-sinks"].summary["provenance"] == "given"
    with pytest.raises(UsageError, match="No published sink dims"):
        bed.run(pictures, analyzers=("visual-sinks",), sink_dims="published")
    with pytest.raises(UsageError, match="Sink dims are numbers"):
        bed.run(pictures, analyzers=("visual-sinks",), sink_dims="eleven")


def test_what_cannot_be_planted_is_refused_and_leaves_the_model_alone() -> None:
    model, made = build("llava"), processor("llava")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blank = [covered(load(made, model, noise(80, 80, seed=i)), []) for i in range(8)]
    with pytest.raises(UsageError, match="No calibration picture shows a mark"):
        plant_visual(model, blank, heads=HEADS, dim=DIM, layer_in=LAYER_IN)
    rng = np.random.default_rng(1)
    wrong = [replace(item, shows=rng.random(len(item.shows)) < 0.2) for item in blank]
    wrong = [replace(item, shows=item.shows & item.prompt.visual.spans.visual) for item in wrong]  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="do not tell marks apart"):
        plant_visual(model, wrong, heads=HEADS, dim=DIM, layer_in=LAYER_IN)
    assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())
