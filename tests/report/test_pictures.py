"""Pictures in the report: the right cell in the right place, every number there, nothing leaves with `--no-text`."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sinklens.core.figures import PictureMap
from sinklens.core.pictures import CellGrid, PicturePage, PictureRef, Quantity
from sinklens.report import album, picture_bars, picture_marks, picture_places, pictures, render_report

from . import factory_pictures
from .parsed import Page

NUMBER = r"-?[\d.]+"


def unpacked(text: str, kind: str, shape: list[int]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)


def test_every_cell_travels_in_the_page() -> None:
    run, stored = factory_pictures.make(3)
    figure = factory_pictures.figure(run)
    data = Page(render_report(*run.args, pictures=stored)).data()["figures"]["visual-sinks--patches"]
    assert data["classes"] == ["sink", "dead", "alive"]
    for page, given in zip(data["pages"], figure.pages, strict=True):
        for grid, cells in zip(page["grids"], given.grids, strict=True):
            shape = list(cells.shape)
            assert tuple(grid["box"]) == cells.box
            assert np.array_equal(unpacked(grid["positions"], "<i4", shape), cells.positions)
            assert np.array_equal(unpacked(grid["classes"], "<i1", shape), np.asarray(cells.classes))
            values = unpacked(grid["values"], "<f4", [3, *shape])
            assert np.array_equal(values, cells.values.astype(np.float32), equal_nan=True)


def test_marks_stand_in_the_middle_of_their_cells() -> None:
    run, _ = factory_pictures.make(2, cells=7)
    figure = factory_pictures.figure(run)
    for page in figure.pages:
        (group,) = picture_places.groups(page)
        place = picture_places.frame(page, group, 264)
        for index in range(3):
            drawn = str(picture_marks.marks(place, group.grids, figure.classes, "n", only=index))
            (path,) = re.findall(r' d="([^"]*)"', drawn)
            starts = re.findall(rf"M({NUMBER}) ({NUMBER})", path)
            found = set()
            radius = float((re.findall(rf"a({NUMBER})", path) or re.findall(rf"l({NUMBER})", path) or [0])[0])
            shift = {0: (radius, 0.0), 1: (radius / 2, radius / 2), 2: (0.0, 0.0)}[index]
            grid = group.grids[0]
            left, top, right, bottom = grid.box
            for x, y in starts:
                px = (float(x) + shift[0]) / place.scale + place.left
                py = (float(y) + shift[1]) / place.scale + place.top
                col = (px - left) / (right - left) * grid.shape[1]
                row = (py - top) / (bottom - top) * grid.shape[0]
                assert abs(col % 1 - 0.5) < 0.05
                assert abs(row % 1 - 0.5) < 0.05
                found.add((int(row), int(col)))
            assert grid.classes is not None
            assert found == set(
                zip(*(axis.tolist() for axis in np.nonzero(grid.classes == index)), strict=True)
            )


def test_crop_and_padding_are_said_and_drawn_where_they_are() -> None:
    run, _ = factory_pictures.make(2)
    cropped, padded = factory_pictures.figure(run).pages
    (group,) = picture_places.groups(cropped)
    # 336 of 448 columns are seen.
    assert picture_places.notes(cropped, group) == [
        "Dimmed: 25.0 % of the picture lies outside the patches and is not seen here."
    ]
    (group,) = picture_places.groups(padded)
    # A square of 420 around a picture of 200 by 420.
    assert picture_places.notes(padded, group) == [
        "Hatched: 52.4 % of the patches' area is padding outside the picture."
    ]
    place = picture_places.frame(padded, group, 420)
    assert (place.left, place.top, place.width, place.height) == (-110, 0, 420, 420)
    assert place.box((0, 0, 200, 420)) == (110, 0, 200, 420)


def test_views_are_drawn_apart_and_tiles_together() -> None:
    run, _ = factory_pictures.make(3)
    page = factory_pictures.figure(run).pages[2]
    found = picture_places.groups(page)
    assert [group.title for group in found] == [
        "6 tiles of 8 × 8 patches",
        "The whole picture, small: 8 × 8 patches",
        "A finer look: 10 × 15 patches",
    ]
    assert found[0].places == (0, 1, 2, 3, 4, 5)
    assert picture_places.notes(page, found[2]) == ["5 cells have no token."]
    over = replace(page.grids[1], box=page.grids[0].box)
    apart = picture_places.groups(replace(page, grids=(page.grids[0], over)))
    assert [group.places for group in apart] == [(0,), (1,)]


def test_before_and_after_share_their_colours_and_others_do_not() -> None:
    run, _ = factory_pictures.make(1)
    found = pictures.scales(factory_pictures.figure(run))
    assert found["before"] == found["after"]
    assert found["phi"] != found["before"]


def test_one_copy_of_a_picture_for_all_findings() -> None:
    run, stored = factory_pictures.make(3)
    run.figures["visual-sinks"].append(replace(factory_pictures.figure(run), key="again"))
    html = render_report(*run.args, pictures=stored)
    assert len(re.findall(r'<image id="picture-\d+"', html)) == 3
    page = Page(html)
    uses = [str(attrs["href"]) for tag, attrs in page.elements if tag == "use"]
    assert {f"#picture-{i}" for i in range(3)} <= set(uses)


def test_tiny_pictures_keep_their_pixels_and_large_ones_are_shrunk() -> None:
    tiny = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    kind, body = album.data_uri(tiny).split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(body)))), tiny)
    large = factory_pictures.photo(1, 900, 600)
    kind, body = album.data_uri(large).split(",")
    assert kind == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert image.size == (448, 299)
    small = np.asarray(Image.fromarray(large).resize(image.size), dtype=float)
    assert np.abs(np.asarray(image.convert("RGB"), dtype=float) - small).mean() < 6


def test_everything_stands_in_the_page_without_scripts() -> None:
    run, stored = factory_pictures.make(3)
    page = Page(render_report(*run.args, pictures=stored))
    open_ = [
        attrs for tag, attrs in page.elements if tag == "details" and "picture" in str(attrs.get("class"))
    ]
    assert [("open" in attrs) for attrs in open_] == [True, False, False]
    assert page.words.count("Attention without sinks") >= 3
    for given in factory_pictures.figure(run).pages:
        assert given.sentence in page.words
        assert given.ref.name in page.words
    assert "hidden" not in {name for tag, attrs in page.elements if tag == "div" for name in attrs}


def test_legend_counts_the_cells() -> None:
    run, stored = factory_pictures.make(1)
    html = render_report(*run.args, pictures=stored)
    classes = factory_pictures.figure(run).pages[0].grids[0].classes
    assert classes is not None
    for index, name in enumerate(("sink", "dead", "alive")):
        assert f'<b>{name}</b> <span class="count">{(classes == index).sum()}</span>' in html


def test_without_text_no_picture_and_no_name_leaves() -> None:
    run, stored = factory_pictures.make(3)
    refs = [page.ref for page in factory_pictures.figure(run).pages]
    for prompt, ref in zip(run.prompts, refs, strict=True):
        prompt["source"] = f"photos/{ref.name}"
        prompt["spans"] = {"pictures": [{"name": ref.name, "sha256": ref.sha256}]}
    run.document["findings"]["visual-sinks"]["notes"] = ["Largest in padded.jpg."]
    run.document["manifest"]["command"] += ["--images", "photos/padded.jpg"]
    html = render_report(*run.args, pictures=stored, include_text=False)
    assert "<image id=" not in html
    assert "data:image/webp" not in html
    for ref in refs:
        assert ref.name not in html
        assert ref.name.replace("<", "&lt;").replace(">", "&gt;") not in html
        assert ref.sha256[:12] in html
    assert "The picture is left out of this report; its hash identifies it." in html
    assert f"Largest in picture {refs[1].sha256[:12]}." in html
    assert "photos/padded.jpg" not in html


def test_short_names_do_not_eat_words() -> None:
    run, stored = factory_pictures.make(1)
    figure = factory_pictures.figure(run)
    ref = replace(figure.pages[0].ref, name="a")
    run.figures["visual-sinks"] = [replace(figure, pages=(replace(figure.pages[0], ref=ref),))]
    run.prompts[0]["spans"] = {"pictures": [{"name": "a", "sha256": ref.sha256}]}
    run.document["findings"]["visual-sinks"]["rows"] = [{"picture": "a"}]
    page = Page(render_report(*run.args, pictures=stored, include_text=False))
    assert "Attention sticks to" in page.words
    assert page.data()["document"]["findings"]["visual-sinks"]["rows"] == [
        {"picture": f"picture {ref.sha256[:12]}"}
    ]


def test_a_picture_without_a_copy_says_so() -> None:
    run, _ = factory_pictures.make(1)
    page = Page(render_report(*run.args, pictures={}))
    assert "The report holds no copy of this picture; its hash identifies it." in page.words


def test_no_pages_is_a_sentence() -> None:
    run, _ = factory_pictures.make(1)
    run.figures["visual-sinks"] = [replace(factory_pictures.figure(run), pages=())]
    assert "There are no pictures to draw." in Page(render_report(*run.args)).words


@pytest.mark.parametrize("threshold", [20.0, 0.5, 1e-3, -2.0, 40.0])
def test_histogram_parts_at_the_threshold(threshold: float) -> None:
    values = np.random.default_rng(1).gamma(2.0, 4.0, (9, 11))
    grid = CellGrid("whole", (0, 0, 1, 1), np.arange(99).reshape(9, 11), values[None])
    quantity = Quantity("phi", "φ", "ratio", threshold=threshold, threshold_label="τ")
    svg = str(picture_bars.histogram([grid], 0, quantity))
    edges = picture_bars._edges(values.ravel(), threshold)
    assert np.isclose(edges, threshold, atol=1e-12).any()
    counts, _ = np.histogram(values, edges)
    assert counts.sum() == 99
    reached = int((values >= threshold).sum())
    assert f"{reached} of 99 patches reach{'es' * (reached == 1)} τ = " in svg
    assert svg.count('class="above"') == (counts[edges[:-1] >= threshold - 1e-12] > 0).sum()


def test_parts_of_a_whole_have_the_lengths_of_their_numbers() -> None:
    svg = str(picture_bars.parts((("a", 0.5), ("b", 0.25), ("c", float("nan"))), "share", "Where it goes"))
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert "50.0 %" in svg
    assert ">c<" not in svg


def big(n: int, side: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Pictures of `side` by `side` patches, each with its own photo."""
    run, stored = factory_pictures.make(1)
    figure, pages = factory_pictures.figure(run), []
    for i in range(n):
        grids = (factory_pictures.grid(i, "whole", (0, 0, 640, 480), (side, side), 0),)
        page, found = factory_pictures.picture(i, i, 640, 480, grids, f"{i}.jpg")
        pages.append(page)
        stored |= found
    whole = replace(figure, pages=tuple(pages))
    run.figures["visual-sinks"] = [whole, replace(whole, key="b"), replace(whole, key="c")]
    return run, stored


def test_a_large_vision_report_stays_small_and_says_what_it_leaves_out() -> None:
    run, stored = big(40, 54)
    html = render_report(*run.args, pictures=stored)
    assert len(html.encode()) < 15_000_000
    assert "The first 32 of 40 pictures are drawn." in html


def test_nothing_left_to_draw_is_not_silent() -> None:
    small = album.Album({})
    small.values_left = 10
    run, _ = factory_pictures.make(1)
    assert pictures.draw(factory_pictures.figure(run), "x", small)[2] == (
        "There is no room for these pictures in the report.",
    )


def test_pictures_of_one_pixel_and_of_constant_values() -> None:
    ref = PictureRef(0, 0, "", 1, 1, "a" * 64)
    grid = CellGrid("whole", (0.0, 0.0, 1.0, 1.0), np.zeros((1, 1), int), np.full((1, 1, 1), np.nan))
    figure = PictureMap("x", "X", "", (PicturePage(ref, (grid,)),), (Quantity("a", "A", "share"),))
    _, pages, _ = pictures.draw(figure, "x", album.Album({}))
    assert [panel.title for panel in pages[0].groups[0].panels] == ["A"]
    assert "A: no values." in pages[0].groups[0].spoken
