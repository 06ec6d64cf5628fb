"""Intervals beside controls and lives over layers: what is drawn where, and what is said about it."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklens.core.figures import Estimate, Event, Intervals, Life, Timeline
from sinklens.report import embed, intervals, rows, timeline


def _intervals(*found: Estimate, **rest: Any) -> Intervals:
    return Intervals("k", "Effects", "Caption.", found, "change (points)", **rest)


def _timeline(*lives: Life, layers: int = 7) -> Timeline:
    return Timeline("k", "Lives", "Caption.", lives, layers, "|cosine|")


def _numbers(pattern: str, svg: object) -> list[list[float]]:
    return [[float(part) for part in match.groups()] for match in re.finditer(pattern, str(svg))]


def test_points_and_whiskers_stand_at_their_values() -> None:
    drawing = intervals.draw(
        _intervals(Estimate("a", -40.0, -50.0, -30.0, 1.0, 0.0, 2.0), Estimate("b", 10.0), reference=0.0)
    )
    whiskers = _numbers(r'M([\d.]+) [\d.]+H([\d.]+)" class="whisker"', drawing.svg)[
        2:
    ]  # after the legend's two
    circles = [x for (x,) in _numbers(r'<circle cx="([\d.]+)"', drawing.svg)][2:]
    (line,) = _numbers(r'M([\d.]+) 22v[\d.]+" class="reference"', drawing.svg)[0]
    control, own = whiskers
    per_point = (own[1] - own[0]) / 20
    assert (control[1] - control[0]) / 2 == pytest.approx(per_point, abs=0.1)
    assert circles[1] == pytest.approx((own[0] + own[1]) / 2, abs=0.1)
    assert line - circles[1] == pytest.approx(40 * per_point, abs=0.3)
    assert circles[2] - line == pytest.approx(10 * per_point, abs=0.3)
    assert control[0] == pytest.approx(line, abs=0.1)
    assert drawing.notes == ("Bars: 95 % interval.", "Filled: measured; hollow: control.")


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9),
    st.one_of(st.none(), st.floats(-1e6, 1e6)),
)
def test_the_axis_holds_all_values_and_the_reference(values: list[float], reference: float | None) -> None:
    low, high = intervals.limits(values, reference)
    inside = [*values, *([] if reference is None else [reference])]
    assert low < min(inside) or low == pytest.approx(min(inside))
    assert high > max(inside) or high == pytest.approx(max(inside))
    assert high > low


def test_rows_without_controls_speak_of_none() -> None:
    drawing = intervals.draw(_intervals(Estimate("a", 1.0), reference=None))
    assert drawing.notes == ()
    assert "hollow" not in str(drawing.svg).replace('class="estimate hollow"', "")
    assert "control" not in intervals.spoken(_intervals(), Estimate("a", 1.0))


def test_nothing_known_is_a_sentence() -> None:
    for figure in (_intervals(), _intervals(Estimate("a", math.nan))):
        assert intervals.draw(figure).svg is None
    assert timeline.draw(_timeline()).svg is None


def test_long_lists_are_cut_and_say_so() -> None:
    many = [Estimate(f"row {i}", float(i)) for i in range(61)]
    drawing = intervals.draw(_intervals(*many))
    assert "The first 40 of 61 rows are drawn." in drawing.notes
    assert "row 39" in str(drawing.svg)
    assert "row 40" not in str(drawing.svg)
    assert len(embed.intervals(_intervals(*many))["rows"]) == 61


def test_groups_become_headings_once() -> None:
    found = [
        Estimate("a", 1.0, group="Experts"),
        Estimate("b", 2.0, group="Experts"),
        Estimate("c", 3.0, group="MLP"),
    ]
    svg = str(intervals.draw(_intervals(*found)).svg)
    assert svg.count(">Experts<") == 1
    assert svg.count(">MLP<") == 1
    place = rows.layout(found, 500, 10)
    assert [words for _, words in place.headings] == ["Experts", "MLP"]
    assert place.centres == tuple(sorted(place.centres))


def test_gaps_split_a_life() -> None:
    assert timeline.pieces(Life("a", 2, 9, gaps=(4, 5, 8))) == [(2, 3), (6, 7), (9, 9)]
    assert timeline.pieces(Life("a", 3, 3)) == [(3, 3)]


@given(st.integers(0, 20), st.integers(0, 20), st.sets(st.integers(0, 40)))
def test_pieces_are_exactly_the_layers_without_the_gaps(start: int, length: int, gaps: set[int]) -> None:
    life = Life("a", start, start + length, gaps=tuple(gaps))
    drawn = [layer for first, last in timeline.pieces(life) for layer in range(first, last + 1)]
    assert drawn == [layer for layer in range(start, start + length + 1) if layer not in gaps]


def test_bars_span_whole_layers() -> None:
    drawing = timeline.draw(_timeline(Life("a", 2, 4, 0.5), Life("b", 0, 6, 1.0), layers=7))
    bars = _numbers(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing.svg)
    layer = bars[1][1] / 7
    assert bars[0][1] == pytest.approx(3 * layer, abs=0.05)
    assert bars[0][0] - bars[1][0] == pytest.approx(2 * layer, abs=0.05)
    levels = [int(level) for level in re.findall(r'class="life q(\d+)"', str(drawing.svg))]
    assert levels[0] < levels[1]


def test_events_have_shapes_and_words() -> None:
    events = (Event(1, "MLP neuron 17", "rise"), Event(5, "MLP", "fall"), Event(3, "seen", "other"))
    drawing = timeline.draw(_timeline(Life("a", 1, 5, events=events)))
    svg = str(drawing.svg)
    assert svg.count('class="event rise"') == 2  # in the legend and on the bar
    assert svg.count('class="event fall"') == 2
    assert svg.count('class="event other"') == 1
    assert "layer 1: MLP neuron 17" in svg
    words = embed.timeline(_timeline(Life("a", 1, 5, events=events, gaps=(2, 4))))["rows"][0]
    assert words[4] == "2 4"
    assert words[6] == "layer 1: MLP neuron 17; layer 5: MLP; layer 3: seen"


def test_lives_beyond_the_last_layer_stay_inside_the_drawing() -> None:
    drawing = timeline.draw(_timeline(Life("a", 0, 11, 0.3), layers=4), width=600)
    ((x, width),) = _numbers(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing.svg)
    assert x + width <= 600


@pytest.mark.parametrize("width", [320, 578, 1180])
def test_labels_leave_room_for_the_plot(width: int) -> None:
    long = [Estimate("x" * 300, 1.0, note="y" * 300), Estimate("a", 2.0)]
    left, _, plot, _ = rows.layout(long, width, 0.0).box
    assert plot >= 0.39 * width
    assert left + plot <= width


def test_values_are_finite_numbers_in_the_drawing() -> None:
    found = [Estimate("a", np.float32(1.5), math.nan, 3.0), Estimate("b", math.nan, control=2.0)]  # pyright: ignore
    assert "nan" not in str(intervals.draw(_intervals(*found)).svg).lower()
