"""What an analyzer is and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from sinklens.core.adjustable import Adjustable
from sinklens.core.card import card
from sinklens.core.figures import Figure, Tile
from sinklens.core.reference import Reference
from sinklens.core.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

    from sinklens.tracers.signals import Signal
    from sinklens.tracers.trace import Trace


class Status(StrEnum):
    """The three states of a finding. `not-applicable` always has a reason."""

    FOUND = "found"
    NOT_FOUND = "not-found"
    NOT_APPLICABLE = "not-applicable"


@dataclass
class Finding:
    """The answer of one analyzer on one trace.

    Attributes:
        rows: Table rows, strongest first, plain scalars only; `units` names the unit of each column.
        summary: Scalars that describe the whole run.
        figures: What to draw, as data.
        tiles: Boxes for the first screen of the report.
        notes: Warnings that change how the numbers are to be read.
        labels: How keys of rows, summary and parameters are called in front of readers (`agree`: `found both by
            attention and by norm`); a key without a label is spelled out from its words.
        headline: Whether a positive verdict belongs into the run's main sentence; others stand below it.
        adjustable: Makes what a report needs to let its thresholds be moved; None without any.
        swept: Makes the finding at every value that a report lets its one threshold take, itself included; of the
            rows only the first is whole, the others name their position. None without any.
    """

    analyzer: str
    title: str
    status: Status
    verdict: str
    parameters: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    headline: bool = False
    adjustable: Callable[[], Adjustable | None] | None = field(default=None, repr=False, compare=False)
    swept: Callable[[], Mapping[float, Finding]] | None = field(default=None, repr=False, compare=False)

    def to_frame(self) -> pd.DataFrame:
        """The rows as a tidy table; the columns' units are in `.attrs["units"]`."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        frame.attrs["units"] = self.units
        return frame

    def to_json(self) -> dict[str, Any]:
        """The finding's object in the `sinklens/run/1` document."""
        return {
            "title": self.title,
            "status": str(self.status),
            "reason": self.reason,
            "verdict": self.verdict,
            "parameters": self.parameters,
            "summary": self.summary,
            "rows": self.rows,
            "units": self.units,
            "notes": self.notes,
            "labels": self.labels,
        }

    def __repr__(self) -> str:
        return f"{self.title}: {self.verdict} [{self.status}, {len(self.rows)} rows]"

    def _repr_html_(self) -> str:
        return card(self.title, self.verdict, self.notes, self.rows, self.units)


FINDING_FIELDS = ("title", "status", "reason", "verdict", "rows", "notes")
"""What can be asked of every finding, besides its summary."""
TRUTH = ("true", "false")
"""How yes and no are written in conditions."""


class Analyzer(ABC):
    """Base of all analyzers: a frozen dataclass whose fields are the method's parameters.

    Class attributes: `name` (registry and JSON key), `title`, `place` (its place in the chain from sink to cause,
    which orders results and report), `formula`, `needs` (signals the tracer must record), `reference`. The
    docstring's first line says what is found; it must have the paragraphs "How it is computed:", "Compared with
    the paper:" and "When not to trust it:".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    place: ClassVar[int]
    formula: ClassVar[str]
    needs: ClassVar[frozenset[Signal]]
    reference: ClassVar[Reference]
    summarises: ClassVar[tuple[str, ...] | None] = None
    """Every name that its summary may have: what `--fail-if` can ask of it. None where that is not said."""

    answers: ClassVar[tuple[tuple[str, tuple[str, ...]], ...]] = ()
    """Of these names, all words that the value may be, where they are known before a run; `TRUTH` for yes and no."""

    optional: ClassVar[frozenset[Signal]] = frozenset()
    """Of `needs`, signals without which it still answers, with less."""

    default: ClassVar[bool] = True
    """Whether `profile` runs it unless analyzers are named; `--analyzers all` runs the others too."""

    of_pictures: ClassVar[bool] = False
    """Whether it speaks of pictures: without any, `profile` runs it only if it is named."""

    from_samples: ClassVar[frozenset[Signal] | None] = None
    """Where attention was estimated from a sample of the query rows: signals it then does without; None for analyzers
    that do not say how sure an estimate is, and so do not apply."""

    headline: ClassVar[bool] = False
    """Whether it is a link of the chain (sink, massive activations, writers) that the run's main sentence tells."""

    @abstractmethod
    def analyze(self, trace: Trace) -> Finding:
        """Read the trace, never the model."""

    def lacking(self, missing: Collection[str]) -> list[str]:
        """Names of signals that it cannot do without, among those that are missing."""
        return sorted(signal.name for signal in self.needs - self.optional if signal.name in missing)

    def read(self, trace: Trace) -> Finding:
        """What it finds, or, where the library that ran the model cannot show what it needs, which and why."""
        sampled = self._beyond_samples(trace)
        if sampled:
            return self.not_applicable(sampled)
        missing = trace.tracing.get("missing", {})
        lacking = self.lacking(missing)
        if not lacking:
            return self.analyze(trace)
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        backend = trace.tracing.get("backend", "hf")
        return self.not_applicable(
            f"it reads {lacking[0]}{others}, which the {backend} backend cannot give: {missing[lacking[0]]}."
        )

    def _beyond_samples(self, trace: Trace) -> str | None:
        """Why a trace of sampled query rows is not enough; None where it is, or all rows were looked at."""
        sampling = trace.tracing.get("sampling")
        if sampling is None:
            return None
        lost = sampling["not_estimated"]
        spared = {signal.name for signal in self.from_samples or ()}
        lacking = [name for name in self.lacking(lost) if name not in spared]
        if lacking:
            return (
                f"it reads {lacking[0]}, which a sample of the query rows does not give: {lost[lacking[0]]}."
            )
        estimated = sorted(signal.name for signal in self.needs if signal.name in sampling["estimated"])
        if estimated and self.from_samples is None:
            return (
                f"it reads {estimated[0]}, which was estimated from a sample of the query rows, and its rule does not "
                "take standard errors into account."
            )
        return None

    @property
    def parameters(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def finding(self, status: Status, verdict: str, **rest: Any) -> Finding:
        """A finding of this analyzer, with its name and parameters filled in."""
        fixed = {"parameters": self.parameters, "headline": self.headline}
        return Finding(self.name, self.title, status, verdict, **fixed, **rest)

    def not_applicable(self, reason: str, **rest: Any) -> Finding:
        """The finding of a method that does not fit the model or the prompts; `reason` is a sentence."""
        verdict = f"Not applicable: {reason}"
        tile = Tile(self.title, "not applicable", reason, applicable=False, link=self.name)
        return self.finding(Status.NOT_APPLICABLE, verdict, reason=reason, tiles=[tile], **rest)


registry: Registry[type[Analyzer]] = Registry("analyzer", "sinklens ls analyzers")
