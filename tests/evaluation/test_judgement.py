"""The rule table of verdicts: every rule, its order, and its words."""

from __future__ import annotations

import pytest

from sinklens.evaluation.judgement import RULES, Case, Judgement, Row, judge, overall
from sinklens.evaluation.metrics import Metric
from sinklens.evaluation.statistics import Comparison

UP = Metric("accuracy", "accuracy", "share", "right", role="primary", binary=True)
DOWN = Metric("perplexity", "perplexity", "", "nats", "tokens", better=-1, role="primary")
GUARD = Metric("coverage", "coverage", "share", "covered", "objects", role="guard")


def row(metric: Metric, delta: float, p: float, *, width: float = 0.05, n: int = 100) -> Row:
    found = Comparison(
        metric.name, 0.5, 0.5 + delta, delta, delta - width, delta + width, "BCa", p, "test", n, 9, 0.1
    )
    return Row(metric, found, p)


better, worse, same = row(UP, 0.1, 0.001), row(UP, -0.1, 0.001), row(UP, 0.01, 0.6)
lost = row(GUARD, -0.1, 0.001)

CASES = [
    (Case(False, better), Judgement.DID_NOT_ACT),
    (Case(True, worse), Judgement.HARMFUL),
    (Case(True, worse, (lost,)), Judgement.HARMFUL),
    (Case(True, better, (lost,)), Judgement.TRADE_OFF),
    (Case(True, same, (lost,)), Judgement.HARMFUL),
    (Case(True, better), Judgement.HELPFUL),
    (Case(True, same), Judgement.NO_CHANGE),
    (Case(True, row(DOWN, 0.1, 0.001)), Judgement.HARMFUL),
    (Case(True, row(DOWN, -0.1, 0.001)), Judgement.HELPFUL),
]


@pytest.mark.parametrize(("case", "wanted"), CASES)
def test_verdicts(case: Case, wanted: Judgement) -> None:
    assert judge(case).judgement is wanted


def test_every_rule_is_reached() -> None:
    assert {judge(case).rule for case, _ in CASES} == {rule for rule, _, _ in RULES}


def test_test_and_interval_must_agree() -> None:
    assert judge(Case(True, row(UP, 0.1, 0.001, width=0.2))).judgement is Judgement.NO_CHANGE
    assert judge(Case(True, row(UP, 0.1, 0.2))).judgement is Judgement.NO_CHANGE
    uncorrected = Row(UP, better.found, None)
    assert judge(Case(True, uncorrected)).judgement is Judgement.NO_CHANGE


def test_no_change_says_what_would_have_been_seen() -> None:
    assert "below 0.1 would not have been seen" in judge(Case(True, same)).text


def test_few_items_are_said_to_be_few() -> None:
    assert "12 items are few" in judge(Case(True, row(UP, 0.01, 0.6, n=12))).text


def test_what_did_not_act_has_no_numbers() -> None:
    text = judge(Case(False, same), why_not="no row had anything to edit.").text
    assert text == "Did not act: no row had anything to edit. Nothing was compared."


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], "did not act"),
        (["did not act"], "did not act"),
        (["helpful", "no measurable change"], "helpful"),
        (["helpful", "harmful"], "trade-off"),
        (["no measurable change", "harmful"], "harmful"),
        (["no measurable change", "did not act"], "no measurable change"),
    ],
)
def test_several_tasks(given: list[str], wanted: str) -> None:
    assert overall([Judgement(word) for word in given]) == wanted
