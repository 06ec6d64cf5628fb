"""What a structural change did: how many numbers or routed rows it changed, by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .effect import Outcome


@dataclass
class _Sums:
    """Kept where they were made so that nothing waits for a device."""

    edited: Tensor | int = 0
    seen: Tensor | int = 0
    largest: Tensor | float = 0.0


@dataclass
class Edits(Outcome):
    """What a change of states, experts or weights did.

    Attributes:
        unit: What is counted, in the plural.
        nothing: Why there is nothing to edit, if that is known before the model runs.
        problem: Why it was not found, said when nothing was edited.
    """

    unit: str = "entries"
    nothing: str | None = None
    problem: str = "none was found"
    _layers: dict[int, _Sums] = field(default_factory=dict)

    def add(
        self, layer: int, edited: Tensor | int, seen: Tensor | int, largest: Tensor | float = 0.0
    ) -> None:
        """One call: what was changed, what it could have changed, and the largest absolute change."""
        sums = self._layers.setdefault(layer, _Sums())
        sums.edited = sums.edited + edited
        sums.seen = sums.seen + seen
        sums.largest = max(float(sums.largest), float(largest))
        self.calls += 1

    @property
    def edited(self) -> int:
        return sum(int(sums.edited) for sums in self._layers.values())

    @property
    def seen(self) -> int:
        """What could have been edited."""
        return sum(int(sums.seen) for sums in self._layers.values())

    @property
    def largest(self) -> float:
        """Largest absolute change of a number; 0 where routing is changed rather than numbers."""
        return max((float(sums.largest) for sums in self._layers.values()), default=0.0)

    @property
    def by_layer(self) -> dict[int, tuple[int, float]]:
        """Number edited and the largest change, per layer (0-based)."""
        return {layer: (int(s.edited), float(s.largest)) for layer, s in sorted(self._layers.items())}

    @property
    def acted(self) -> bool:
        return self.edited > 0

    @property
    def verdict(self) -> str:
        if self.identity:
            return f"{self.name} with these parameters is the identity: nothing was put on the model."
        if self.nothing is not None:
            return f"{self.name} did not act: {self.nothing}"
        if not self.calls:
            return f"{self.name} did not act: the model was not run while it was on."
        if not self.acted:
            return f"{self.name} did not act: among {self.seen} {self.unit} {self.problem}."
        layers = [layer for layer, (edited, _) in self.by_layer.items() if edited]
        where = (
            f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers[:6]))}{', ...' * (len(layers) > 6)}"
        )
        size = f"; the largest change was {self.largest:.4g}" if self.largest else ""
        return f"{self.name} edited {self.edited} of {self.seen} {self.unit} in {where}{size}."
