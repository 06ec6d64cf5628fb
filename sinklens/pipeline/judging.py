"""One mitigation, judged: the same items without and with it, proof that it acted, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from sinklens.evaluation.judgement import Case, Judgement, Row, Verdict, judge, overall
from sinklens.evaluation.running import Question
from sinklens.evaluation.splits import ReportSplit, require
from sinklens.evaluation.statistics import compare_paired, holm
from sinklens.evaluation.tasks import Answers, Task
from sinklens.mitigations import Method, Outcome
from sinklens.models.spec import OpenedModel
from sinklens.tracers.batch import Batch

from .divergence import as_batch
from .scoring import put_on

PROBES = 8
"""Contexts of which the longest is timed."""
ROUNDS, NEW_TOKENS = 5, 16


@dataclass(frozen=True)
class Judged:
    """A task's answers under one mitigation."""

    task: str
    columns: Mapping[str, list[float]]
    answers: tuple[str, ...]
    outcome: dict[str, Any]


@dataclass(frozen=True)
class Assignment:
    """What is asked: a task and the items to report on."""

    task: Task
    split: ReportSplit

    def __post_init__(self) -> None:
        require(self.split, ReportSplit)


@dataclass
class Result:
    """Everything measured of one mitigation.

    Attributes:
        label: What results call it.
        method: None if a calibration kept the unchanged model.
        kept: Why it kept it.
        effect: `rows_edited`, `kl_mean` and `kl_positions` (see `divergence.Divergence`), `mean_mass_moved`.
        cost: Milliseconds per token without and with it.
        findings: What a profile says of the model while it is on; None if none was made.
        sink: What becomes of the sink, as of `sink_change.change_of`.
        controls: What came of its controls, as of `mitigation_controls.judge_controls`.
        ledger: What groups of keys get without and with it.
    """

    label: str
    name: str
    parameters: dict[str, Any]
    acted: bool
    kept: str | None = None
    said: str = ""
    judged: dict[str, Judged] = field(default_factory=dict)
    effect: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    findings: dict[str, Any] | None = None
    sink: dict[str, Any] | None = None
    controls: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] | None = None


def ask_under(
    opened: OpenedModel, method: Method, given: Assignment, progress: Callable[[int, int], None] | None
) -> Judged:
    """A task under a mitigation."""
    with put_on(method, opened) as outcome:
        answers = given.task.ask(opened, given.split.items, progress)
    return Judged(given.task.name, plain_columns(answers), answers.answers, outcome_of(outcome))


def plain_columns(answers: Answers) -> dict[str, list[float]]:
    return {name: np.asarray(column, dtype=float).tolist() for name, column in answers.columns.items()}


def outcome_of(outcome: Outcome) -> dict[str, Any]:
    """What a mitigation did, as plain data, whatever kind it is."""
    found: dict[str, Any] = {"acted": outcome.acted, "identity": outcome.identity, "text": outcome.verdict}
    for name in ("rows_edited", "rows_seen", "mean_mass_moved", "edited", "seen", "unit", "largest"):
        value = getattr(outcome, name, None)
        if isinstance(value, int | float | str):
            found[name] = value
    found.setdefault("rows_edited", found.get("edited", 0))
    return found


def overhead(opened: OpenedModel, method: Method, probes: Sequence[Question]) -> dict[str, Any]:
    """Milliseconds per token while reading and while writing, without and with a mitigation, in turns.

    Medians over rounds; the difference is the median of the paired differences.
    """
    question = max(probes[:PROBES], key=lambda q: len(q.context))
    batch = as_batch(opened, question)
    length = len(question.context)
    rounds: list[tuple[float, float, float, float]] = []
    for number in range(ROUNDS + 1):
        plain = _timed(opened, batch)
        with put_on(method, opened):
            changed = _timed(opened, batch)
        if number:  # the first round warms up
            rounds.append((plain[0], changed[0], plain[1], changed[1]))
    columns = [[row[i] for row in rounds] for i in range(4)]
    found: dict[str, Any] = {"tokens": length, "rounds": ROUNDS}
    for name, before, after, per in (("read", 0, 1, length), ("write", 2, 3, NEW_TOKENS)):
        scale = 1000.0 / per
        found[f"{name}_ms"] = median(columns[before]) * scale
        found[f"{name}_ms_mitigated"] = median(columns[after]) * scale
        paired = [b - a for a, b in zip(columns[before], columns[after], strict=True)]
        found[f"{name}_ms_added"] = median(paired) * scale
    return found


def _timed(opened: OpenedModel, batch: Batch) -> tuple[float, float]:
    """Seconds for the context and for a few further tokens from the cache."""
    module: Any = opened.module
    cuda = next(module.parameters()).is_cuda

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.no_grad():
        start = now()
        output = module(**batch.inputs, use_cache=True)
        read = now()
        for _ in range(NEW_TOKENS):
            token = output.logits[:, -1:].argmax(-1)
            output = module(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return read - start, now() - read


def evaluation_rows(
    given: Sequence[Assignment],
    baseline: Mapping[str, Mapping[str, list[float]]],
    results: Sequence[Result],
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Verdict]]]:
    """The paired table of a run, corrected over all its verdicts, and the verdict of each mitigation on each task."""
    acting = [(result, one) for result in results for one in given if _compared(result, one)]
    decisive = sum(metric.role != "other" for _, one in acting for metric in one.task.metrics)
    rows: list[tuple[Result, Assignment, Row]] = []
    for result, one in acting:
        before = _arrays(baseline[one.task.name])
        after = _arrays(result.judged[one.task.name].columns)
        for metric in one.task.metrics:
            found = compare_paired(metric, before, after, seed=seed, verdicts=decisive)
            rows.append((result, one, Row(metric, found)))
    places = [i for i, (_, _, row) in enumerate(rows) if row.metric.role != "other"]
    corrected = dict(zip(places, holm([rows[i][2].found.p_value for i in places]), strict=True))
    final = [
        (result, one, Row(row.metric, row.found, corrected.get(i)))
        for i, (result, one, row) in enumerate(rows)
    ]
    verdicts: dict[str, dict[str, Verdict]] = {}
    for result in results:
        for one in given:
            mine = [row for who, which, row in final if who is result and which is one]
            verdicts.setdefault(result.label, {})[one.task.name] = _verdict(result, mine)
    table = [
        _table_row(result, one, row, verdicts[result.label][one.task.name]) for result, one, row in final
    ]
    return table, verdicts


def _compared(result: Result, one: Assignment) -> bool:
    judged = result.judged.get(one.task.name)
    return judged is not None and bool(judged.outcome["acted"])


def _verdict(result: Result, rows: Sequence[Row]) -> Verdict:
    if result.kept is not None:
        text = f"Did not act: the calibration kept the unchanged model. {result.kept}"
        return Verdict(Judgement.DID_NOT_ACT, "M0 nothing edited", text)
    if not rows:
        why = result.said.partition("did not act: ")[2] or result.said
        return Verdict(
            Judgement.DID_NOT_ACT,
            "M0 nothing edited",
            f"Did not act: {why} Nothing was compared; this is not the same as no effect.",
        )
    primary = next(row for row in rows if row.metric.role == "primary")
    return judge(Case(True, primary, tuple(row for row in rows if row.metric.role == "guard")))


def _arrays(columns: Mapping[str, list[float]]) -> dict[str, np.ndarray]:
    return {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}


def _table_row(result: Result, one: Assignment, row: Row, verdict: Verdict) -> dict[str, Any]:
    found = row.found.to_json()
    found.pop("metric")
    judged = result.judged[one.task.name]
    return {
        "mitigation": result.label,
        "task": one.task.name,
        "metric": row.metric.name,
        **found,
        "p_holm": row.p_holm,
        "role": row.metric.role,
        "better": row.metric.better,
        "verdict": str(verdict.judgement) if row.metric.role == "primary" else None,
        "effect": {
            "rows_edited": judged.outcome["rows_edited"],
            "kl_mean": result.effect.get("kl_mean"),
            "kl_positions": result.effect.get("kl_positions"),
        },
    }


def one_word(verdicts: Mapping[str, Verdict]) -> Judgement:
    """The judgement over all tasks."""
    return overall([verdict.judgement for verdict in verdicts.values()])
