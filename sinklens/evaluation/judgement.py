"""From numbers to a verdict on a mitigation: one table of rules, tried in order. The first that holds gives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .metrics import Metric
from .statistics import LEVEL, Comparison

ALPHA = 1 - LEVEL
FEW = 20
"""Below this many items the verdict says that they are few."""


class Judgement(StrEnum):
    """What a mitigation does for a task."""

    HELPFUL = "helpful"
    HARMFUL = "harmful"
    TRADE_OFF = "trade-off"
    NO_CHANGE = "no measurable change"
    DID_NOT_ACT = "did not act"


@dataclass(frozen=True)
class Row:
    """A metric's comparison with what the verdict needs.

    Attributes:
        p_holm: The p value corrected for all verdicts of the run; None for metrics no verdict rests on.
    """

    metric: Metric
    found: Comparison
    p_holm: float | None = None

    @property
    def direction(self) -> int:
        """1 if it got better beyond doubt, -1 if worse, 0 if neither can be said.

        Both must agree: the corrected test is below 5 %, and the interval of the change leaves out 0.
        """
        if self.p_holm is None or math.isnan(self.p_holm) or self.p_holm >= ALPHA:
            return 0
        low, high = self.found.ci_low, self.found.ci_high
        if low is None or high is None or low <= 0 <= high:
            return 0
        return self.metric.better if self.found.delta > 0 else -self.metric.better


@dataclass(frozen=True)
class Case:
    """Everything a verdict on one mitigation and one task rests on."""

    acted: bool
    primary: Row
    guards: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A judgement, the id of the rule that gave it, and one sentence."""

    judgement: Judgement
    rule: str
    text: str


def _worse_guard(case: Case) -> bool:
    return any(row.direction < 0 for row in case.guards)


RULES: tuple[tuple[str, Judgement, Callable[[Case], bool]], ...] = (
    ("M0 nothing edited", Judgement.DID_NOT_ACT, lambda case: not case.acted),
    ("M1 worse", Judgement.HARMFUL, lambda case: case.primary.direction < 0),
    (
        "M2 better, a guard worse",
        Judgement.TRADE_OFF,
        lambda case: case.primary.direction > 0 and _worse_guard(case),
    ),
    ("M3 guard worse", Judgement.HARMFUL, _worse_guard),
    ("M4 better", Judgement.HELPFUL, lambda case: case.primary.direction > 0),
    ("M5 no difference shown", Judgement.NO_CHANGE, lambda case: True),
)


def judge(case: Case, *, why_not: str = "") -> Verdict:
    """The verdict on a mitigation for a task.

    Args:
        why_not: Why nothing was edited, for a mitigation that did not act.
    """
    rule, judgement = next((rule, judgement) for rule, judgement, holds in RULES if holds(case))
    if judgement is Judgement.DID_NOT_ACT:
        return Verdict(
            judgement, rule, f"Did not act: {why_not or 'it edited nothing'} Nothing was compared."
        )
    return Verdict(judgement, rule, _sentence(judgement, case))


def _sentence(judgement: Judgement, case: Case) -> str:
    row, found = case.primary, case.primary.found
    change = f"{row.metric.title} {shown(found.baseline)} -> {shown(found.mitigated)}"
    within = ""
    if found.ci_low is not None and found.ci_high is not None:
        within = f", change {shown(found.delta)} ({shown(found.ci_low)} to {shown(found.ci_high)})"
    p = "" if row.p_holm is None else f", corrected p = {row.p_holm:.3g}"
    text = f"{judgement.capitalize()}: {change}{within}{p}, {found.n} items."
    worse = [guard.metric.title for guard in case.guards if guard.direction < 0]
    if worse:
        text += f" {' and '.join(worse)} got worse."
    if judgement is Judgement.NO_CHANGE:
        text += _unseen(row)
    if found.n < FEW:
        text += f" {found.n} items are few."
    return text


def _unseen(row: Row) -> str:
    """What would have been seen had it been there."""
    found = row.found
    if not found.changed:
        return " No item's result differs."
    if found.detectable is None or not math.isfinite(found.detectable):
        return ""
    return f" A change below {shown(found.detectable)} would not have been seen (80 % power)."


def shown(value: float) -> str:
    """A number of a sentence."""
    return f"{value:.3g}" if math.isfinite(value) else "undefined"


def overall(judgements: Sequence[Judgement]) -> Judgement:
    """One word for several tasks: harm anywhere counts, help beside it makes a trade-off."""
    kinds = set(judgements)
    if not kinds or kinds == {Judgement.DID_NOT_ACT}:
        return Judgement.DID_NOT_ACT
    if Judgement.TRADE_OFF in kinds or {Judgement.HELPFUL, Judgement.HARMFUL} <= kinds:
        return Judgement.TRADE_OFF
    for kind in (Judgement.HARMFUL, Judgement.HELPFUL):
        if kind in kinds:
            return kind
    return Judgement.NO_CHANGE
