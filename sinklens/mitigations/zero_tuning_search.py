"""How ZeroTuning chooses its heads and gamma."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from sinklens.core.errors import UsageError
from sinklens.models.spec import Tower

from .calibration import Choice, Objective, Search, Trials, better_than_nothing, check_objective, value
from .method import Method
from .zero_tuning import ZeroTuning

Unit = tuple[int, int] | int
"""A head of a layer, or a head index in all layers."""


@dataclass(frozen=True)
class ZeroTuningSearch(Search):
    """Heads that gain from more, or from less, attention to the first token; the best of the stronger kind; then gamma.

    How it is computed: each head alone gets gamma = `up`, then gamma = `down`. A head whose metric rises with more
    attention to the first token is up-effective, one whose metric rises with less is down-effective; a head that is
    both counts for the larger gain. Where the metric stays the same, the mean log-probability of the right answers
    decides. The kind with the larger summed gain is kept, and of its heads the best `share` (rounded up). On these
    together gamma is searched over the ladder of that kind. With `objective="unsupervised"` the mean next-token entropy
    (at the answer, or over written tokens) takes the place of the metric everywhere, the lower the better.

    Compared with the paper: Han et al. profile with one rate per task and search on 500 validation examples; their
    rate, ladder and place of the entropy are not published. Their program tries one head index in all layers at once
    (`units="shared"`), selects no heads, and picks the rate on the samples it reports.

    Attributes:
        share: Part of the heads of the kind that is kept.
        units: `each` head of a layer, or head indices `shared` by all layers.
        up_ladder, down_ladder: Gammas that are tried.
    """

    objective: Objective = "supervised"
    units: Literal["each", "shared"] = "each"
    share: float = 0.4
    up: float = 2.0
    down: float = 0.5
    up_ladder: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
    down_ladder: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2, 0.1)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"zero-tuning: share must be above 0 and at most 1, got {self.share}.")
        if self.units not in ("each", "shared"):
            raise UsageError(f"zero-tuning: units must be each or shared, got {self.units!r}.")
        if not self.up > 1 > self.down > 0:
            raise UsageError("zero-tuning: up must be above 1, and down between 0 and 1.")

    def candidates(self, method: Method, tower: Tower) -> list[Unit]:
        """What is profiled: the heads that the method may edit."""
        assert isinstance(method, ZeroTuning)
        layers = [
            block.index
            for block in tower.blocks
            if block.attention and (method.layers is None or block.index in method.layers)
        ]
        if self.units == "shared":
            return [h for h in range(tower.heads) if method.shared_heads is None or h in method.shared_heads]
        every = [(layer, head) for layer in layers for head in range(tower.heads)]
        kept = cast("tuple[tuple[int, int], ...] | None", method.heads)
        return [pair for pair in every if kept is None or pair in kept]

    @property
    def replaces(self) -> tuple[str, ...]:
        return ("gamma", "gammas")

    def passes(self, method: Method, tower: Tower) -> int:
        return 1 + 2 * len(self.candidates(method, tower)) + max(len(self.up_ladder), len(self.down_ladder))

    def run(self, method: Method, trials: Trials, tower: Tower) -> Choice:
        assert isinstance(method, ZeroTuning)
        check_objective(self.objective, trials.base)
        profile = self.profile(method, trials, tower)
        kind, chosen = self.select(profile)
        searched: dict[str, Any] = {
            "objective": self.objective,
            "units": self.units,
            "share": self.share,
            "rates": {"up": self.up, "down": self.down},
            "profile": profile,
            "kind": kind,
        }
        if kind is None:
            return Choice(
                None, "No head was better with more or with less attention to the first token.", searched
            )
        ladder = self.up_ladder if kind == "up" else self.down_ladder
        searched["ladder"] = list(ladder)
        candidates = [self._on(method, tuple(chosen), gamma) for gamma in ladder]
        best = max(candidates, key=lambda m: value(trials(m, "gamma"), self.objective))
        why = f" {len(chosen)} {kind}-effective heads of {sum(row['kind'] == kind for row in profile)}."
        return better_than_nothing(best, trials, self.objective, searched, why)

    def profile(self, method: ZeroTuning, trials: Trials, tower: Tower) -> list[dict[str, Any]]:
        """Each head alone: its gain with more and with less, and its kind (`up`, `down` or None)."""
        base = value(trials.base, self.objective)
        rows = []
        for unit in self.candidates(method, tower):
            gains = {}
            for kind, rate in (("up", self.up), ("down", self.down)):
                found = trials(self._on(method, (unit,), rate), f"{kind} profile")
                after = value(found, self.objective)
                gains[kind] = (after[0] - base[0], after[1] - base[1])
            best = max(gains, key=lambda kind: gains[kind])
            name = {"head": unit} if isinstance(unit, int) else {"layer": unit[0], "head": unit[1]}
            rows.append(
                {
                    **name,
                    "up_gain": gains["up"][0],
                    "down_gain": gains["down"][0],
                    "finer_gain": gains[best][1],
                    "gain": gains[best][0],
                    "kind": best if gains[best] > (0.0, 0.0) else None,
                }
            )
        return rows

    def select(self, profile: list[dict[str, Any]]) -> tuple[str | None, list[Unit]]:
        """The stronger kind and its best heads."""
        sums = {
            kind: tuple(
                sum(row[key] for row in profile if row["kind"] == kind) for key in ("gain", "finer_gain")
            )
            for kind in ("up", "down")
            if any(row["kind"] == kind for row in profile)
        }
        if not sums:
            return None, []
        kind = max(sums, key=lambda name: sums[name])
        rows = sorted(
            (row for row in profile if row["kind"] == kind),
            key=lambda row: (row["gain"], row["finer_gain"]),
            reverse=True,
        )
        best = rows[: math.ceil(self.share * len(rows))]
        return kind, [row["head"] if "layer" not in row else (row["layer"], row["head"]) for row in best]

    def _on(self, method: ZeroTuning, units: tuple[Unit, ...], gamma: float) -> ZeroTuning:
        if self.units == "shared":
            return replace(method, gamma=gamma, gammas=(), shared_heads=units)  # type: ignore[arg-type]
        return replace(method, gamma=gamma, gammas=(), heads=units)  # type: ignore[arg-type]
