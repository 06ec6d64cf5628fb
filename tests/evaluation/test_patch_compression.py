"""One token and what its patch shows, on the bundled model: its shape is in that token and in no other."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.evaluation.patch_compression import CONDITIONS, PatchCase, patch_compression
from sinklens.models.opening import open_model
from sinklens.testbeds.vision import vision_recipes
from sinklens.testbeds.vision_patches import patch_questions, single_objects


def test_what_one_token_carries() -> None:
    task = vision_recipes["vlm-shapes"].task
    scenes = single_objects(task, 12, np.random.default_rng(7))
    assert len(scenes) == 12
    assert (scenes.counts == 1).all()
    cases = [PatchCase(*case) for case in patch_questions(task, scenes)]
    pixels = cases[0].prompt.visual.inputs["pixel_values"][0]  # type: ignore[union-attr]
    row, col = divmod(cases[0].position - 1, task.grid)
    inside = pixels[:, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
    outside = pixels.clone()
    outside[:, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4] = 0
    assert inside.max() > 0.8
    assert outside.max() <= 0.11
    found = patch_compression(open_model("bundled:vlm-shapes", dtype="float32"), cases)
    assert found["n_cases"] == 12
    assert found["kinds"].keys() == {"count", "colour", "shape"}
    for each in found["kinds"].values():
        assert set(each) == set(CONDITIONS)
        assert each["kept"]["probability"]["mean"] > 0.95
        assert each["kept"]["difference"]["mean"] == 0.0
    # This model's shape is in the object's token alone; its colour and count are in the other tokens.
    kinds = found["kinds"]
    assert kinds["shape"]["removed"]["difference"]["high"] < -0.3
    assert kinds["shape"]["alone"]["probability"]["mean"] > 0.95
    assert kinds["colour"]["alone"]["difference"]["high"] < -0.3
    assert all(each["frozen"]["probability"]["mean"] > 0.95 for each in kinds.values())
    names = cases[0].prompt.pieces
    assert [names[at] for at in cases[0].kinds["count"]] == ["one"]
    assert pytest.approx(0.0) == found["kinds"]["count"]["kept"]["difference"]["high"]
