"""Choosing a method's parameters on data that are never reported.

A search proposes changes, a scorer tells how good each is on the calibration items, and nobody here knows the task.
Whoever adds a method gives it a `grid` of values to try, or a search of its own.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

from sinklens.core.canonical import plain
from sinklens.core.errors import UsageError
from sinklens.models.spec import Tower

from .method import Method

Objective = Literal["supervised", "unsupervised"]


@dataclass(frozen=True)
class Scored:
    """What the calibration items say about one change.

    Attributes:
        score: The task's metric, larger is better.
        finer: Decides between equal scores, larger is better (the log-probability of the right answers).
        entropy: Mean next-token entropy, nats; NaN where the task has none.
        acted: Whether anything was edited.
    """

    score: float
    finer: float
    entropy: float
    acted: bool = True


class Scorer(Protocol):
    """The calibration items of a task and a model."""

    @property
    def items(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the items."""
        ...

    def __call__(self, method: Method | None) -> Scored:
        """The items under a method; None for the model as it is."""
        ...

    def surely_better(self, method: Method) -> bool:
        """Whether the paired interval of the method's gain over the unchanged model lies above 0."""
        ...


@dataclass
class Trials:
    """Changes that were scored, each of them once.

    Attributes:
        planned: How many the search means to make.
        log: What was tried and what came of it, in order.
    """

    scorer: Scorer
    planned: int = 0
    progress: Callable[[int, int], None] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[Method | None, Scored] = field(default_factory=dict)

    def __call__(self, method: Method | None, what: str = "") -> Scored:
        if method is not None and method.identity:
            method = None
        if method not in self._known:
            found = self._known[method] = self.scorer(method)
            self.log.append(
                {
                    "what": what or ("unchanged" if method is None else "trial"),
                    "parameters": {} if method is None else plain(changed(method)),
                    "score": found.score,
                    "finer": found.finer,
                    "entropy": found.entropy,
                    "acted": found.acted and method is not None,
                }
            )
            if self.progress:
                self.progress(len(self._known), max(self.planned, len(self._known)))
        return self._known[method]

    @property
    def base(self) -> Scored:
        return self(None)

    @property
    def passes(self) -> int:
        """Passes over the items so far."""
        return len(self._known)


def changed(method: Method) -> dict[str, Any]:
    """Parameters that differ from the defaults."""
    from dataclasses import MISSING, fields

    defaults = {f.name: f.default for f in fields(method)}  # type: ignore[arg-type]
    return {
        key: value
        for key, value in method.parameters.items()
        if defaults.get(key, MISSING) is MISSING or value != defaults[key]
    }


@dataclass(frozen=True)
class Choice:
    """What a search decided.

    Attributes:
        method: None if nothing was better than the unchanged model.
        text: One sentence.
        searched: What was tried, as plain data.
    """

    method: Method | None
    text: str
    searched: dict[str, Any] = field(default_factory=dict)


class Search(ABC):
    """A way to choose parameters; frozen dataclasses whose fields are its own settings."""

    @property
    def replaces(self) -> tuple[str, ...]:
        """Parameters of the method that it sets, whatever they were; heads and layers only limit where it looks."""
        return ()

    @abstractmethod
    def passes(self, method: Method, tower: Tower) -> int:
        """Passes over the items that it will take, the one of the unchanged model included."""

    @abstractmethod
    def run(self, method: Method, trials: Trials, tower: Tower) -> Choice:
        """Search."""


def value(scored: Scored, objective: Objective) -> tuple[float, float]:
    """What is maximised: the metric, then the finer score; without labels the negative entropy."""
    if objective == "supervised":
        return scored.score, scored.finer
    return -scored.entropy, 0.0


def refuse_unknown_objective(objective: str) -> None:
    """Refuse an objective that is neither of the two.

    Raises:
        UsageError: Naming both.
    """
    if objective not in get_args(Objective):
        raise UsageError(f"objective must be {' or '.join(get_args(Objective))}, got {objective!r}.")


def check_objective(objective: str, base: Scored) -> None:
    """Refuse an unknown objective, and entropy where a task has none.

    Raises:
        UsageError: Before the search begins.
    """
    refuse_unknown_objective(objective)
    if objective == "unsupervised" and math.isnan(base.entropy):
        raise UsageError("This task tells no next-token entropy, so a search without labels is not possible.")


@dataclass(frozen=True)
class GridSearch(Search):
    """All combinations of a few values.

    Attributes:
        grid: Parameter to the values that are tried.
        objective: `supervised` takes the best metric, `unsupervised` the lowest mean next-token entropy.
    """

    grid: Mapping[str, Sequence[Any]]
    objective: Objective = "supervised"

    @property
    def replaces(self) -> tuple[str, ...]:
        return tuple(self.grid)

    def passes(self, method: Method, tower: Tower) -> int:
        return 1 + math.prod(len(values) for values in self.grid.values())

    def run(self, method: Method, trials: Trials, tower: Tower) -> Choice:
        check_objective(self.objective, trials.base)
        candidates = [
            replace(method, **dict(zip(self.grid, values, strict=True)))  # type: ignore[type-var]
            for values in itertools.product(*self.grid.values())
        ]
        best = max(candidates, key=lambda candidate: value(trials(candidate), self.objective))
        searched = {"grid": {key: list(values) for key, values in self.grid.items()}}
        return better_than_nothing(best, trials, self.objective, searched | {"objective": self.objective})


def better_than_nothing(
    best: Method, trials: Trials, objective: Objective, searched: dict[str, Any], why: str = ""
) -> Choice:
    """The best candidate, if it beats the unchanged model on the calibration items."""
    found, base = trials(best), trials.base
    if not found.acted:
        return Choice(None, "No candidate edited anything.", searched)
    numbers = f"{base.score:.4g} -> {found.score:.4g}"
    if objective == "unsupervised":
        numbers = f"entropy {base.entropy:.4g} -> {found.entropy:.4g} nats"
    if value(found, objective) <= value(base, objective):
        return Choice(
            None, f"No candidate was better than the unchanged model (best: {numbers}).{why}", searched
        )
    return Choice(best, f"Chosen on {trials.scorer.items} calibration items: {numbers}.{why}", searched)
