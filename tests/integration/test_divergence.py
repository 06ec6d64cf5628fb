"""KL to the unchanged model is what its definition says: which positions, which direction, which mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens.evaluation.items import Item
from sinklens.evaluation.running import Question
from sinklens.evaluation.tasks import Perplexity, read_task
from sinklens.inputs.spec import Prompt
from sinklens.mitigations import ZeroTuning
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel
from sinklens.pipeline import divergence
from sinklens.pipeline.divergence import kl_to_unchanged, of_prompt
from tests.pictures import picture_prompt


@pytest.fixture(scope="module")
def opened() -> OpenedModel:
    return open_model("bundled:dense-ind", dtype="float32")


def by_hand(opened: OpenedModel, method: Any, question: Question, places: list[int]) -> list[float]:
    ids = torch.tensor([question.context])

    def logs() -> Tensor:
        with torch.no_grad():
            return opened.module(input_ids=ids).logits[0].double().log_softmax(-1)

    before = logs()
    with method(opened):
        after = logs()
    return [float((before[p].exp() * (before[p] - after[p])).sum()) for p in places]


def test_the_mean_is_over_positions_and_the_unchanged_model_comes_first(
    opened: OpenedModel, monkeypatch: Any
) -> None:
    method = ZeroTuning(gamma=6.0)
    questions = [
        Question(tuple(range(3, 23)), evaluated=4),
        Question(tuple(range(7, 60))),
        Question(tuple(range(40, 49)), evaluated=0),
    ]
    places = [list(range(4, 20)), [52], list(range(9))]
    each = [v for q, p in zip(questions, places, strict=True) for v in by_hand(opened, method, q, p)]
    found = kl_to_unchanged(opened, method, questions)
    assert found.positions == 16 + 1 + 9
    assert found.mean == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert found.mean > 1e-3
    # One question at a time is the same as all together.
    monkeypatch.setattr(divergence, "_HELD", 1)
    assert kl_to_unchanged(opened, method, questions).mean == pytest.approx(found.mean, rel=1e-6)
    assert math.isnan(kl_to_unchanged(opened, method, []).mean)


def test_a_task_says_which_predictions_it_evaluates(opened: OpenedModel) -> None:
    induction = read_task("induction", opened, n=6)
    assert [q.first_evaluated for q in induction.probes(opened, induction.items)] == [
        len(item.prompt) - 1 for item in induction.items
    ]
    text = tuple(3 + i % 50 for i in range(100))
    task = Perplexity(name="p", items=(Item("a", text),), window=40, stride=20)
    windows = task.probes(opened, task.items)
    counted = sum(len(q.context) - q.first_evaluated for q in windows)
    assert counted == task.ask(opened, task.items).columns["tokens"][0] == 99
    assert all(
        q.context == text[s : s + len(q.context)] for s, q in zip((0, 20, 40, 60), windows, strict=True)
    )


def test_of_prompts_with_pictures_the_text_behind_them_counts() -> None:
    prompt = picture_prompt("llava")
    assert prompt.visual is not None
    last = max(i for i, visual in enumerate(prompt.visual.spans.visual) if visual)
    assert of_prompt(prompt).first_evaluated == last
    assert of_prompt(Prompt(0, (5, 6), ("a", "b"), "", "")).first_evaluated == 0


def test_a_run_tells_the_divergence_and_over_how_many_predictions() -> None:
    run = sl.mitigate("bundled:dense-ind", "knock-out", tasks="induction", n=4, n_items=70)
    effect = run.document["mitigations"][0]["effect"]
    assert effect["kl_positions"] == 64
    assert 0 < effect["kl_mean"] < 1
    row = run.document["evaluation"][0]
    assert row["effect"] == {key: effect[key] for key in ("rows_edited", "kl_mean", "kl_positions")}
    assert "nats" in run.evaluation.to_frame().attrs["units"]["kl_mean"]
