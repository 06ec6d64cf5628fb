"""Tasks against plain forward passes, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.evaluation.items import Item
from sinklens.evaluation.running import Question, likelihoods, written
from sinklens.evaluation.tasks import (
    Captions,
    Choice,
    Classification,
    Generation,
    Perplexity,
    YesNo,
    read_task,
    task_from_file,
    task_from_rows,
    tasks_for,
)
from sinklens.evaluation.tasks.choice import continued
from sinklens.evaluation.tasks.classification import label_in
from sinklens.evaluation.tasks.perplexity import text_windows
from sinklens.mitigations import ACT, ZeroTuning
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel

from ..families import build


@pytest.fixture(scope="module")
def dense() -> OpenedModel:
    return open_model("bundled:dense-ind", dtype="float32")


def random_ids(count: int, length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed + 100 * count).integers(3, 290, length).tolist())


def logs_of(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])
def test_likelihoods_are_those_of_whole_sequences(family: str) -> None:
    """Left padding, several continuations of several lengths, and the cache: all as one plain pass each."""
    opened = open_model(build(family))
    questions = [
        Question(random_ids(i, 5 + 3 * i), tuple(random_ids(i, k, seed=k) for k in (1, 3, 2)[: 1 + i % 3]))
        for i in range(5)
    ]
    for question, found in zip(questions, likelihoods(opened, questions), strict=True):
        for continuation, total in zip(question.continuations, found.sums, strict=True):
            whole = (*question.context, *continuation)
            logs = logs_of(opened.module, whole)
            at = range(len(question.context) - 1, len(whole) - 1)
            assert total == pytest.approx(sum(float(logs[p, whole[p + 1]]) for p in at), abs=2e-4)
        last = logs_of(opened.module, question.context)[-1]
        assert found.entropy == pytest.approx(-float((last.exp() * last).sum()), abs=1e-4)


def test_a_mitigation_sees_the_prompt_and_not_the_answers() -> None:
    """ACT's rule counts the prompt's tokens, so continuations must not be among them when its sinks are found."""
    opened = open_model(build("llama"))
    act = ACT(alpha=1.2, layers=range(4))
    context, answer = random_ids(1, 20), random_ids(2, 3)
    with act(opened) as effect:
        (found,) = likelihoods(opened, [Question(context, (answer, answer[:1]))])
        with torch.no_grad():
            output = opened.module(input_ids=torch.tensor([context]), use_cache=True)
            expected = torch.log_softmax(output.logits[0, -1].double(), -1)[answer[0]]
            assert found.sums[1] == pytest.approx(float(expected), abs=1e-4)
            later = opened.module(
                input_ids=torch.tensor([answer[:-1]]), past_key_values=output.past_key_values, use_cache=True
            )
            logs = torch.log_softmax(later.logits[0].double(), -1)
            expected = expected + logs[0, answer[1]] + logs[1, answer[2]]
    assert effect.acted
    assert found.sums[0] == pytest.approx(float(expected), abs=2e-4)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(7, 20, 10), (50, 16, 16), (50, 16, 5), (51, 17, 8)]
)
@pytest.mark.parametrize("prefix", [(), (1,), (1, 2)])
def test_windows_count_every_token_once(
    length: int, window: int, stride: int, prefix: tuple[int, ...]
) -> None:
    body = tuple(range(10, 10 + length))
    counted: list[int] = []
    for ids, first in text_windows(body, prefix, window, stride):
        assert len(ids) <= window
        assert ids[: len(prefix)] == prefix
        assert first >= 1
        counted += ids[first:]
    missing = set(body) - set(counted)
    assert len(counted) == len(set(counted))
    # Without a BOS a token at the beginning of a window that has no overlap has no context at all.
    starts = {body[0]} if not prefix else set()
    if not prefix and stride >= window:
        starts = set(body[::window])
    assert missing == starts


def test_perplexity_is_weighted_by_tokens_and_slides() -> None:
    opened = open_model(build("llama"))
    items = [Item(str(i), random_ids(i, n)) for i, n in enumerate((9, 30, 2))]
    task = Perplexity(name="p", items=tuple(items), window=12, stride=5)
    found = task.ask(opened, items)
    nats, tokens = 0.0, 0
    for item in items:
        ids = item.prompt
        assert isinstance(ids, tuple)
        end = 1
        for start in range(0, len(ids), 5):
            part = ids[start : start + 12]
            logs = logs_of(opened.module, part)
            for place in range(max(end - start, 1), len(part)):
                nats -= float(logs[place - 1, part[place]])
                tokens += 1
            end = start + len(part)
            if end >= len(ids):
                break
    assert tokens == sum(len(item.prompt) - 1 for item in items)
    assert task.primary.value(found.columns) == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found.tokens == task.tokens(opened, items)


def test_choices_share_the_context_that_all_of_them_have() -> None:
    asked = Question((1, 5, 6))
    item = Item("q", "x", ("a", "b"), 0)
    # The second answer was read with another token across the seam.
    found = continued(asked, [(1, 5, 6, 7), (1, 5, 8, 9)], item)
    assert found.context == (1, 5)
    assert found.continuations == ((6, 7), (8, 9))
    with pytest.raises(DataError, match="same tokens"):
        continued(asked, [(1, 5, 6, 7), (1, 5, 6, 7)], item)
    with pytest.raises(DataError, match="no token of its own"):
        continued(asked, [(1, 5, 6), (1, 5, 6, 7)], item)


def test_sums_and_means_choose_differently(dense: OpenedModel) -> None:
    rows = [
        {"prompt": "Anna river again", "choices": ["tide", "tide moss bread"], "answer": 0},
        {"prompt": "Anna tide again", "choices": ["Anna", "tide moss"], "answer": "tide moss"},
    ]
    rows = [{**row, "prompt": row["prompt"].replace("river", "tide")} for row in rows]
    task = task_from_rows(rows, name="c")
    assert isinstance(task, Choice)
    questions = task.questions(dense, task.items)
    assert [len(c) for c in questions[0].continuations] == [1, 3]
    found = task.ask(dense, task.items)
    sums = likelihoods(dense, questions)
    for i, answer in enumerate(sums):
        best = int(np.argmax(answer.sums))
        mean = int(np.argmax(answer.sums / [len(c) for c in questions[i].continuations]))
        assert found.columns["right"][i] == (best == task.items[i].answer)
        assert found.columns["right_per_token"][i] == (mean == task.items[i].answer)


def test_a_written_answer_is_parsed_or_is_unreadable() -> None:
    labels = ("positive", "negative", "very positive")
    assert label_in("I think: Positive.", labels) == 0
    assert label_in("very positive indeed", labels) == 2
    assert label_in("negative, not positive", labels) == 1
    assert label_in("positively yes", labels) is None
    assert label_in("", labels) is None


def test_unreadable_answers_are_a_class_of_their_own(dense: OpenedModel, monkeypatch: Any) -> None:
    rows = [{"prompt": "Anna", "label": label} for label in ("tide", "moss", "tide", "moss")]
    task = task_from_rows(rows, name="cls", by="generation")
    assert isinstance(task, Classification)
    said = iter(["tide", "tide", "nothing", "the moss"])
    monkeypatch.setattr("sinklens.evaluation.tasks.classification.Reader.text", lambda self, ids: next(said))
    found = task.ask(dense, task.items)
    values = {metric.name: metric.value(found.columns) for metric in task.metrics}
    assert values["accuracy"] == 0.5
    assert values["valid_rate"] == 0.75
    assert values["accuracy_among_valid"] == pytest.approx(2 / 3)


def test_writing_stops_at_the_end_token_and_equals_greedy_decoding(dense: OpenedModel) -> None:
    context = (64, 3, 40, 62)
    (found,) = written(dense, [Question(context)], max_new_tokens=4)
    ids: list[int] = list(context)
    entropies: list[float] = []
    for _ in range(4):
        logs = logs_of(dense.module, tuple(ids))[-1]
        entropies.append(-float((logs.exp() * logs).sum()))
        ids.append(int(logs.argmax()))
    assert found.token_ids == tuple(ids[4:])
    assert found.entropy == pytest.approx(np.mean(entropies), abs=1e-4)


def test_yes_no_figures(monkeypatch: Any, dense: OpenedModel) -> None:
    rows = [{"prompt": "Anna", "answer": a} for a in ("yes", "yes", "no", "no", "yes")]
    task = task_from_rows(rows, name="y", by="generation")
    assert isinstance(task, YesNo)
    said = iter(["Yes.", "no", "yes it is", "No", "hm"])
    monkeypatch.setattr("sinklens.evaluation.tasks.yes_no.Reader.text", lambda self, ids: next(said))
    found = task.ask(dense, task.items)
    values = {metric.name: metric.value(found.columns) for metric in task.metrics}
    # One hit, one false alarm, two misses (one of them unreadable), one right no.
    assert values["accuracy"] == pytest.approx(2 / 5)
    assert values["f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))
    assert values["yes_ratio"] == pytest.approx(2 / 5)
    assert values["valid_rate"] == pytest.approx(4 / 5)


def test_captions_figures(monkeypatch: Any, dense: OpenedModel) -> None:
    rows = [
        {"prompt": "Anna", "objects": ["dog", "hot dog"]},
        {"prompt": "Anna", "objects": ["cat"]},
    ]
    task = task_from_rows(rows, name="c", synonyms={"puppy": "dog", "kitten": "cat"})
    assert isinstance(task, Captions)
    said = iter(["Two dogs and a puppy with a hot dog", "a dog beside a dog, no pet"])
    monkeypatch.setattr("sinklens.evaluation.tasks.captions.Reader.text", lambda self, ids: next(said))
    found = task.ask(dense, task.items)
    values = {metric.name: metric.value(found.columns) for metric in task.metrics}
    assert values["chair_i"] == pytest.approx(2 / 5)
    assert values["chair_s"] == pytest.approx(1 / 2)
    assert values["coverage"] == pytest.approx(2 / 3)


def test_free_answers_are_scored_by_a_function(dense: OpenedModel) -> None:
    items = [Item("a", "Anna tide again"), Item("b", "Ben moss again")]
    task = Generation(
        name="g", items=tuple(items), scorer=lambda text, item: len(text.split()), max_new_tokens=3
    )
    assert task.primary.value(task.ask(dense, items).columns) == 3.0
    broken = Generation(name="g", items=tuple(items), scorer=lambda text, item: "good")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="scorer returned no number"):
        broken.ask(dense, items)


def test_kinds_follow_from_fields(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for row, kind in [
        ({"text": "a b"}, "perplexity"),
        ({"question": "q", "choices": ["a", "b"], "answer": "B"}, "choice"),
        ({"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, "choice"),
        ({"prompt": "q", "reference": "r"}, "generation"),
    ]:
        path.write_text(json.dumps(row) + "\n")
        task = task_from_file(path)
        assert task.kind == kind
        if kind == "choice":
            assert task.items[0].answer == 1
    path.write_text('{"task": {"kind": "perplexity", "window": 32}}\n{"text": "a b"}\n')
    task = task_from_file(path)
    assert isinstance(task, Perplexity)
    assert task.window == 32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "label": "x"}\n{"prompt": "b", "label": "x"}\n', "every item has the label 'x'"),
        ('{"prompt": "a", "answer": "yes"}\n', "every item has the label 'yes'"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": 7}\n', "none of the 2 choices"),
        ('{"prompt": "a", "choices": ["x"], "answer": 0}\n', "two choices"),
        ('{"foo": 1}\n', "no kind of task"),
        ("not json\n", "not valid JSON"),
        ("[1]\n", "not a JSON object"),
        ('{"task": {}}\n', "no question"),
        ('{"task": {"windo": 3}}\n{"text": "a"}\n', "no setting 'windo'"),
        ('{"prompt": "a", "objects": ["dog"]}\n', "with one object"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises((DataError, UsageError), match=said):
        task_from_file(path)


def test_names_of_tasks(dense: OpenedModel) -> None:
    assert tasks_for(dense) == ("induction", "perplexity")
    assert read_task("ppl", dense, n=5).name == "perplexity"
    with pytest.raises(UsageError, match="Did you mean 'induction'"):
        read_task("inductoin", dense)
    with pytest.raises(ModelError, match="made for bundled:vlm-shapes"):
        read_task("shapes-captions", dense)


def test_the_toys_do_what_they_were_trained_for(dense: OpenedModel) -> None:
    task = read_task("induction", dense, n=60)
    found = task.ask(dense, task.items)
    assert task.primary.value(found.columns) > 0.9
    with ZeroTuning(gamma=0.05)(dense):
        edited = task.ask(dense, task.items)
    assert not np.array_equal(edited.columns["log_probability"], found.columns["log_probability"])


def test_pictures_of_the_toy_world() -> None:
    opened = open_model("bundled:vlm-shapes")
    for name in ("shapes-captions", "shapes-yes-no"):
        task = read_task(name, opened, n=8)
        values = {m.name: m.value(task.ask(opened, task.items).columns) for m in task.metrics}
        assert values.get("coverage", values.get("accuracy", 0)) > 0.9
    assert len({item.digest for item in task.items}) == 8


def test_models_that_predict_nothing_are_refused() -> None:
    with pytest.raises(ModelError, match="predicts no next token"):
        likelihoods(open_model(build("bert")), [Question((1, 2))])


def test_pictures_from_files_are_read_by_the_models_processor(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from sinklens.models.catalog import bundled

    folder = bundled()["vlm-shapes"] / "samples"
    captions = json.loads((folder / "captions.json").read_text())
    rows = []
    for name, caption in captions.items():
        words = caption.split()[4:]
        objects = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
        rows.append({"image": str(folder / name), "prompt": "how many ?", "objects": objects})
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_model("bundled:vlm-shapes")
    task = task_from_file(path)
    assert isinstance(task, Captions)
    values = {m.name: m.value(task.ask(opened, task.items).columns) for m in task.metrics}
    assert values["coverage"] == 1.0
    assert values["chair_i"] == 0.0
