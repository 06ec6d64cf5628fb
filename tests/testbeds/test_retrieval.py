"""Tasks that a planted sink stands in the way of: the truth is exact, and only the right mitigation helps."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sinklens.core.errors import UsageError
from sinklens.mitigations import ACT, KnockOut, Method, ZeroTuning, registry
from sinklens.models.opening import open_model
from sinklens.testbeds.planting.probe import eager
from sinklens.testbeds.planting.retrieve import RetrievalTruth, plant_retrieval
from sinklens.testbeds.retrieval import RetrievalTask

TASK = RetrievalTask()
SEEDS = (0, 1, 2, 3, 4)


def right(model: Any, seed: int, method: Method | None = None) -> tuple[np.ndarray, bool]:
    """Whether each of 96 questions is answered rightly, and whether the method acted."""
    ids, values = TASK.sample(96, np.random.default_rng(seed + 100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad(), nullcontext() if method is None else method(model) as effect:
            answers = model(torch.from_numpy(ids), use_cache=False).logits[:, -1].argmax(-1)
    expected = [TASK.answer_id(int(value)) for value in values]
    return answers.numpy() == expected, effect is not None and effect.acted


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sink", ["first", "inner"])
def test_the_right_mitigation_wins_and_the_wrong_ones_do_not(sink: Any, seed: int) -> None:
    model, truth = plant_retrieval(sink, seed=seed)
    plain, _ = right(model, seed)
    assert plain.mean() < 0.4
    remedy = registry[truth.remedy](**truth.remedy_parameters)
    freed, acted = right(model, seed, remedy)
    assert acted
    assert freed.all()
    for gamma in (0.05, 0.25):
        tuned, acted = right(model, seed, ZeroTuning(gamma=gamma))
        assert acted
        assert tuned.all() if sink == "first" else (tuned == plain).all()
    for wrong in (ZeroTuning(gamma=4.0), ZeroTuning(gamma=0.25, heads=[(truth.layer, (truth.head + 1) % 4)])):
        tuned, acted = right(model, seed, wrong)
        assert acted
        assert (tuned == plain).all()
    moved, acted = right(model, seed, ACT())
    assert acted == (sink == "inner")
    assert moved.all() if sink == "inner" else (moved == plain).all()


@pytest.mark.parametrize("sink", ["first", "inner"])
def test_attention_is_as_the_truth_says(sink: Any) -> None:
    model: Any
    model, truth = plant_retrieval(sink, seed=3, noise=0.0)
    ids, values = TASK.sample(32, np.random.default_rng(1))
    with torch.no_grad(), eager(model):
        maps = model(torch.from_numpy(ids), output_attentions=True, use_cache=False).attentions
    last = maps[truth.layer][:, truth.head, -1].double().numpy()
    keys = ids[:, -1] - TASK.asking_id(0)
    asked = [
        list(row).index(TASK.pair_id(int(k), int(v))) for row, k, v in zip(ids, keys, values, strict=True)
    ]
    place = 0 if sink == "first" else [list(row).index(TASK.id_of("|")) for row in ids]
    expected = truth.share(TASK.length - 2)
    np.testing.assert_allclose(last[np.arange(32), asked], expected, rtol=1e-3)
    np.testing.assert_allclose(
        last[np.arange(32), place], np.exp(truth.strength - truth.match) * expected, rtol=1e-3
    )
    uniform = maps[truth.layer][:, (truth.head + 1) % 4, -1]
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / TASK.length))


def test_the_answer_changes_where_the_truth_says() -> None:
    """Gammas on both sides of the one at which the share passes the threshold."""
    model, truth = plant_retrieval("first", seed=2, noise=0.0)
    others = TASK.length - 2
    shares = {gamma: truth.share(others, gamma=gamma) for gamma in np.geomspace(0.3, 1, 30)}
    edge = min(gamma for gamma, share in shares.items() if share < truth.threshold)
    assert right(model, 2, ZeroTuning(gamma=float(edge * 0.93)))[0].all()
    assert right(model, 2, ZeroTuning(gamma=float(edge * 1.03)))[0].mean() < 0.4


def test_without_the_sink_every_question_is_answered() -> None:
    model, truth = plant_retrieval("first", seed=1)
    assert right(model, 1, KnockOut(layers=[truth.layer]))[0].all()


def test_texts_hold_what_is_asked() -> None:
    ids, values = TASK.sample(400, np.random.default_rng(0))
    assert ids.shape == (400, TASK.length)
    assert np.bincount(values).tolist() == [100] * 4
    for row, value in zip(ids, values, strict=True):
        key = int(row[-1]) - TASK.asking_id(0)
        assert TASK.pair_id(key, int(value)) in row
        assert sum(TASK.pair_id(key, v) in row for v in range(TASK.values)) == 1
        assert (row == TASK.id_of("|")).sum() == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sink": "last"}, "no planted sink 'last'"),
        ({"sink": "first", "noise": -1.0}, "noise of -1"),
        ({"sink": "first", "strength": 2.0}, "not in the way"),
    ],
)
def test_what_cannot_be_planted_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        plant_retrieval(**fields)


def typed(*args: str) -> Any:
    from sinklens.cli.testbed import app

    return CliRunner().invoke(app, args)


def test_it_is_planted_from_the_command_line(tmp_path: Any) -> None:
    folder = tmp_path / "bed"
    done = typed("plant", "retrieval-inner", "--seed", "4", "--out", str(folder), "--json")
    assert done.exit_code == 0, done.output
    truth = json.loads((folder / "truth.json").read_text())
    assert truth["remedy"] == "act"
    assert (
        RetrievalTruth(**{k: v for k, v in truth.items() if k != "kind"})
        == plant_retrieval("inner", seed=4)[1]
    )
    rows = [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]
    assert len(rows) == 256
    model = open_model(str(folder))
    tokenizer: Any = model.tokenizer
    ids = [tokenizer(row["prompt"]).input_ids for row in rows[:64]]
    assert all(row[0] == TASK.id_of("<s>") for row in ids)
    with torch.no_grad(), ACT()(model) as effect:
        last = model.module(torch.tensor(ids)).logits[:, -1].argmax(-1)
    words = [tokenizer.convert_ids_to_tokens(int(token)) for token in last]
    assert effect.acted
    assert words == [row["choices"][row["answer"]] for row in rows[:64]]
    assert "retrieval-first" in typed("list").output
