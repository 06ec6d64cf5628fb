"""A profile of pictures with its experiments: what was removed, by whom it was named, and what is said of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sinklens as sl
from tests.vlms import build, processor


@pytest.fixture(scope="module")
def run() -> Any:
    names = ("visual-tokens", "visual-effects", "visual-exit", "information-horizon", "embed-lens")
    return sl.profile("bundled:vlm-shapes", n=10, analyzers=names, verify=True)


def test_found_tokens_are_taken_out_in_the_run(run: Any) -> None:
    experiments = run.trace.manifest["experiments"]
    assert {"visual_effects", "visual_exit", "visual_horizon"} <= experiments.keys()
    named = {item["name"]: item for item in experiments["visual_effects"]["sets"]}
    tokens = run.findings["visual-tokens"]
    dead = [row for row in tokens.rows if row["cls"] == "dead"]
    assert dead
    assert named["dead-tokens"]["source"] == "visual-tokens"
    assert set(named["dead-tokens"]["prompts"]) <= {row["prompt"] for row in dead}
    effects = run.findings["visual-effects"]
    assert {row["name"] for row in effects.rows} <= set(named)
    assert run.findings["visual-exit"].summary["layers"] == 4
    assert run.findings["information-horizon"].summary["n_windows"] == 9


def test_words_of_the_vocabulary_are_named(run: Any) -> None:
    assert run.trace.manifest["words"]
    for row in run.findings["embed-lens"].rows:
        assert not row["token"].startswith("<7"), row
    assert run.findings["visual-tokens"].rows[0]["nearest"] in run.trace.manifest["words"].values()


def test_the_run_comes_back_from_its_folder_and_has_a_report(run: Any, tmp_path: Any) -> None:
    folder = run.save(tmp_path / "run")
    again = sl.load(folder)
    assert isinstance(again, sl.Run)
    assert again.findings["visual-effects"].rows == run.findings["visual-effects"].rows
    assert again.findings["visual-tokens"].rows == run.findings["visual-tokens"].rows
    changed = again.analyze("visual-tokens:first_cosine=0.0").findings["visual-tokens"]
    assert changed.summary["share_sink"] >= run.findings["visual-tokens"].summary["share_sink"]
    assert (folder / "report.html").stat().st_size > 10_000


def test_experiments_can_be_switched_off() -> None:
    run = sl.profile("bundled:vlm-shapes", n=9, analyzers=("visual-tokens", "visual-effects"), verify=False)
    assert "--no-verify" in (run.findings["visual-effects"].reason or "")


@pytest.mark.parametrize(("family", "seen"), [("paligemma", True), ("llava", False)])
def test_nothing_is_said_of_answers_that_the_model_sees_before_it_gives_them(family: str, seen: bool) -> None:
    """PaliGemma reads the whole prompt as a prefix."""
    made, built = processor(family), build(family)
    rng = np.random.default_rng(0)
    text = {"text": "how many ? two red", "question": "how many ?", "answer": "two red"}
    rows = [{"image": rng.integers(0, 255, (64, 80, 3), dtype=np.uint8), **text} for _ in range(2)]
    names = ("visual-exit", "information-horizon")
    run = sl.profile(built, prompts=rows, processor=made, analyzers=names, verify=True)
    for name in names:
        assert ("reads its text both ways" in (run.findings[name].reason or "")) == seen
