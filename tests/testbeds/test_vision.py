"""The testbed with pictures: data as they are said to be, training that repeats, a model that reads new pictures."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from sinklens.core.errors import UsageError
from sinklens.models.catalog import default_model, list_models
from sinklens.models.opening import open_model
from sinklens.testbeds import api
from sinklens.testbeds.vision import COLOURS, IGNORED, NUMBERS, SHAPES, Answer, ShapesTask, vision_recipes
from sinklens.testbeds.vision_measure import answers_right, measure, read_pictures
from sinklens.testbeds.vision_train import build_vision_model, caption_text, held_out_scenes, train_vision

NAME = "vlm-shapes"
RECIPE = vision_recipes[NAME]
SHORT = replace(RECIPE, name="short-vision", steps=5, batch=3, warmup=2, cooldown=2)
FOLDER = api.BUNDLED / NAME


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.fixture(scope="module")
def bundled() -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(FOLDER).float().eval()


# --- data


@pytest.mark.parametrize("task", [ShapesTask(), ShapesTask(grid=3, cell=6, most=2, noise=0.2)])
def test_a_reader_of_the_pixels_alone_finds_the_caption(task: ShapesTask) -> None:
    scenes = task.sample(61, np.random.default_rng(11))
    masks = {mask.tobytes(): shape for mask, shape in zip(task.masks(), SHAPES, strict=True)}
    names = {rgb: name for name, rgb in COLOURS.items()}
    for picture, pixels in enumerate(scenes.pixels):
        words: list[str] = []
        for cell in range(task.patches):
            y, x = (task.cell * part for part in divmod(cell, task.grid))
            lit = pixels[:, y : y + task.cell, x : x + task.cell] > 128
            if lit.any():
                words += [names[tuple(lit.any((1, 2)).astype(int).tolist())], masks[lit.any(0).tobytes()]]
        assert task.caption(scenes, picture) == [NUMBERS[len(words) // 2 - 1], *words, "</s>"]
        assert task.background(scenes)[picture].sum() == task.patches - len(words) // 2


def test_every_number_cell_colour_and_shape_occurs_about_equally() -> None:
    task = ShapesTask()
    scenes = task.sample(6000, np.random.default_rng(3))
    there = scenes.cells >= 0
    for values, options in (
        (scenes.counts - 1, task.most),
        (scenes.cells[there], task.patches),
        (scenes.colours[there], len(COLOURS)),
        (scenes.shapes[there], len(SHAPES)),
    ):
        found = np.bincount(values, minlength=options)
        assert len(found) == options
        assert np.abs(found / found.mean() - 1).max() < 0.2
    assert (scenes.colours[~there] == -1).all()
    for colours in scenes.colours:
        own = colours[colours >= 0].tolist()
        assert len(set(own)) == len(own)


def test_only_the_background_is_dark_and_no_pixel_is_negative() -> None:
    task = ShapesTask()
    scenes = task.sample(37, np.random.default_rng(5))
    pixels = task.encode(scenes).pixel_values
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).amax((1, 4, 5)).flatten(1)
    background = torch.from_numpy(task.background(scenes))
    assert pixels.min() >= 0
    assert patches[background].max() <= task.noise + 0.01
    assert patches[~background].min() >= task.brightness - 0.01


def test_only_answers_carry_loss_and_every_token_is_labelled_with_its_kind() -> None:
    task = ShapesTask()
    encoded = task.encode(task.sample(29, np.random.default_rng(7)))
    words = np.array(task.vocabulary)[encoded.input_ids.numpy()]
    expected = {
        **dict.fromkeys(NUMBERS, Answer.COUNT),
        **dict.fromkeys(COLOURS, Answer.COLOUR),
        **dict.fromkeys(SHAPES, Answer.SHAPE),
        "</s>": Answer.END,
    }
    kinds = [[expected.get(word, Answer.NONE) for word in row] for row in words]
    assert encoded.answers.tolist() == kinds
    is_answer = encoded.answers != Answer.NONE
    assert torch.equal(encoded.labels[is_answer], encoded.input_ids[is_answer])
    assert (encoded.labels[~is_answer] == IGNORED).all()
    assert (words[:, task.image_slice] == "<image>").all()
    assert (words == "<image>").sum() == 29 * task.patches


# --- training


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not() -> None:
    state = torch.get_rng_state()
    first, again, other = (weights(train_vision(SHORT, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_moves_both_towers_and_the_projector_and_lowers_the_loss() -> None:
    losses: list[float] = []
    recipe = replace(SHORT, steps=40, batch=16)
    before = dict(build_vision_model(recipe).named_parameters())
    after = dict(train_vision(recipe, on_step=lambda _, loss: losses.append(loss)).named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # LLaVA reads the states before CLIP's last norm.
    assert {name for name in set(before) - moved if "post_layernorm" not in name} == set()
    assert sum(losses[-5:]) < sum(losses[:5]) - 2


def test_held_out_pictures_are_not_training_pictures() -> None:
    drawn = RECIPE.task.sample(2048, np.random.default_rng(RECIPE.seed + 1)).pixels
    training = {pixels.tobytes() for pixels in drawn}
    assert not training & {pixels.tobytes() for pixels in held_out_scenes(RECIPE, 64).pixels}


def test_train_testbed_saves_what_opens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vision_recipes._items, "short-vision", SHORT)
    reported: list[tuple[int, int]] = []
    api.train_testbed(
        "short-vision", tmp_path, seed=3, steps=[2], on_step=lambda i, n, _: reported.append((i, n))
    )
    assert reported == [(step, 5) for step in range(1, 6)]
    expected = weights(train_vision(SHORT, seed=3))
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert opened.dtype == torch.bfloat16
    torch.testing.assert_close(weights(opened).float(), expected, rtol=1e-2, atol=1e-6)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "step-2")
    AutoProcessor.from_pretrained(tmp_path / "step-2")
    card = (tmp_path / "card.md").read_text()
    assert "seed 3" in card
    assert "5 steps of 3 new pictures" in card


def test_names_are_suggested_and_pillow_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="Did you mean 'vlm-shapes'"):
        api.train_testbed("vlm-shape", tmp_path)
    with pytest.raises(UsageError, match="has no step 999999"):
        api.train_testbed(NAME, tmp_path, steps=[999999])
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match="needs Pillow"):
        api.train_testbed(NAME, tmp_path)
    assert not list(tmp_path.iterdir())


# --- measuring


def test_hiding_a_token_is_hiding_it_and_readings_are_of_the_named_places() -> None:
    model = build_vision_model(RECIPE).eval()
    scenes = held_out_scenes(RECIPE, 7)
    reading = read_pictures(model, RECIPE, scenes)
    assert list(reading.states) == ["vision 0", "vision 1", "projector", *(f"text {i}" for i in range(4))]
    assert reading.states["projector"].shape == (7, 25, 64)
    assert reading.states["text 3"].shape == (7, reading.encoded.input_ids.shape[1], 64)
    torch.testing.assert_close(reading.attention.sum(-1), torch.ones_like(reading.attention[..., 0]))
    assert torch.equal(answers_right(model, reading.encoded), reading.right)
    assert model.config._attn_implementation != "eager"
    found = measure(model, RECIPE, pictures=7)
    for rows in found["removal"].values():
        assert [row["removed"] for row in rows] == [1, 2, 3, 5, 10]
    for row in found["removal"]["background, random"]:
        assert row["difference"] == 0


# --- the bundled checkpoint


def test_the_bundled_model_answers_held_out_pictures(bundled: PreTrainedModel) -> None:
    reading = read_pictures(bundled, RECIPE, held_out_scenes(RECIPE, 64))
    for kind in (Answer.COUNT, Answer.COLOUR, Answer.SHAPE):
        assert reading.right[reading.encoded.answers == kind].float().mean() >= 0.99, kind


def test_a_picture_file_goes_through_the_stored_processor(bundled: PreTrainedModel) -> None:
    model: Any = bundled
    processor: Any = AutoProcessor.from_pretrained(FOLDER)
    scenes = held_out_scenes(RECIPE, 64)
    captions: dict[str, str] = json.loads((FOLDER / "samples" / "captions.json").read_text())
    encoded = RECIPE.task.encode(scenes)
    assert len(captions) == 4
    for picture, (file, caption) in enumerate(captions.items()):
        image = Image.open(FOLDER / "samples" / file)
        batch = processor(images=image, text="<image> how many ?", return_tensors="pt")
        assert caption == caption_text(RECIPE, scenes, picture)
        assert torch.equal(batch["input_ids"][0], encoded.input_ids[picture, :29])
        torch.testing.assert_close(batch["pixel_values"][0], encoded.pixel_values[picture], rtol=0, atol=1e-6)
        ids = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, 29:]
        assert processor.decode(ids, skip_special_tokens=True) == caption.removeprefix("how many ? ")


def test_objects_matter_and_background_is_no_sink(bundled: PreTrainedModel) -> None:
    found = measure(bundled, RECIPE, pictures=64)
    for row in found["removal"]["objects first"]:
        assert row["difference"] < -5 * row["error"]
    assert found["removal"]["background, random"][0]["right"] > 0.98
    heads = [row for rows in found["heads"] for row in rows]
    assert max(row["background"] for row in heads) < 1.2 * found["area"]
    assert max(row["peak"] for row in heads) < 3.5
    assert max(row["bos"] for row in heads) < 0.3


def test_the_card_states_the_measured_numbers(bundled: PreTrainedModel) -> None:
    card = (FOLDER / "card.md").read_text()
    found = measure(bundled, RECIPE)
    for kind in ("count", "colour", "shape"):
        stated = re.search(rf"\| {kind} \| ([\d.]+) % \|", card)
        assert stated is not None
        assert float(stated[1]) == pytest.approx(100 * found["right"][kind], abs=0.5)
    stated = re.search(r"\| projector \| ([\d.]+) \| ([\d.]+) \|", card)
    assert stated is not None
    norms = found["stages"]["projector"]["norm"]
    assert float(stated[1]) == pytest.approx(norms["background"], abs=0.2)
    assert float(stated[2]) == pytest.approx(norms["object"], abs=0.2)
    assert f"{RECIPE.steps} steps of {RECIPE.batch} new pictures" in card


def test_the_checkpoint_is_small_listed_and_not_the_default() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    assert sum(path.stat().st_size for path in (FOLDER / "samples").iterdir()) < 100e3
    assert default_model() == "bundled:dense-ind"
    entry = next(entry for entry in list_models() if entry.name == f"bundled:{NAME}")
    assert entry.about == RECIPE.about
    assert {info.name: info.path for info in api.list_testbeds()}[NAME] == FOLDER


def test_it_opens_with_both_towers() -> None:
    opened = open_model(f"bundled:{NAME}", device="cpu")
    assert [tower.name for tower in opened.anatomy.towers] == ["text", "vision"]
    assert [len(tower.blocks) for tower in opened.anatomy.towers] == [4, 2]
    assert opened.tokenizer is not None
