"""How VAR's parameters are chosen: how much is moved, in which heads, and who gets it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from sinklens.core.errors import UsageError
from sinklens.models.spec import Tower

from .calibration import Choice, Objective, Search, Trials, better_than_nothing, check_objective, value
from .method import Method
from .var import VAR, Budget


@dataclass(frozen=True)
class VarSearch(Search):
    """Every combination of a few values of p, rho and the budget's receiver.

    How it is computed: each combination is tried on the calibration items, and the one with the best metric is taken;
    where the metric is the same, the mean log-probability of the right answers (or what the task has in its place)
    decides, then the order of the ladders. Values mean what they mean in the paper, also for a method with
    `recipe="code"`, whose own parameters count the other way round.

    Compared with the paper: Kang et al. move 0.6 everywhere and choose rho by the kind of task (0.8, 0.5 and 0.9),
    which are the three rungs here; that text gets the budget is in their ablation, where it does worse. Their program
    has no search.

    Attributes:
        p_ladder: Shares of the sinks' attention that are moved.
        rho_ladder: Least parts of the visual attention on non-sinks.
        budgets: Who gets it, `+` between them.
        objective: `supervised` takes the best metric, `unsupervised` the lowest mean next-token entropy.
    """

    objective: Objective = "supervised"
    p_ladder: tuple[float, ...] = (0.3, 0.6, 0.9)
    rho_ladder: tuple[float, ...] = (0.5, 0.8, 0.9)
    budgets: str = "+".join(get_args(Budget))

    def __post_init__(self) -> None:
        for name, values in (("p_ladder", self.p_ladder), ("rho_ladder", self.rho_ladder)):
            if not values or not all(0 <= rung <= 1 for rung in values):
                raise UsageError(f"var: {name} must be numbers from 0 to 1, got {list(values)}.")
        known = get_args(Budget)
        if not self.receivers or not set(self.receivers) <= set(known):
            raise UsageError(f"var: budgets must be of {'+'.join(known)}, got {self.budgets!r}.")

    @property
    def replaces(self) -> tuple[str, ...]:
        return ("p", "rho", "budget")

    @property
    def receivers(self) -> Sequence[str]:
        return [part for part in self.budgets.split("+") if part]

    def candidates(self, method: Method) -> list[VAR]:
        """What is tried."""
        assert isinstance(method, VAR)
        code = method.recipe == "code"
        return [
            replace(
                method,
                p=_other(p) if code else p,
                rho=_other(rho) if code else rho,
                budget=budget,  # type: ignore[arg-type]
            )
            for p, rho, budget in itertools.product(self.p_ladder, self.rho_ladder, self.receivers)
        ]

    def passes(self, method: Method, tower: Tower) -> int:
        return 1 + len(self.candidates(method))

    def run(self, method: Method, trials: Trials, tower: Tower) -> Choice:
        check_objective(self.objective, trials.base)
        candidates = self.candidates(method)
        acting = [one for one in candidates if trials(one).acted]
        searched = {
            "p": list(self.p_ladder),
            "rho": list(self.rho_ladder),
            "budget": list(self.receivers),
            "objective": self.objective,
        }
        if not acting:
            why = "No head looks at pictures and sinks enough with any of the values, so nothing was edited."
            return Choice(None, why, searched)
        best = max(acting, key=lambda candidate: value(trials(candidate), self.objective))
        why = (
            f" Of {len(candidates)} combinations {len(acting)} edited anything."
            if len(acting) < len(candidates)
            else ""
        )
        return better_than_nothing(best, trials, self.objective, searched, why)


def _other(part: float) -> float:
    return round(1.0 - part, 12)
