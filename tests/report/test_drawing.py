"""Colours, the PNG encoder, heat maps, curves, ticks, and the counts behind a moved threshold."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

import sinklens.report
from sinklens.core.figures import Heatmap, Lines, Samples, Series
from sinklens.report import colour, heatmap, lines, png, samples, svg

CSS = (Path(sinklens.report.__file__).parent / "static" / "report.css").read_text(encoding="utf-8")


def _lightness(rgb: tuple[int, ...]) -> float:
    """CIE L* of an sRGB colour."""
    y = float(np.dot(_linear(rgb), (0.2126, 0.7152, 0.0722)))
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def _linear(rgb: tuple[int, ...]) -> np.ndarray:
    c = np.array(rgb) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


# Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB.
_DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}


@pytest.mark.parametrize("deficiency", _DEFICIENCIES)
def test_ramp_grows_evenly_in_lightness_for_every_eye(deficiency: str) -> None:
    seen = []
    for rgb in colour.ramp():
        linear = np.clip(np.array(_DEFICIENCIES[deficiency]) @ _linear(rgb), 0, 1)
        y = float(linear @ (0.2126, 0.7152, 0.0722))
        seen.append(116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y)
    steps = np.diff(seen)
    assert steps.min() > 0.4
    assert steps.max() < 3.2 * np.median(steps)
    assert seen[-1] - seen[0] > 75


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("deficiency", _DEFICIENCIES)
def test_signed_ramp_leaves_zero_evenly_and_keeps_its_sides_apart(deficiency: str, light: bool) -> None:
    linear = [
        np.clip(np.array(_DEFICIENCIES[deficiency]) @ _linear(rgb), 0, 1)
        for rgb in colour.diverging(light=light)
    ]
    seen = [116 * np.cbrt(float(rgb @ (0.2126, 0.7152, 0.0722)) + 1e-9) - 16 for rgb in linear]
    towards_zero = np.diff(seen) * (1 if light else -1)
    half = colour.LEVELS // 2
    assert towards_zero[: half - 1].min() > 0
    assert towards_zero[half:].max() < 0
    for step in range(half // 2):  # blue stays bluer than its counterpart of the other sign
        low, high = linear[step], linear[-1 - step]
        assert low[2] - low[0] > high[2] - high[0] + 0.1


def test_values_of_both_signs_have_zero_in_the_middle() -> None:
    scale = colour.scale(np.array([[-1.0, 3.0, 0.0, np.nan]]))
    assert (scale.low, scale.high, scale.signed) == (-3.0, 3.0, True)
    assert scale.levels(np.array([[-3.0, 3.0, -1e-9, 0.0]])).tolist() == [[0, 63, 31, 32]]
    for values in ([[0.0, 2.0]], [[-2.0, 0.0]], [[-2.0, -1.0]]):
        assert not colour.scale(np.array(values)).signed
    assert colour.scale(np.array([[0.5, 1.0]]), limits=(-2.0, 2.0)).signed
    assert not colour.scale(np.array([[-1.0, 1.0]]), limits=(-1.0, 2.0)).signed
    drawing = heatmap.draw(Heatmap("k", "t", "c", np.array([[-1.0, 3.0]]), "x"), figure_id="x")
    assert "Blue is below zero, orange above." in drawing.notes
    assert 'href="#ramp-signed"' in str(drawing.svg)
    assert 'class="d63"' in str(drawing.svg)


def test_light_pages_turn_the_ramp_round() -> None:
    assert colour.ramp(light=True) == colour.ramp()[::-1]
    assert _lightness(colour.ramp(light=True)[0]) > 90


def _contrast(a: str, b: str) -> float:
    first, second = (float(_linear(_rgb(c)) @ (0.2126, 0.7152, 0.0722)) for c in (a, b))
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def _rgb(code: str) -> tuple[int, ...]:
    return tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(theme: int) -> None:
    pairs = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", CSS))
    named = {name: pair.split(", ")[theme] for name, pair in pairs.items()}
    for ground in ("ground", "panel", "faint"):
        for ink in ("ink", "soft", "accent", "good", "bad", "warn"):
            assert _contrast(named[ink], named[ground]) >= 4.5, (ink, ground)
    for series in ("s0", "s1", "s2", "s3", "s4", "s5"):
        assert _contrast(named[series], named["panel"]) >= 3.0, series


def test_the_sheet_without_light_dark_equals_the_light_theme() -> None:
    modern = {k: v.split(", ")[0] for k, v in re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", CSS)}
    plain = dict(re.findall(r"--(\w+): (#\w{6});", CSS))
    assert plain == modern


@given(st.integers(1, 9), st.integers(1, 13), st.integers(0, 2**32 - 1))
def test_png_round_trip(height: int, width: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(-1, colour.LEVELS, (height, width))
    image = np.array(Image.open(io.BytesIO(png.encode(levels, colour.ramp()))).convert("RGBA"))
    assert image.shape == (height, width, 4)
    assert np.array_equal(image[..., 3], np.where(levels < 0, 0, 255))
    palette = np.array(colour.ramp())
    assert np.array_equal(image[levels >= 0][:, :3], palette[levels[levels >= 0]])


def test_png_refuses_what_it_cannot_write() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        png.encode(np.zeros((0, 3), int), colour.ramp())
    with pytest.raises(ValueError, match="levels must lie"):
        png.encode(np.full((1, 1), colour.LEVELS), colour.ramp())


def test_scale_is_robust_against_one_massive_value() -> None:
    values = np.full((7, 11), 0.5)
    values[3, 4] = 5000.0
    found = colour.scale(values[:, :])
    assert found.clipped
    assert found.high < 5000
    assert colour.scale(np.array([[0.1, 0.9]])) == colour.Scale(0.0, 0.9)


def test_scale_levels() -> None:
    values = np.array([[np.nan, -1.0, 0.0], [0.5, 1.0, 7.0]])
    assert colour.Scale(0.0, 1.0).levels(values).tolist() == [[-1, 0, 0], [32, 63, 63]]
    log = colour.scale(np.array([[0.0, 1.0], [10.0, 100.0]]), log=True)
    assert log.levels(np.array([[0.0, 1.0], [10.0, 100.0]])).tolist() == [[0, 0], [32, 63]]
    assert log.at(0.5) == pytest.approx(10.0)
    assert colour.scale(np.full((2, 3), 4.0)).levels(np.full((2, 3), 4.0)).tolist() == [[63] * 3] * 2


def test_pooling_keeps_the_peak() -> None:
    values = np.random.default_rng(3).random((5, 1037))
    values[2, 519] = 9.0
    small = heatmap.pooled(values, 5, 200)
    assert small.shape == (5, 173)
    assert small[2, 519 // 6] == 9.0
    assert small.max(axis=1).tolist() == values.max(axis=1).tolist()


@given(st.integers(1, 7), st.integers(1, 11), st.integers(0, 2**32 - 1))
def test_level_paths_cover_every_cell_once(rows: int, columns: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(-1, 4, (rows, columns))
    painted = np.full((rows, columns), -1)
    for level, path in re.findall(r'class="q(\d+)" d="([^"]+)"', heatmap.level_paths(levels)):
        for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            area = painted[int(y), int(x) : int(x) + int(run)]
            assert (area == -1).all()
            area[:] = int(level)
    assert np.array_equal(painted, levels)


def test_heatmap_without_values_is_a_sentence() -> None:
    for values in (np.zeros((0, 3)), np.full((2, 3), np.nan), np.zeros(4)):
        drawing = heatmap.draw(Heatmap("k", "t", "c", values, "share"), figure_id="x")
        assert drawing.svg is None
        assert drawing.notes == ("There are no values to draw.",)


def test_heatmap_says_what_it_drew() -> None:
    values = np.full((3, 5), 0.1)
    values[2, 4], values[0, 1] = 0.7, np.nan
    drawing = heatmap.draw(Heatmap("k", "Title", "c", values, "share", marks=((2, 4),)), figure_id="x")
    assert drawing.svg is not None
    assert "largest 0.700 share at layer 2, head 4" in drawing.svg
    assert 'class="ring"' in drawing.svg
    assert "Hatched: no value (1 of 15 cells)." in drawing.notes
    assert "Ringed: 1 cell." in drawing.notes


def test_large_maps_are_images_in_both_themes() -> None:
    drawing = heatmap.draw(
        Heatmap("k", "t", "c", np.random.default_rng(0).random((48, 128)), "x"), figure_id="x"
    )
    assert drawing.svg is not None
    assert drawing.svg.count("data:image/png;base64,") == 2
    assert 'class="on-light"' in drawing.svg
    assert 'class="on-dark"' in drawing.svg


def test_lines_break_at_missing_values_and_keep_spikes() -> None:
    x = np.arange(7.0)
    drawing = lines.draw(
        Lines(
            "k",
            "t",
            "c",
            (Series("a", x, np.array([1, 2, np.nan, 4, 5, -1, 2.0])),),
            "layer",
            "L2",
            log_y=True,
        ),
        figure_id="x",
    )
    assert drawing.svg is not None
    curves = re.findall(r'class="s0"><path d="([^"]+)" class="line"', drawing.svg)
    assert [curve.count("M") for curve in curves] == [
        1,
        3,
    ]  # the legend's sample, then the curve in three pieces
    y = np.zeros(5003)
    y[4111] = 77.0
    kept_x, kept_y = lines._thinned(np.arange(5003.0), y)
    assert len(kept_x) <= 1203
    assert kept_x[kept_y == 77.0].tolist() == [4111.0]


def test_lines_without_values_and_single_points() -> None:
    empty = Lines("k", "t", "c", (Series("a", np.arange(3), np.full(3, np.nan)),), "layer", "L2")
    assert lines.draw(empty, figure_id="x").svg is None
    one = Lines("k", "t", "c", (Series("a", np.array([3]), np.array([5.0])),), "layer", "L2")
    assert "nan" not in str(lines.draw(one, figure_id="x").svg).lower()
    bars = Lines("k", "t", "c", (Series("", np.array([3]), np.array([5.0])),), "layer", "L2", bars=True)
    assert "<rect" in str(lines.draw(bars, figure_id="x").svg)


@given(
    st.floats(-1e6, 1e6).flatmap(
        lambda low: st.tuples(st.just(low), st.floats(1e-3, 1e6).map(lambda d: low + d))
    )
)
def test_ticks_are_inside_and_few(limits: tuple[float, float]) -> None:
    low, high = limits
    found = svg.ticks(low, high)
    span = high - low
    assert 1 <= len(found) <= 8
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)


def test_log_and_index_ticks() -> None:
    assert svg.log_ticks(0.7, 2000) == [1.0, 10.0, 100.0, 1000.0]
    assert svg.log_ticks(12, 70) == [20.0, 50.0]
    assert svg.log_ticks(8.05, 12.8) == [10.0, 12.0]
    assert svg.index_ticks(48, 12) == list(range(0, 48, 4))
    assert svg.index_ticks(3, 9) == [0, 1, 2]
    assert len(svg.index_ticks(100_000, 12)) <= 12


def test_tags_escape() -> None:
    made = svg.tag("text", "<b>&\u202e", Markup("<i/>"), class_='"x"', none=None, y_z=1.23456)
    assert made == '<text class="&#34;x&#34;" y-z="1.23">&lt;b&gt;&amp;\\u202e<i/></text>'


def _samples(values: np.ndarray, threshold: float = 0.3) -> Samples:
    return Samples("rate", "Rate", "caption", values, threshold)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_counts_equal_the_definition_at_every_threshold(
    prompts: int, layers: int, heads: int, seed: int
) -> None:
    values = np.random.default_rng(seed).random((prompts, layers, heads)).round(2)
    counts = samples.count(_samples(values))
    assert 0.3 in counts.thresholds
    for i, threshold in enumerate(counts.thresholds):
        assert counts.rate(i) == pytest.approx(100 * np.mean(values > threshold))
        assert counts.rate_map(i) == pytest.approx(100 * np.mean(values > threshold, axis=0))


def test_missing_samples_do_not_count() -> None:
    values = np.array([[[0.9, np.nan]], [[np.nan, np.nan]], [[0.1, np.nan]]])
    counts = samples.count(_samples(values))
    own = counts.thresholds.tolist().index(0.3)
    assert counts.rate(own) == 50.0
    assert counts.rate_map(own)[0, 0] == 50.0
    assert np.isnan(counts.rate_map(own)[0, 1])


def test_thresholds_cover_other_units() -> None:
    grid = samples.thresholds(np.array([[[3.0, 700.0]]]), 100.0)
    assert grid[0] == 3.0
    assert grid[-1] == 700.0
    assert 100.0 in grid
