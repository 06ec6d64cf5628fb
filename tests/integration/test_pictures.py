"""Profiles of pictures from the command line and from Python, and what is refused."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sinklens as sl
from sinklens.cli.main import main
from sinklens.core.errors import DataError, InterruptedRun, ModelError, UsageError
from sinklens.inputs.spans import Kind
from sinklens.inputs.vision import load_pictures
from sinklens.models.catalog import Source
from sinklens.models.opening import open_model
from sinklens.models.processors import load_processor
from sinklens.pipeline.listener import Silent
from sinklens.pipeline.run import load_run
from sinklens.testbeds.vision import ShapesTask
from sinklens.tracers import signals as sig
from sinklens.tracers.batch import collate
from sinklens.tracers.check_pictures import painted_check
from tests.inputs.vision.painting import noise
from tests.vlms import VLMS, build, processor

LIGHT = ("massive-activations",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        Image.fromarray(noise(20, 20, i)).save(path / f"{i}.png")
    return path


def test_the_bundled_model_looks_at_its_own_pictures(tmp_path):
    run = sl.profile("bundled:vlm-shapes", n=3, analyzers=LIGHT, out=tmp_path / "run", verify=False)
    inputs = run.trace.manifest["inputs"]
    assert inputs["source"] == "pictures that came with the checkpoint"
    assert inputs["pictures"]["n"] == 3
    assert inputs["pictures"]["visual_tokens"] == 75
    assert len(set(inputs["pictures"]["sha256"])) == 3
    assert all(check.passed for check in run.checks)
    again = load_run(tmp_path / "run")
    for record in again.trace:
        assert record.spans.visual.sum() == ShapesTask().patches
        assert record.arrays["thumbnail_0"].shape == (20, 20, 3)


def test_object_shares_are_those_of_the_masks():
    model = open_model("bundled:vlm-shapes")
    from sinklens.models.processors import processor_of

    prompts = load_pictures(
        None, processor_of(model), model.module.config, prompts=model.default_prompts, n=5
    ).prompts
    for prompt in prompts:
        words = prompt.visual.answer.split()
        shares = prompt.visual.objects[prompt.visual.spans.grids[0].positions]
        expected = sorted(1.0 if shape == "square" else 0.5 for shape in words[2::2])
        assert sorted(shares[shares > 0].tolist()) == expected


@pytest.mark.parametrize("name", list(VLMS))
def test_every_class_in_memory_passes_its_self_check_with_both_towers(name):
    pictures = [noise(30, 50), [noise(70, 33), noise(40, 40)]]
    made = processor(name)
    run = sl.profile(build(name), images=pictures, question="how many ?", processor=made, analyzers=LIGHT)
    failed = [check for check in run.checks if not check.passed]
    assert not failed
    assert "a painted patch is found in its token" in {check.name for check in run.checks}
    assert [record.source for record in run.trace] == ["memory#0", "memory#1"]


def test_all_analyzers_run_on_pictures():
    run = sl.profile(
        build("qwen2_5_vl"),
        images=[noise(64, 64)],
        question="how many things are in the picture ?",
        processor=processor("qwen2_5_vl"),
        analyzers=("all",),
        sensitivity=True,
    )
    assert all(check.passed for check in run.checks)
    assert "these prompts have pictures" in str(run.sensitivity.reason)
    (record,) = run.trace
    assert record[sig.VISION_NORM].shape[1] > record.spans.visual.sum()


@pytest.mark.parametrize("name", list(VLMS))
def test_processors_are_loaded_from_checkpoints(name, tmp_path):
    """Without torchvision too, which only their parts for videos need."""
    made = processor(name)
    build(name).config.save_pretrained(tmp_path)
    for part in (made.image_processor, made.tokenizer):
        part.save_pretrained(tmp_path)
    plain = {key: value for key, value in vars(made).items() if isinstance(value, str | int)}
    names = inspect.signature(type(made).__init__).parameters
    settings = {key: value for key, value in plain.items() if key in names and key != "chat_template"}
    settings["processor_class"] = type(made).__name__
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    loaded = load_processor(Source("here", str(tmp_path), tmp_path), False)
    assert type(loaded).__name__ == type(made).__name__
    config = build(name).config
    given = [noise(30, 50)]
    first, second = (load_pictures(given, p, config, question="what ?").prompts[0] for p in (made, loaded))
    assert first.token_ids == second.token_ids
    for key, value in first.visual.inputs.items():
        assert value.equal(second.visual.inputs[key])


# --- the self-check of places


def test_a_grid_that_is_laid_out_wrongly_is_found_out():
    made, model = processor("llava"), build("llava")
    (prompt,) = load_pictures([noise(40, 40)], made, model.config, question="what ?").prompts
    opened = open_model(model)
    good = painted_check(opened, collate([prompt]))
    assert good.passed
    assert good.value == good.limit
    assert prompt.visual is not None
    (grid,) = prompt.visual.spans.grids
    wrong = replace(grid, positions=grid.positions.T.copy())
    spans = replace(prompt.visual.spans, grids=(wrong,))
    bad = painted_check(opened, collate([replace(prompt, visual=replace(prompt.visual, spans=spans))]))
    assert not bad.passed
    assert float(bad.value or 0) < float(bad.limit or 0)


def test_pictures_with_fewer_pixels_than_tokens_are_not_decided():
    made, model = processor("llava"), build("llava")
    (prompt,) = load_pictures([noise(1, 1)], made, model.config, question="what ?").prompts
    found = painted_check(open_model(model), collate([prompt]))
    assert found.passed
    assert found.value is None
    assert "not decided" in found.detail


# --- the command line


def test_images_and_question_on_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["profile", "-m", "bundled:vlm-shapes", "--images", str(folder), "--question", "how many ?"]
    assert main([*given, "--analyzers", "massive-activations", "--out", str(out), "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    inputs = document["manifest"]["inputs"]
    assert inputs["source"] == f"folder {folder.name}"
    assert str(folder) not in json.dumps(document["manifest"]["inputs"])
    run = load_run(out)
    assert [record.source for record in run.trace] == ["0.png", "1.png", "2.png"]
    kinds = run.trace.records[0].spans.kinds
    assert kinds.tolist() == [Kind.SYSTEM] + [Kind.VISUAL] * 25 + [Kind.QUESTION] * 3
    request = json.loads((out / "manifest.json").read_text())["request"]
    assert (request["images"], request["question"]) == (str(folder), "how many ?")


def test_a_dry_run_counts_visual_tokens(folder, capsys):
    given = ["profile", "-m", "bundled:vlm-shapes", "--images", str(folder), "--dry-run", "--json"]
    assert main(given) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["inputs"]["pictures"]["visual_tokens"] == 75
    assert plan["prediction"]["disk"] > 0
    text = ["profile", "-m", "bundled:vlm-shapes", "--prompts", "mixed", "-n", "3", "--dry-run", "--json"]
    assert main(text) == 0
    assert "pictures" not in json.loads(capsys.readouterr().out)["inputs"]


def test_an_interrupted_run_of_pictures_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    options = {"images": str(folder), "question": "how many ?", "analyzers": LIGHT, "verify": False}
    whole = sl.profile("bundled:vlm-shapes", out=tmp_path / "whole", **options)

    class Stop(Silent):
        def progress(self, done, total):
            if done == 1:
                raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        sl.profile("bundled:vlm-shapes", out=out, listener=Stop(), **options)
    resumed = sl.profile(resume=out)
    assert len(resumed.trace) == 3
    for one, other in zip(whole.trace, resumed.trace, strict=True):
        assert np.array_equal(one["residual_top"], other["residual_top"])
        assert one.spans.to_json() == other.spans.to_json()


# --- refusals


def test_what_is_refused(folder):
    with pytest.raises(ModelError, match="reads no pictures"):
        sl.profile("bundled:dense-ind", images=str(folder))
    with pytest.raises(UsageError, match="not both"):
        sl.profile("bundled:vlm-shapes", images=str(folder), prompts="mixed")
    with pytest.raises(UsageError, match="cannot be packed"):
        sl.profile("bundled:vlm-shapes", images=str(folder), pack=True, seq_len=64)
    with pytest.raises(ModelError, match="without a processor"):
        sl.profile(build("llava"), images=str(folder))
    with pytest.raises(DataError, match="reads prompts with pictures"):
        sl.profile("bundled:vlm-shapes", prompts="mixed", n=2, analyzers=("visual-sinks",))
    tokenizer = processor("llava").tokenizer
    with pytest.raises(ModelError, match="has no image_processor"):
        sl.profile(build("llava"), images=str(folder), processor=tokenizer)


def test_pictures_from_memory_are_named_and_cannot_be_resumed(tmp_path):
    out = tmp_path / "memory"
    run = sl.profile("bundled:vlm-shapes", images=[noise(20, 20)], analyzers=LIGHT, out=out, verify=False)
    assert run.trace.manifest["request"]["prompts_given"] == "1 picture from memory"
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    with pytest.raises(UsageError, match="from memory"):
        sl.profile(resume=out)


@pytest.mark.parametrize(
    ("said", "package"),
    [
        ("requires the Torchvision library but it was not found", "torchvision"),
        ("No module named 'PIL'", "pillow"),
    ],
)
def test_missing_packages_name_the_extra(monkeypatch, tmp_path, said, package):
    from transformers import AutoProcessor

    def fail(*args, **kwargs):
        raise ImportError(said)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    processor("llava").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"needs {package}") as caught:
        load_processor(Source("here", str(tmp_path), tmp_path), False)
    assert "sinklens[vision]" in str(caught.value)


def test_text_alone_stays_as_it_was():
    run = sl.profile("bundled:vlm-shapes", prompts="mixed", n=2, analyzers=LIGHT, seq_len=64, verify=False)
    assert all(record.spans is None for record in run.trace)
    assert not any("vision" in name for record in run.trace for name in record.arrays)
