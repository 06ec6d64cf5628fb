"""What a mitigation did while it was on: evidence that it acted, or a plain statement that it did not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from sinklens.core.card import card
from sinklens.core.counts import counted, verb
from sinklens.core.errors import ModelError
from sinklens.kernels.transfer import Transferred


class NothingEdited(UserWarning):
    """A mitigation was on and changed nothing, so whatever is measured under it is the unchanged model."""


@dataclass
class _Sums:
    """Sums of one layer, kept where they were made so that nothing waits for a device."""

    rows: Tensor | int = 0
    moved: Tensor | float = 0.0
    again: Tensor | int = 0
    seen: Tensor | int = 0


@dataclass
class Outcome(ABC):
    """What a method did while it was on.

    Attributes:
        name: Of the method.
        identity: By its parameters it changes nothing (a factor of 1), so nothing was put on the model.
        calls: Calls that passed through it.
    """

    name: str
    identity: bool = False
    calls: int = 0

    @property
    @abstractmethod
    def acted(self) -> bool:
        """Whether anything changed. A method that did not act has no effect to report, neutral or other."""

    @property
    @abstractmethod
    def verdict(self) -> str:
        """One sentence."""

    def _repr_html_(self) -> str:
        return card(
            self.name, self.verdict, [] if self.acted else ["It did not act; there is no effect to report."]
        )

    def require(self) -> Self:
        """This outcome, if there is one.

        Raises:
            ModelError: Nothing was edited.
        """
        if not self.acted:
            raise ModelError(
                self.verdict, hint="Check what it was meant for: heads, layers, positions, thresholds."
            )
        return self


@dataclass
class Effect(Outcome):
    """What a mitigation of attention did; `calls` are attention calls.

    Attributes:
        moves: Whether the method moves attention; one that does not adds to what heads write.
        reasons: Why calls had nothing to edit, and how many.
    """

    moves: bool = True
    reasons: dict[str, int] = field(default_factory=dict)
    _layers: dict[int, _Sums] = field(default_factory=dict)

    def add(self, layer: int, done: Transferred, seen: Tensor | int) -> None:
        """One attention call: what was moved, and how many rows could have been edited."""
        sums = self._layers.setdefault(layer, _Sums())
        sums.rows = sums.rows + done.rows
        sums.moved = sums.moved + done.moved
        sums.again = sums.again + done.again
        sums.seen = sums.seen + seen

    @property
    def rows_edited(self) -> int:
        """Attention rows (a query of a head of a layer) whose weights were changed."""
        return sum(int(sums.rows) for sums in self._layers.values())

    @property
    def rows_seen(self) -> int:
        """Rows of real tokens in the heads that the mitigation is meant for."""
        return sum(int(sums.seen) for sums in self._layers.values())

    @property
    def rows_computed_again(self) -> int:
        """Rows whose sets held so much that the rest was computed again; the price of exactness."""
        return sum(int(sums.again) for sums in self._layers.values())

    @property
    def mean_mass_moved(self) -> float:
        """Attention that changed keys, as a mean over edited rows (0 to 1); 0 if no row was edited."""
        rows = self.rows_edited
        return sum(float(sums.moved) for sums in self._layers.values()) / rows if rows else 0.0

    @property
    def by_layer(self) -> dict[int, tuple[int, float]]:
        """Rows edited and mean mass moved, per layer (0-based)."""
        found = {layer: (int(sums.rows), float(sums.moved)) for layer, sums in sorted(self._layers.items())}
        return {layer: (rows, moved / rows if rows else 0.0) for layer, (rows, moved) in found.items()}

    @property
    def acted(self) -> bool:
        """Whether any attention moved."""
        return self.rows_edited > 0 and (self.mean_mass_moved > 0 or not self.moves)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.identity:
            return f"{self.name} with these parameters is the identity: nothing was put on the model."
        if not self.calls:
            return f"{self.name} did not act: the model was not run while it was on."
        if not self.acted:
            seen = f"{counted(self.calls, 'attention call')} {verb(self.calls, 'was', 'were')} seen"
            found = f"{self.name} did not act: {seen} and no row had anything to edit"
            why = max(self.reasons, key=lambda reason: self.reasons[reason]) if self.reasons else None
            return f"{found}." if why is None else f"{found}, because {why}."
        share, rows = self.rows_edited / max(1, self.rows_seen), counted(self.rows_edited, "attention row")
        if not self.moves:
            return f"{self.name} added to {rows} ({share:.0%} of those it is meant for)."
        return (
            f"{self.name} edited {rows} ({share:.0%} of those it is meant for) and moved "
            f"{self.mean_mass_moved:.1%} of {verb(self.rows_edited, 'its', 'their')} attention on average."
        )
