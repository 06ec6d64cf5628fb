"""How ACT chooses the heads it calibrates: the step that its authors' program leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from sinklens.core.errors import UsageError
from sinklens.models.spec import Tower

from .act import ACT
from .calibration import Choice, Search, Trials, value
from .method import Method


@dataclass(frozen=True)
class ActSearch(Search):
    """Heads whose attention, calibrated alone, makes the task's metric better.

    How it is computed: every head of the layers that ACT edits (by default all but the first two and the last) is
    calibrated alone on the calibration items. It is kept if the metric rises; where it stays the same, if the mean
    log-probability of the right answers does.

    Compared with the paper: Yu et al. leave out heads whose calibration harms, on about a thousand samples of several
    tasks; the rule from accuracies to heads is not in their program, which has the lists themselves. `keep="not-worse"`
    is the other reading of their text, and `keep="surely-better"` asks the paired interval of the gain to leave out 0,
    which few heads pass on few items.

    Attributes:
        keep: `better`, `not-worse` or `surely-better`.
    """

    keep: Literal["better", "not-worse", "surely-better"] = "better"

    def __post_init__(self) -> None:
        if self.keep not in ("better", "not-worse", "surely-better"):
            raise UsageError(f"act: keep must be better, not-worse or surely-better, got {self.keep!r}.")

    def candidates(self, method: Method, tower: Tower) -> list[tuple[int, int]]:
        """Heads that are tried."""
        assert isinstance(method, ACT)
        return [
            (block.index, head)
            for block in tower.blocks
            if block.attention
            for head, chosen in enumerate(method.chosen(block.index, tower).tolist())
            if chosen
        ]

    def passes(self, method: Method, tower: Tower) -> int:
        return 2 + len(self.candidates(method, tower))

    def run(self, method: Method, trials: Trials, tower: Tower) -> Choice:
        assert isinstance(method, ACT)
        base = value(trials.base, "supervised")
        rows: list[dict[str, Any]] = []
        kept: list[tuple[int, int]] = []
        for layer, head in self.candidates(method, tower):
            alone = replace(method, heads=((layer, head),))
            found = trials(alone, "head")
            gain = value(found, "supervised")
            keep = (
                found.acted
                and {
                    "better": gain > base,
                    "not-worse": found.score >= trials.base.score,
                    "surely-better": found.score > trials.base.score and trials.scorer.surely_better(alone),
                }[self.keep]
            )
            if keep:
                kept.append((layer, head))
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "gain": gain[0] - base[0],
                    "finer_gain": gain[1] - base[1],
                    "acted": found.acted,
                    "kept": keep,
                }
            )
        searched = {"keep": self.keep, "profile": rows}
        if not any(row["acted"] for row in rows):
            return Choice(
                None, "No head has a sink inside the prompts, so there is nothing to calibrate.", searched
            )
        if not kept:
            return Choice(None, f"Of {len(rows)} heads none was better when calibrated alone.", searched)
        chosen = replace(method, heads=cast("tuple[tuple[int, int], ...]", tuple(kept)))
        together = trials(chosen, "all kept heads")
        worse = value(together, "supervised") < base
        text = (
            f"{len(kept)} of {len(rows)} heads kept on {trials.scorer.items} calibration items; together: "
            f"{trials.base.score:.4g} -> {together.score:.4g}."
        )
        if worse:
            text += " Together they are worse than the unchanged model even here."
        return Choice(chosen, text, searched)
