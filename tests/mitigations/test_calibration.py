"""Searches on scorers whose best answer is known, recipes, and the command-line form of methods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.evaluation.splits import ReportSplit
from sinklens.evaluation.tasks import read_task
from sinklens.mitigations import (
    ACT,
    VAR,
    KnockOut,
    Method,
    ZeroTuning,
    chosen_methods,
    load,
)
from sinklens.mitigations.act_search import ActSearch
from sinklens.mitigations.asking import label_of
from sinklens.mitigations.calibration import GridSearch, Scored, Trials
from sinklens.mitigations.recipes import recipe_for
from sinklens.mitigations.var_search import VarSearch
from sinklens.mitigations.zero_tuning_search import ZeroTuningSearch
from sinklens.models.anatomy import find_anatomy
from sinklens.models.opening import open_model
from sinklens.pipeline.mitigate_options import MitigateOptions
from sinklens.pipeline.mitigate_setup import jobs
from sinklens.pipeline.scoring import calibrate

from ..families import HEADS, LAYERS, build

TOWER = find_anatomy(build("llama")).main


class Made:
    """A scorer that is a formula; counts how often it is asked."""

    items, tokens = 50, 1000

    def __init__(self, formula: Any, *, acted: bool = True) -> None:
        self.formula, self.calls, self.acted = formula, 0, acted

    def __call__(self, method: Method | None) -> Scored:
        self.calls += 1
        score, finer = self.formula(method)
        return Scored(score, finer, -score, self.acted)

    def surely_better(self, method: Method) -> bool:
        return self.formula(method)[0] > 0.5


UP = {(1, 0): 0.03, (1, 1): 0.05, (2, 3): 0.01, (3, 0): 0.02, (0, 2): 0.04}


def up_effective(method: Method | None) -> tuple[float, float]:
    """Heads in `UP` gain from more attention to the first token, head (3, 3) from less; gamma 3 is best."""
    if method is None:
        return 0.5, 0.0
    assert isinstance(method, ZeroTuning)
    heads: Any = method.heads or ()
    gain = sum(UP.get(head, 0.0) for head in heads) * (1 if method.gamma > 1 else -1)
    gain += sum(0.02 * (1 if method.gamma < 1 else -1) for head in heads if head == (3, 3))
    return 0.5 + gain * (1.0 if method.gamma != 3.0 else 1.5), 0.0


def test_zero_tuning_finds_the_heads_the_kind_and_gamma() -> None:
    scorer = Made(up_effective)
    search = ZeroTuningSearch()
    planned = search.passes(ZeroTuning(), TOWER)
    choice = search.run(ZeroTuning(), Trials(scorer, planned), TOWER)
    assert isinstance(choice.method, ZeroTuning)
    # The best two of five up-effective heads (40 %).
    assert choice.method.heads == ((0, 2), (1, 1))
    assert choice.method.gamma == 3.0
    assert choice.searched["kind"] == "up"
    assert planned == 1 + 2 * LAYERS * HEADS + 6
    assert scorer.calls <= planned


def test_the_entropy_takes_the_place_of_labels() -> None:
    choice = ZeroTuningSearch(objective="unsupervised").run(ZeroTuning(), Trials(Made(up_effective)), TOWER)
    assert isinstance(choice.method, ZeroTuning)
    assert choice.method.gamma == 3.0
    blind = Made(lambda method: (0.5, 0.0))
    blind.__class__ = type("NoEntropy", (Made,), {"__call__": lambda s, m: Scored(0.5, 0.0, float("nan"))})
    with pytest.raises(UsageError, match="no next-token entropy"):
        ZeroTuningSearch(objective="unsupervised").run(ZeroTuning(), Trials(blind), TOWER)


def test_shared_units_are_head_indices_of_all_layers() -> None:
    def formula(method: Any) -> tuple[float, float]:
        if method is None:
            return 0.5, 0.0
        good = 0.1 * (1 in method.shared_heads) - 0.05 * (2 in method.shared_heads)
        return 0.5 + good * (1 if method.gamma < 1 else -1), 0.0

    search = ZeroTuningSearch(units="shared")
    choice = search.run(ZeroTuning(), Trials(Made(formula)), TOWER)
    assert isinstance(choice.method, ZeroTuning)
    assert choice.method.shared_heads == (1,)
    assert choice.method.gamma < 1
    assert search.passes(ZeroTuning(), TOWER) == 1 + 2 * HEADS + 6


def test_equal_scores_are_decided_by_the_finer_one() -> None:
    def formula(method: Any) -> tuple[float, float]:
        good = 0.0 if method is None else sum(head == (2, 2) for head in method.heads) * (method.gamma - 1)
        return 1.0, good

    choice = ZeroTuningSearch().run(ZeroTuning(), Trials(Made(formula)), TOWER)
    assert isinstance(choice.method, ZeroTuning)
    assert choice.method.heads == ((2, 2),)
    assert choice.method.gamma == 6.0


def test_nothing_better_is_nothing_chosen() -> None:
    flat = Made(lambda method: (0.5, 0.0))
    assert ZeroTuningSearch().run(ZeroTuning(), Trials(flat), TOWER).method is None
    assert ActSearch().run(ACT(), Trials(flat), TOWER).method is None
    idle = Made(lambda method: (0.5 + (method is not None), 0.0), acted=False)
    found = ActSearch().run(ACT(), Trials(idle), TOWER)
    assert found.method is None
    assert "nothing to calibrate" in found.text


def test_act_keeps_the_heads_that_gain_alone() -> None:
    gains = {(2, 0): 0.1, (2, 1): -0.1, (2, 2): 0.0, (2, 3): 0.05}

    def formula(method: Any) -> tuple[float, float]:
        return (0.45, 0.0) if method is None else (0.45 + sum(gains[head] for head in method.heads), 0.0)

    kept = {
        keep: ActSearch(keep=keep).run(ACT(), Trials(Made(formula)), TOWER).method  # type: ignore[arg-type]
        for keep in ("better", "not-worse", "surely-better")
    }
    assert [getattr(m, "heads", None) for m in kept.values()] == [
        ((2, 0), (2, 3)),
        ((2, 0), (2, 2), (2, 3)),
        ((2, 0),),
    ]


def test_a_grid_is_searched_whole() -> None:
    scorer = Made(lambda m: (0.0, 0.0) if m is None else (1 - abs(m.gamma - 2) - abs(m.layers[0] - 1), 0.0))
    search = GridSearch({"gamma": (0.5, 2.0, 4.0), "layers": ((0,), (1,))})
    choice = search.run(ZeroTuning(), Trials(scorer), TOWER)
    assert choice.method == ZeroTuning(gamma=2.0, layers=(1,))
    assert scorer.calls == search.passes(ZeroTuning(), TOWER) == 7
    assert KnockOut().search() is None


def test_calibration_refuses_the_report_split() -> None:
    opened = open_model("bundled:dense-ind")
    task = read_task("induction", opened, n=20)
    calibration, report = task.split(calibration=8)
    with pytest.raises(UsageError, match="needs a calibration split"):
        calibrate(opened, ACT(), task, report)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing to calibrate"):
        calibrate(opened, KnockOut(), task, calibration)
    with pytest.raises(UsageError, match="no layer 9"):
        calibrate(opened, ZeroTuning(heads=((9, 0),)), task, calibration)
    assert isinstance(report, ReportSplit)


def test_a_recipe_fits_its_model_and_no_other(tmp_path: Path) -> None:
    opened = open_model("bundled:dense-ind")
    method = ZeroTuning(gammas={(1, 0): 2.0, (3, 1): 0.5}, gamma=1.0, layers=(1, 3))
    path = recipe_for(method, opened).save(tmp_path / "r.json")
    recipe = load(path)
    assert recipe.mitigation == method
    recipe.check(open_model("bundled:dense-ind", dtype="float32").module)
    with torch.no_grad(), recipe(opened) as effect:
        opened.module(opened.module.dummy_inputs["input_ids"])  # type: ignore[operator]
    assert effect.acted
    with pytest.raises(ModelError, match="chosen for bundled:dense-ind") as error:
        recipe(open_model("bundled:moe-ind"))
    assert "family llama there, qwen3_moe here" in str(error.value)
    other = open_model("bundled:dense-ind")
    next(other.module.parameters()).data.add_(0.5)
    with pytest.raises(ModelError, match="other weights"):
        recipe(other)


def test_damaged_recipes_are_refused(tmp_path: Path) -> None:
    opened = open_model("bundled:dense-ind")
    good = recipe_for(ZeroTuning(), opened).to_json()
    cases = [
        ("not json", "not JSON"),
        (json.dumps({"schema": "x"}), "expected schema"),
        (json.dumps({**good, "method": "zero-tunin"}), "Did you mean 'zero-tuning'"),
        (json.dumps({**good, "parameters": {"gama": 1}}), "not those of zero-tuning"),
    ]
    for text, said in cases:
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises((DataError, UsageError), match=said):
            load(path)
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_command_line_forms() -> None:
    found = chosen_methods("zero-tuning:gamma=2:layers=1-3:heads=L1H0+L2H3,act:threshold=0.1,knock-out")
    assert found == (
        ZeroTuning(gamma=2.0, layers=(1, 2, 3), heads=((1, 0), (2, 3))),
        ACT(threshold=0.1),
        KnockOut(),
    )
    assert chosen_methods("zero-tuning:gammas=L1H0=3+L2H1=0.5:gamma=1") == (
        ZeroTuning(gamma=1.0, gammas={(1, 0): 3.0, (2, 1): 0.5}),
    )
    assert chosen_methods(label_of(found[0])) == found[:1]
    assert label_of(replace(found[0], gamma=2.0, heads=None, layers=None)) == "zero-tuning"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zero-tunin", "Did you mean 'zero-tuning'"),
        ("zero-tuning:gama=2", "Did you mean 'gamma'"),
        ("zero-tuning:gamma", "needs a value"),
        ("zero-tuning:gamma=big", "must be a number"),
        ("zero-tuning:heads=3", "heads"),
        ("act,beta=0.3", "is no mitigation"),
        ("attention-scaling", "needs a value for factor"),
        ("act,act", "asked for twice"),
        ("", "No mitigation was named"),
    ],
)
def test_bad_forms_are_told(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        chosen_methods(text)


@pytest.mark.parametrize(
    ("asked", "label", "replaced"),
    [
        ("zero-tuning:gamma=0.5:layers=1-2", "zero-tuning:layers=1+2", ("gamma",)),
        ("var:p=0.3:rho=0.5:floor=0.1", "var:floor=0.1", ("p", "rho")),
        ("act:beta=0.2", "act:beta=0.2", ()),
    ],
)
def test_a_calibrated_method_is_not_called_by_values_that_the_calibration_replaces(
    asked: str, label: str, replaced: tuple[str, ...]
) -> None:
    found = jobs(MitigateOptions(methods=(asked,), calibrate=True))
    assert [set(job.replaced) for job in found] == [set(replaced)]
    assert [job.label for job in found] == [f"{label} (calibrated)"]
    kept = jobs(MitigateOptions(methods=(asked,)))
    assert kept[0].label == label_of(kept[0].method)
    two = jobs(MitigateOptions(methods=("zero-tuning:gamma=0.5", "zero-tuning:gamma=2"), calibrate=True))
    assert [job.label for job in two] == ["zero-tuning (calibrated)", "zero-tuning (calibrated) 2"]


def test_a_search_tries_only_values_of_what_it_says_it_replaces() -> None:
    """Nothing but the named parameters, heads and layers differs from what was asked for."""
    var = VAR(dims=(1,), p=0.1, rho=0.2, floor=0.05)
    search = var.search()
    assert isinstance(search, VarSearch)
    for tried in search.candidates(var):
        given, now = var.parameters, tried.parameters
        assert {key for key in given if given[key] != now[key]} <= {*search.replaces}
    tuned = ZeroTuning(gamma=0.5)
    assert set(tuned.search().replaces) == {"gamma", "gammas"} <= set(tuned.parameters)
    assert GridSearch({"beta": (0.2, 0.4)}).replaces == ("beta",)
