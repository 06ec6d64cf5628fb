"""The notebook's short form and the figures for papers."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from sinklens.core.errors import UsageError
from sinklens.core.figures import (
    Estimate,
    Event,
    Figure,
    Heatmap,
    Intervals,
    Life,
    Lines,
    Samples,
    Series,
    Timeline,
)
from sinklens.report import colour, draw, interactive, run_repr_html, save_figure

from . import factory, factory_pictures
from .parsed import HOSTILE, Page, poisoned

FIGURES = {
    "map": Heatmap("m", "Map", "Caption.", np.linspace(0, 1, 35).reshape(5, 7), "share", marks=((4, 6),)),
    "log": Heatmap("l", "Log", "Caption.", np.array([[0.0, 1.0, np.nan], [10.0, 100.0, 3.0]]), "abs-max", log=True),
    "flat": Heatmap("f", "Flat", "Caption.", np.full((2, 3), 2.0), "share"),
    "lines": Lines(
        "n", "Norm", "Caption.", (Series("a", np.arange(5), np.array([1, 2, np.nan, 4, 5.0]), True),), "layer", "L2",
        log_y=True, marks=((2.0, "rise"),),
    ),
    "bars": Lines("b", "Bars", "Caption.", (Series("", np.arange(3), np.arange(3)),), "position", "share", bars=True),
    "points": Lines(
        "p", "Points", "Caption.", (Series("a", np.arange(3), np.arange(3)), Series("b", np.arange(2), np.ones(2))),
        "share", "nats", joined=False,
    ),
    "intervals": Intervals(
        "i", "Effects", "Caption.",
        (Estimate("prune", -40.0, -44.0, -37.0, 0.5, -0.5, 1.5, "carries it", "Experts"), Estimate("zero", 1.0)),
        "change (points)",
    ),
    "timeline": Timeline(
        "t", "Lives", "Caption.",
        (Life("position 3", 1, 4, 0.5, (Event(1, "MLP", "rise"), Event(4, "MLP", "fall")), (2,)), Life("5", 2, 2)),
        6, "share",
    ),
    "pictures": replace(factory_pictures.figure(factory_pictures.make(3, cells=6)[0]), caption="Caption."),
    "samples": Samples("s", "Rate", "Caption.", np.random.default_rng(0).random((11, 5, 7)), 0.3),
}  # fmt: skip


def test_repr_is_small_static_and_complete() -> None:
    run = factory.make(layers=48, heads=32, experts=128, n_prompts=5, seq_len=31)
    html = run_repr_html(run.document, run.figures, run.tiles)
    assert len(html) < 100_000
    page = Page(html)
    assert {tag for tag, _ in page.elements} == {"div", "span", "strong", "img"}
    assert "Strong primary sink on position 0" in page.words
    for tile in run.tiles:
        assert tile.label in page.words
    assert "layer 0 to 47 downwards, head 0 to 31 to the right" in page.words
    source = next(attrs["src"] for tag, attrs in page.elements if tag == "img")
    assert source is not None
    image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    shown = np.array(image.convert("RGB"))[2::5, 7::15]
    figure = run.figures["primary-sinks"][0]
    assert isinstance(figure, Heatmap)
    levels = colour.scale(figure.values).levels(figure.values)
    assert np.array_equal(shown, np.array(colour.ramp(light=True))[levels])


def test_repr_of_huge_maps_stays_small() -> None:
    run = factory.make()
    values = np.random.default_rng(0).random((300, 2000))
    run.figures["primary-sinks"][0] = replace(run.figures["primary-sinks"][0], values=values)
    assert len(run_repr_html(run.document, run.figures, run.tiles)) < 100_000


def test_repr_of_a_failed_check_is_not_bold() -> None:
    run = factory.make()
    run.document["checks"][0]["passed"] = False
    html = run_repr_html(run.document, run.figures, run.tiles)
    assert "Strong primary sink" not in html
    assert "Not trustworthy" in html
    assert "<strong" not in html
    bold = re.findall(r'style="[^"]*font-weight:600[^"]*">([^<]*)', html)
    assert bold == ["Attention received by position 0"]


def test_repr_without_a_map_says_so() -> None:
    run = factory.make()
    assert "No map of layers by heads in this run." in run_repr_html(run.document, {}, [])


@pytest.mark.parametrize("text", HOSTILE)
def test_repr_of_hostile_text_is_inert(text: str) -> None:
    run = poisoned(text)
    page = Page(run_repr_html(run.document, run.figures, run.tiles))
    assert {tag for tag, _ in page.elements} <= {"div", "span", "strong", "img"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_every_kind_of_figure_is_tried_here() -> None:
    assert {type(figure) for figure in FIGURES.values()} == set(get_args(Figure))


@pytest.mark.parametrize("name", FIGURES)
def test_drawing_changes_no_setting(name: str, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    drawn = draw(FIGURES[name])
    save_figure(FIGURES[name], tmp_path / "f.pdf")
    assert dict(mpl.rcParams) == before
    assert FIGURES[name].title in (drawn.axes[0].get_title(), drawn.get_suptitle())


def test_drawn_values_are_the_figures_values() -> None:
    drawn = draw(FIGURES["map"])
    image = drawn.axes[0].images[0].get_array()
    assert image is not None
    assert np.asarray(image) == pytest.approx(np.asarray(FIGURES["map"].values))  # pyright: ignore
    line = draw(FIGURES["lines"]).axes[0].lines[0]
    assert np.asarray(line.get_ydata())[[0, 1, 3, 4]].tolist() == [1, 2, 4, 5]
    assert draw(FIGURES["lines"]).axes[0].get_yscale() == "log"


@pytest.mark.parametrize(("kind", "magic"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_files_are_of_their_kind_and_reproducible(kind: str, magic: bytes, tmp_path: Path) -> None:
    first = save_figure(FIGURES["map"], tmp_path / f"a.{kind}")
    second = save_figure(FIGURES["map"], tmp_path / f"b.{kind}")
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot write a figure as '\.docx'") as caught:
        save_figure(FIGURES["map"], tmp_path / "a.docx")
    assert ".pdf, .svg, .png" in str(caught.value)


@pytest.mark.parametrize("name", FIGURES)
def test_interactive_figures_hold_title_caption_and_data(name: str) -> None:
    chart = interactive(FIGURES[name]).to_dict()
    assert chart["layout"]["title"]["text"] == FIGURES[name].title
    assert "Caption." in [note["text"] for note in chart["layout"]["annotations"]]
    assert chart["data"]


def test_interactive_text_is_escaped() -> None:
    figure = replace(FIGURES["map"], title="<b>x</b>", caption="<a href='javascript:1'>y</a>")
    layout = interactive(figure).to_dict()["layout"]
    assert "<" not in layout["title"]["text"] + layout["annotations"][0]["text"]
