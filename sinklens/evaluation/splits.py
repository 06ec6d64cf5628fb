"""Two halves of a task that never meet: what a choice is made on, and what is reported.

They are different types. Whatever chooses takes a `CalibrationSplit`, whatever reports takes a `ReportSplit`, and each
refuses the other when it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import numpy as np

from sinklens.core.errors import DataError, UsageError

from .items import Item

NAMED = 5
"""Items named in a message."""


@dataclass(frozen=True)
class _Split:
    """Items of one task.

    Attributes:
        task: Name of the task.
        seed: Of the draw; None for items that were given as this half.
    """

    task: str
    items: tuple[Item, ...]
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"The {_NAMES[type(self)]} of {self.task!r} has no item.")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digests(self) -> tuple[str, ...]:
        """Content hash of each item."""
        return tuple(item.digest for item in self.items)

    @property
    def sha256(self) -> str:
        """Of all items, whatever their order."""
        return hashlib.sha256("\n".join(sorted(self.digests)).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For manifests and recipes."""
        return {"task": self.task, "n": len(self), "seed": self.seed, "sha256": self.sha256}


@final
@dataclass(frozen=True)
class CalibrationSplit(_Split):
    """What parameters are chosen on. Nothing measured here is ever reported as a result."""


@final
@dataclass(frozen=True)
class ReportSplit(_Split):
    """What results are measured on. Nothing is ever chosen here."""


_NAMES: dict[type, str] = {CalibrationSplit: "calibration split", ReportSplit: "report split"}
S = TypeVar("S", CalibrationSplit, ReportSplit)


def require(split: Any, kind: type[S]) -> S:
    """The split, if it is of the kind that is needed here.

    Raises:
        UsageError: It is the other half, or no split at all.
    """
    if isinstance(split, kind):
        return split
    found = _NAMES.get(type(split), f"a {type(split).__name__}")
    purpose = (
        "Choosing on reported items makes gains of nothing."
        if kind is CalibrationSplit
        else "Items that parameters were chosen on say nothing about new ones."
    )
    raise UsageError(
        f"This needs a {_NAMES[kind]} and was given {'the ' if type(split) in _NAMES else ''}{found}.",
        detail=purpose,
        hint="calibration, report = task.split(...)",
    )


def split_items(
    task: str,
    items: Sequence[Item],
    *,
    calibration: int | float = 0.4,
    report: int | None = None,
    seed: int = 0,
) -> tuple[CalibrationSplit, ReportSplit]:
    """Draw the two halves. Items with the same content stay together, and groups keep their shares.

    Args:
        calibration: How many items, or (below 1) which part of them.
        report: How many of the others; None for all.

    Raises:
        DataError: Too few items for two halves.
        UsageError: A number that cannot be.
    """
    if calibration <= 0 or (isinstance(calibration, float) and calibration >= 1):
        raise UsageError(f"calibration must be a count from 1 or a part below 1, got {calibration}.")
    order = _drawn(items, seed)
    wanted = round(calibration * len(items)) if calibration < 1 else int(calibration)
    if len({item.digest for item in items}) < 2 or not 0 < wanted < len(items):
        raise DataError(
            f"{task}: {len(items)} items cannot be split into {wanted} for calibration and some to report.",
            hint="Give more items, or fewer for calibration.",
        )
    first = order[:wanted]
    taken = {item.digest for item in first}
    # A copy of a calibration item is never reported.
    rest = [item for item in order[wanted:] if item.digest not in taken]
    if not rest:
        raise DataError(f"{task}: apart from copies of the calibration items there is nothing to report on.")
    chosen = rest if report is None else rest[:report]
    place = {id(item): number for number, item in enumerate(items)}
    halves = [tuple(sorted(half, key=lambda item: place[id(item)])) for half in (first, chosen)]
    return CalibrationSplit(task, halves[0], seed), ReportSplit(task, halves[1], seed)


def _drawn(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in random order, one of each group in turn."""
    rng = np.random.default_rng(seed)
    groups: dict[str, list[Item]] = {}
    for number in rng.permutation(len(items)):
        groups.setdefault(items[number].group, []).append(items[number])
    # Places between 0 and 1 within each group, so that any first part has about its share of every group.
    placed = [
        ((rank + 0.5) / len(group), name, item)
        for name, group in sorted(groups.items())
        for rank, item in enumerate(group)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def refuse_overlap(calibrated: Iterable[str] | CalibrationSplit, report: ReportSplit) -> None:
    """Refuse to report on items that parameters were chosen on.

    Args:
        calibrated: A calibration split, or the content hashes of one.

    Raises:
        DataError: Naming the items.
    """
    used: Collection[str] = set(
        calibrated.digests if isinstance(calibrated, CalibrationSplit) else calibrated
    )
    shared = [item.id for item in report.items if item.digest in used]
    if not shared:
        return
    more = f" and {len(shared) - NAMED} more" if len(shared) > NAMED else ""
    raise DataError(
        f"{len(shared)} of {len(report)} items to report on were used for calibration.",
        detail=f"They are: {', '.join(shared[:NAMED])}{more}.",
        hint="Take them out of one of the two, or let one task be split: --task with --calibrate, or task.split().",
    )


def given_splits(
    task: str, calibration: Sequence[Item], report: Sequence[Item]
) -> tuple[CalibrationSplit, ReportSplit]:
    """Two halves that were given as two files or lists.

    Raises:
        DataError: They share items.
    """
    first, second = CalibrationSplit(task, tuple(calibration)), ReportSplit(task, tuple(report))
    refuse_overlap(first, second)
    return first, second
