"""Calibration and report never meet."""

from __future__ import annotations

import pytest

from sinklens.core.errors import DataError, UsageError
from sinklens.evaluation.items import Item
from sinklens.evaluation.splits import (
    CalibrationSplit,
    ReportSplit,
    given_splits,
    refuse_overlap,
    require,
    split_items,
)


def items(count: int, *, groups: int = 1) -> tuple[Item, ...]:
    return tuple(Item(f"q.jsonl:{i + 1}", f"question {i}", group=f"g{i % groups}") for i in range(count))


def test_the_halves_are_disjoint_seeded_and_complete() -> None:
    given = items(50)
    calibration, report = split_items("t", given, calibration=0.4, seed=7)
    assert (len(calibration), len(report)) == (20, 30)
    assert not set(calibration.digests) & set(report.digests)
    assert set(calibration.digests) | set(report.digests) == {item.digest for item in given}
    again, _ = split_items("t", given, calibration=0.4, seed=7)
    other, _ = split_items("t", given, calibration=0.4, seed=8)
    assert again.digests == calibration.digests
    assert other.digests != calibration.digests
    assert calibration.sha256 == again.sha256 != other.sha256


def test_copies_never_stand_on_both_sides() -> None:
    base = items(20)
    copies = tuple(Item(f"copy:{i}", f"question   {i} ") for i in range(20))
    for seed in range(5):
        calibration, report = split_items("t", base + copies, calibration=10, seed=seed)
        refuse_overlap(calibration, report)


def test_groups_keep_their_shares() -> None:
    calibration, report = split_items("t", items(60, groups=3), calibration=21, seed=1)
    for half in (calibration, report):
        counts = [sum(item.group == f"g{k}" for item in half.items) for k in range(3)]
        assert max(counts) - min(counts) <= 1


def test_overlap_is_refused_and_named() -> None:
    with pytest.raises(DataError, match=r"2 of 3 items") as error:
        given_splits("t", items(10)[:5], items(10)[3:6])
    assert "q.jsonl:4, q.jsonl:5" in str(error.value)


def test_the_types_do_not_mix() -> None:
    calibration, report = split_items("t", items(10))
    assert require(calibration, CalibrationSplit) is calibration
    with pytest.raises(UsageError, match="needs a calibration split"):
        require(report, CalibrationSplit)
    with pytest.raises(UsageError, match="needs a report split"):
        require(calibration, ReportSplit)
    with pytest.raises(UsageError, match="a tuple"):
        require(items(3), ReportSplit)
    assert not isinstance(calibration, ReportSplit)
    assert not isinstance(report, CalibrationSplit)


@pytest.mark.parametrize("calibration", [0, -1, 1.0, 10, 11])
def test_halves_that_cannot_be(calibration: float) -> None:
    with pytest.raises((UsageError, DataError)):
        split_items("t", items(10), calibration=calibration)


def test_the_content_decides_what_is_the_same() -> None:
    one = Item("a", "two  words", ("x", "y"), 0)
    assert one.digest == Item("b", "two words", ("x", "y"), 1).digest
    assert one.digest != Item("b", "two words", ("x", "z"), 0).digest
    assert Item("a", (1, 2)).digest != Item("a", (1, 3)).digest
