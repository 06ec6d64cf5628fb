"""A task and a model as the scorer of a calibration, and the calibration itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from sinklens.core.errors import UsageError
from sinklens.evaluation.splits import CalibrationSplit, require
from sinklens.evaluation.statistics import compare_paired
from sinklens.evaluation.tasks import Answers, Task
from sinklens.mitigations import Method, NothingEdited, Outcome
from sinklens.mitigations.calibration import Choice, Scored, Search, Trials
from sinklens.mitigations.recipes import Recipe, recipe_for
from sinklens.models.spec import OpenedModel


@contextmanager
def put_on(method: Method, opened: OpenedModel) -> Iterator[Outcome]:
    """A method on a model without the warning that nothing was edited: callers here look for themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingEdited)
        with method(opened) as outcome:
            yield outcome


def check_fits(method: Method, opened: OpenedModel) -> None:
    """Refuse parameters that do not fit the model, before anything long begins.

    Raises:
        UsageError: A head, layer or expert that the model does not have.
    """
    with put_on(method, opened):
        pass


class TaskScorer:
    """The calibration items of a task, as `mitigations.calibration.Scorer`."""

    def __init__(self, opened: OpenedModel, task: Task, split: CalibrationSplit, *, seed: int = 0) -> None:
        self.opened, self.task, self.seed = opened, task, seed
        self.split = require(split, CalibrationSplit)
        self._tokens = task.tokens(opened, self.split.items)
        self._answers: dict[Method | None, Answers] = {}

    @property
    def items(self) -> int:
        return len(self.split)

    @property
    def tokens(self) -> int:
        return self._tokens

    def __call__(self, method: Method | None) -> Scored:
        acted = True
        if method is None:
            answers = self.task.ask(self.opened, self.split.items)
        else:
            with put_on(method, self.opened) as outcome:
                answers = self.task.ask(self.opened, self.split.items)
            acted = outcome.acted
        self._answers[method] = answers
        return self._scored(answers, acted)

    def _scored(self, answers: Answers, acted: bool) -> Scored:
        metric = self.task.primary
        found = metric.better * metric.value(answers.columns)
        known = answers.entropy[np.isfinite(answers.entropy)]
        return Scored(
            found if np.isfinite(found) else -np.inf,
            float(np.mean(answers.finer)),
            float(known.mean()) if len(known) else float("nan"),
            acted,
        )

    def surely_better(self, method: Method) -> bool:
        for needed in (None, method):
            if needed not in self._answers:
                self(needed)
        before, after = self._answers[None], self._answers[method]
        found = compare_paired(self.task.primary, before.columns, after.columns, seed=self.seed)
        ends = found.ci_low, found.ci_high
        return all(end is not None and end * self.task.primary.better > 0 for end in ends)


@dataclass(frozen=True)
class Calibration:
    """What came of a calibration.

    Attributes:
        recipe: None if nothing was better than the unchanged model.
        text: One sentence.
        passes, tokens: Passes over the calibration items, and tokens of one.
        log: Every trial.
    """

    method: str
    recipe: Recipe | None
    text: str
    passes: int
    tokens: int
    seconds: float
    split: dict[str, Any]
    searched: dict[str, Any] = field(default_factory=dict)
    log: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        parts = ("method", "text", "passes", "tokens", "seconds", "split", "searched", "log")
        return {key: getattr(self, key) for key in parts} | {"found": self.recipe is not None}


def calibrate(
    model: nn.Module | OpenedModel,
    method: Method,
    task: Task,
    split: CalibrationSplit,
    *,
    search: Search | None = None,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Calibration:
    """Choose a method's parameters on calibration items. The report split is never seen here.

    Args:
        search: How; by default the method's own, with `settings` (`objective="unsupervised"`, ...).
        tokenizer: For a model in memory.

    Raises:
        UsageError: `split` is not a calibration split, or the method has nothing to choose.
    """
    from sinklens.models.opening import open_model

    opened = model if isinstance(model, OpenedModel) else open_model(model, tokenizer=tokenizer)
    require(split, CalibrationSplit)
    chosen = search or method.search(**settings)
    if chosen is None:
        raise UsageError(
            f"{method.name} has nothing to calibrate.", hint="Give its parameters, and leave --calibrate out."
        )
    started = time.perf_counter()
    scorer = TaskScorer(opened, task, split)
    tower = opened.anatomy.main
    check_fits(method, opened)
    trials = Trials(scorer, chosen.passes(method, tower), progress)
    choice = chosen.run(method, trials, tower)
    return Calibration(
        method.name,
        _recipe(choice, trials, opened, task, split),
        choice.text,
        trials.passes,
        scorer.tokens,
        round(time.perf_counter() - started, 2),
        {**split.describe(), "items": len(split)},
        choice.searched,
        tuple(trials.log),
    )


def _recipe(
    choice: Choice, trials: Trials, opened: OpenedModel, task: Task, split: CalibrationSplit
) -> Recipe | None:
    if choice.method is None:
        return None
    found, base = trials(choice.method), trials.base
    scores: dict[str, dict[str, Any]] = {
        name: {"score": scored.score, "finer": scored.finer, "entropy": scored.entropy}
        for name, scored in (("unchanged", base), ("chosen", found))
    }
    metric = task.primary
    scores["metric"] = {"name": metric.name, "better": metric.better}
    return recipe_for(
        choice.method,
        opened,
        calibration={**split.describe(), "settings": task.describe(), "items": list(split.digests)},
        searched=choice.searched,
        scores=scores,
        text=choice.text,
    )
