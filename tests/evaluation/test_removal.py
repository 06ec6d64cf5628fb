"""Visual tokens taken out against random others, and pictures that leave: on the bundled model of known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens.evaluation.answers import Answers, answer_positions
from sinklens.evaluation.removal import TokenSet, planned_passes, random_others, removal_effects
from sinklens.evaluation.visual_depth import exit_depths, horizon_information, windows
from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from sinklens.inputs.spec import Prompt, Visual
from sinklens.models.opening import open_model
from sinklens.testbeds.vision import Scenes, vision_recipes
from sinklens.testbeds.vision_prompts import cell_positions, scene_prompts
from sinklens.testbeds.vision_train import held_out_scenes
from sinklens.tracers.batch import collate, forward
from sinklens.tracers.visual_interventions import VisualExit

RECIPE = vision_recipes["vlm-shapes"]


@pytest.fixture(scope="module")
def model() -> Any:
    return open_model("bundled:vlm-shapes", dtype="float32")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return held_out_scenes(RECIPE, 24)


@pytest.fixture(scope="module")
def prompts(scenes: Scenes) -> tuple[Prompt, ...]:
    return scene_prompts(RECIPE.task, scenes)


def test_prompts_say_what_every_token_is(prompts: tuple[Prompt, ...], scenes: Scenes) -> None:
    prompt = prompts[0]
    assert prompt.visual is not None
    spans = prompt.visual.spans
    assert prompt.pieces[0] == "<s>"
    assert "".join(np.array(prompt.pieces)[spans.visual]) == "<image>" * 25
    answer = [piece for piece, kind in zip(prompt.pieces, spans.kinds, strict=True) if kind == Kind.GENERATED]
    assert answer == RECIPE.task.caption(scenes, 0)
    assert answer_positions(prompt).tolist() == list(range(len(prompt) - len(answer), len(prompt)))
    plain = scene_prompts(RECIPE.task, scenes, answered=False)[0]
    assert plain.pieces[-3:] == ("how", "many", "?")
    assert answer_positions(plain).tolist() == [26, 27, 28]
    cell = int(scenes.cells[0, 0])
    assert spans.cell_of(1 + cell) is not None
    assert 1 + cell in cell_positions(RECIPE.task, scenes, 0, objects=True)


def test_answers_are_read_off_the_logits(model: Any, prompts: tuple[Prompt, ...]) -> None:
    prompt = prompts[3]
    logits = forward(model.module, collate([prompt])).logits[0].double()
    places = answer_positions(prompt)
    ids = torch.tensor(prompt.token_ids)[torch.from_numpy(places)]
    rows = logits[places - 1].log_softmax(-1)
    found = Answers(model, prompt).under()
    assert found.loss == pytest.approx(-float(rows[torch.arange(len(ids)), ids].mean()), rel=1e-5)
    assert found.probability == pytest.approx(float(rows[torch.arange(len(ids)), ids].exp().mean()), rel=1e-5)
    assert found.right == 1.0
    changed = Answers(model, prompt).under(VisualExit(0))
    with VisualExit(0).applied(model, collate([prompt])):
        other = forward(model.module, collate([prompt])).logits[0].double()[places - 1].log_softmax(-1)
    assert changed.kl_from(found) == pytest.approx(
        float((rows.exp() * (rows - other)).sum(-1).mean()), rel=1e-4
    )
    assert not changed.agrees_with(found)


def test_objects_are_needed_and_background_is_not(
    model: Any, prompts: tuple[Prompt, ...], scenes: Scenes
) -> None:
    """The positive control must hurt beyond its controls; random background against other background must not."""
    objects, empty = (
        {p.index: cell_positions(RECIPE.task, scenes, i, objects=kind) for i, p in enumerate(prompts)}
        for kind in (True, False)
    )
    rng = np.random.default_rng(1)
    some = {at: rng.choice(places, 3, replace=False).tolist() for at, places in empty.items()}
    sets = [TokenSet("objects", "objects", objects), TokenSet("background", "background", some, among=empty)]
    seen = []
    found = removal_effects(
        model, prompts, sets, draws=2, progress=lambda done, total: seen.append((done, total))
    )
    first, second = found["sets"]
    assert found["base"]["right"]["mean"] > 0.98
    assert first["difference_loss"]["low"] > 1.0
    assert first["difference_right"]["high"] < -0.2
    assert abs(second["difference_loss"]["mean"]) < 0.01
    assert second["difference_loss"]["low"] <= 0 <= second["difference_loss"]["high"]
    assert second["removed"] == 3.0
    assert found["answered"] == 24
    assert seen[-1] == (24, 24)
    assert planned_passes(prompts, sets, 2) == 24 + 2 * 3 * 24


def test_a_removed_token_is_removed_and_pairs_are_pairs(model: Any, prompts: tuple[Prompt, ...]) -> None:
    """Everything by hand for one set in two prompts: the difference is taken within a prompt."""
    positions = {prompts[0].index: [4, 9], prompts[1].index: [7]}
    found = removal_effects(model, prompts[:3], [TokenSet("x", "x", positions)], draws=2, seed=5)["sets"][0]
    assert found["n_prompts"] == 2
    assert found["prompts"] == [0, 1]
    differences = []
    for prompt in prompts[:2]:
        answers = Answers(model, prompt)
        usual = answers.under().loss

        def loss(places: Any, prompt: Prompt = prompt, answers: Any = answers, usual: float = usual) -> float:
            from sinklens.tracers.chosen import Chosen
            from sinklens.tracers.visual_interventions import TokensRemoved

            return answers.under(TokensRemoved(Chosen.at({prompt.index: places}))).loss - usual

        mine = positions[prompt.index]
        drawn = list(random_others(prompt, mine, None, 2, 5))
        assert all(len(places) == len(mine) and not set(places) & set(mine) for places in drawn)
        differences.append(loss(mine) - np.mean([loss(places) for places in drawn]))
    assert found["difference_loss"]["mean"] == pytest.approx(np.mean(differences), rel=1e-6)


def test_controls_come_from_the_same_picture_in_equal_number() -> None:
    kinds = np.array([Kind.SYSTEM, *[Kind.VISUAL] * 9, Kind.QUESTION])
    grids = (PatchGrid(0, "whole", np.arange(1, 7).reshape(2, 3), (0, 0, 1, 1)),
             PatchGrid(1, "whole", np.arange(7, 10).reshape(1, 3), (0, 0, 1, 1)))  # fmt: skip
    pictures = (Picture("a", 1, 1, "a"), Picture("b", 1, 1, "b"))
    spans = ModalitySpans(kinds, pictures, grids)
    prompt = Prompt(3, tuple(range(11)), tuple("x" * 11), "made", "", Visual(spans, {}))
    for places in random_others(prompt, [1, 2, 8], None, 5, 0):
        assert sum(at < 7 for at in places) == 2
        assert {int(at) for at in places if at >= 7} <= {7, 9}
    assert list(random_others(prompt, [7, 8], None, 5, 0)) == []
    assert list(random_others(prompt, [10], None, 5, 0)) == []  # no visual token
    assert windows(spans, 2) == [[1, 2, 4, 5], [3, 6], [7, 8], [9]]


def test_pictures_leave_layer_by_layer(model: Any, prompts: tuple[Prompt, ...]) -> None:
    found = exit_depths(model, prompts[:2])["prompts"]
    for prompt, one in zip(prompts, found, strict=False):
        answers = Answers(model, prompt)
        usual = answers.under()
        each = [answers.under(VisualExit(layer)) for layer in range(4)]
        assert one["kl"] == pytest.approx([e.kl_from(usual) for e in each])
        assert one["loss_ratio"] == pytest.approx([e.loss / usual.loss for e in each])
        assert one["kl"][0] > 1


def test_a_window_with_everything_has_all_the_information(model: Any, prompts: tuple[Prompt, ...]) -> None:
    whole = horizon_information(model, prompts[:1], side=5, every=3)
    one = whole["prompts"][0]
    assert whole["layers"] == [0, 3]
    assert np.array(one["information"]).shape == (2, 1)
    for row, without in zip(one["information"], one["without"], strict=True):
        assert row[0] + without == pytest.approx(one["full"], abs=1e-6)
