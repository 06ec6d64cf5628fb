"""Pictures in a real browser: keys and pointer reach every patch, pages turn, maps flip, nothing is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sinklens.report import numbers, render_report

from . import factory_pictures
from .chromium import Browser

pytestmark = pytest.mark.slow

PRESS = """
const album = document.querySelector(".album");
const panels = () => Array.from(album.querySelectorAll("details[open] .panels[data-group]"));
const said = (group = 0) => panels()[group].parentElement.querySelector("output.readout").textContent;
const press = (key, group = 0) =>
  panels()[group].dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
"""


def page(n: int = 3, **options: int) -> tuple[str, factory_pictures.PictureMap]:
    run, stored = factory_pictures.make(n, **options)
    return render_report(*run.args, pictures=stored), factory_pictures.figure(run)


def spoken(
    figure: factory_pictures.PictureMap, place: int, grid: int, row: int, col: int, tile: str = ""
) -> str:
    cells = figure.pages[place].grids[grid]
    words = [f"{tile}row {row}, column {col}", f"token {cells.positions[row, col]}"]
    for quantity, values in zip(figure.quantities, cells.values, strict=True):
        value = float(np.float32(values[row, col]))
        shown = "no value" if np.isnan(value) else f"{numbers.number(value)} {quantity.unit}"
        words.append(f"{quantity.title} {shown}")
    assert cells.classes is not None
    kind = int(cells.classes[row, col])
    return " · ".join([*words, figure.classes[kind].name] if kind >= 0 else words)


def test_arrow_keys_read_out_every_number_of_a_patch(browser: Browser) -> None:
    html, figure = page()
    driver = """
    panels()[0].focus();
    answer.start = said();
    press("ArrowRight"); press("ArrowRight"); press("ArrowDown"); answer.moved = said();
    press("End"); answer.end = said(); press("ArrowRight"); answer.stays = said();
    press("Home"); answer.home = said(); press("ArrowUp"); press("ArrowUp"); answer.top = said();
    answer.cursors = album.querySelectorAll("details[open] .panels[data-group] .cursor").length;
    answer.live = panels()[0].parentElement.querySelector("output").tagName;
    answer.hash = location.hash;
    """
    answer = browser.run(html, PRESS + driver)
    assert answer["troubles"] == []
    assert answer["start"] == spoken(figure, 0, 0, 0, 0)
    assert answer["moved"] == spoken(figure, 0, 0, 1, 2)
    assert answer["end"] == answer["stays"] == spoken(figure, 0, 0, 1, 23)
    assert answer["home"] == spoken(figure, 0, 0, 1, 0)
    assert answer["top"] == spoken(figure, 0, 0, 0, 0)
    assert answer["cursors"] == 4  # the classes and three maps
    assert answer["live"] == "OUTPUT"
    assert answer["hash"] == ""


def test_sinks_are_visited_one_after_the_other(browser: Browser) -> None:
    html, figure = page(1, cells=7)
    classes = figure.pages[0].grids[0].classes
    assert classes is not None
    sinks = [(int(r), int(c)) for r, c in np.argwhere(classes == 0)]
    driver = f"""
    answer.said = [];
    for (let i = 0; i < {len(sinks) + 1}; i += 1) {{ press("s"); answer.said.push(said()); }}
    press("S"); answer.back = said();
    """
    answer = browser.run(html, PRESS + driver)
    expected = [spoken(figure, 0, 0, *place) for place in [*sinks, sinks[0]]]
    assert answer["said"] == expected
    assert answer["back"] == expected[-2]


def test_arrows_cross_from_tile_to_tile(browser: Browser) -> None:
    html, figure = page(3)
    driver = """
    press("PageDown"); press("PageDown");
    press("ArrowDown"); press("End"); answer.before = said(); press("ArrowRight"); answer.after = said();
    for (let i = 0; i < 8; i += 1) press("ArrowDown");
    answer.below = said();
    press("ArrowDown", 2); press("ArrowLeft", 2); answer.detail = said(2);
    for (let i = 0; i < 20; i += 1) { press("ArrowDown", 2); press("ArrowRight", 2); }
    answer.empty = said(2);
    """
    answer = browser.run(html, PRESS + driver)
    assert answer["troubles"] == []
    assert answer["before"] == spoken(figure, 2, 0, 1, 7, "tile 0, ")
    assert answer["after"] == spoken(figure, 2, 1, 1, 0, "tile 1, ")
    assert answer["below"] == spoken(figure, 2, 4, 1, 0, "tile 4, ")
    assert answer["detail"] == spoken(figure, 2, 7, 0, 0)
    assert answer["empty"] == "row 9, column 14 · no token"


def test_the_pointer_finds_the_same_patches_as_the_keys(browser: Browser) -> None:
    html, figure = page(2)
    driver = """
    press("PageDown");
    const svg = panels()[0].querySelectorAll("svg.patches")[2];
    const [x0, y0, scale] = svg.dataset.frame.split(" ").map(Number);
    const over = (x, y) => {
      const at = new DOMPoint(1 + (x - x0) * scale, 1 + (y - y0) * scale).matrixTransform(svg.getScreenCTM());
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y, bubbles: true }));
      return said();
    };
    answer.padding = over(-100, 10);
    answer.inside = over(100, 210);
    const tip = album.querySelector(".tip");
    answer.tip = tip.textContent; answer.shown = !tip.hidden;
    svg.dispatchEvent(new PointerEvent("pointerleave", {}));
    answer.gone = tip.hidden;
    """
    answer = browser.run(html, PRESS + driver)
    assert answer["troubles"] == []
    # A square of 420 px in 12 by 12 cells that begins at -110.
    assert answer["padding"] == spoken(figure, 1, 0, 0, 0)
    assert answer["inside"] == answer["tip"] == spoken(figure, 1, 0, 6, 6)
    assert answer["shown"] is True
    assert answer["gone"] is True


def test_pages_turn_and_maps_flip_in_place(browser: Browser) -> None:
    html, _ = page(4)
    driver = """
    const where = () => album.querySelector(".where").textContent;
    const all = Array.from(album.querySelectorAll("details"));
    const visible = () => all.filter((d) => d.getBoundingClientRect().height > 0).length;
    answer.visible = [visible()];
    answer.where = [where()];
    const next = album.querySelector(".on");
    next.click(); next.click(); next.click(); answer.where.push(where()); answer.last = next.disabled;
    answer.visible.push(visible());
    album.querySelector(".back").click(); answer.where.push(where());
    press("PageUp"); answer.where.push(where());
    answer.focus = document.activeElement === panels()[0];
    const maps = () => Array.from(panels()[0].querySelectorAll(".panel")).filter((p) => !p.hidden);
    const shown = () => maps().map((p) => p.querySelector(".panel-title").textContent);
    const buttons = album.querySelectorAll("details[open] .flip button");
    answer.flips = Array.from(buttons, (b) => { b.click(); return shown(); });
    answer.pressed = Array.from(buttons, (b) => b.getAttribute("aria-pressed"));
    buttons[0].click(); answer.both = shown();
    const strength = album.querySelector(".strength");
    strength.value = 20; strength.dispatchEvent(new Event("input"));
    answer.strength = getComputedStyle(album.querySelector("details[open] .over")).opacity;
    """
    answer = browser.run(html, PRESS + driver)
    assert answer["troubles"] == []
    assert answer["where"] == ["Picture 1 of 4", "Picture 4 of 4", "Picture 3 of 4", "Picture 2 of 4"]
    assert answer["last"] is True
    assert answer["visible"] == [1, 1]
    assert answer["focus"] is True
    both = ["Classes", "Attention", "Attention without sinks", "φ"]
    assert answer["flips"] == [
        both,
        ["Classes", "Attention", "φ"],
        ["Classes", "Attention without sinks", "φ"],
    ]
    assert answer["pressed"] == ["false", "false", "true"]
    assert answer["both"] == both
    assert answer["strength"] == "0.2"


def test_values_are_downloaded_as_they_are(browser: Browser) -> None:
    html, figure = page(1, cells=5)
    driver = """
    let text = null;
    const Real = Blob;
    window.Blob = function (parts, options) { text = parts[0]; return new Real(parts, options); };
    HTMLAnchorElement.prototype.click = () => {};
    album.querySelector("[data-values]").click();
    answer.rows = text.trim().split("\\r\\n");
    """
    rows = browser.run(html, PRESS + driver)["rows"]
    assert rows[0].split(",")[:8] == ["prompt", "picture", "view", "grid", "row", "column", "token", "class"]
    assert len(rows) == 26
    cells = figure.pages[0].grids[0]
    for line in rows[1:]:
        prompt, picture, view, grid, row, col, token, _, before, after, phi = line.split(",")
        assert (prompt, picture, view, grid) == ("0", "0", "whole", "0")
        values = cells.values[:, int(row), int(col)].astype(np.float32)
        assert int(token) == cells.positions[int(row), int(col)]
        assert [np.float32(x) if x else np.float32(np.nan) for x in (before, after, phi)] == pytest.approx(
            values, nan_ok=True
        )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_loaded_and_nothing_overflows(browser: Browser, width: int, theme: str) -> None:
    html, _ = page(3)
    html = html.replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">', 1)
    driver = """
    const urls = performance.getEntriesByType("resource").map((entry) => entry.name);
    answer.loaded = urls.filter((url) => !url.startsWith("data:"));
    answer.wide = [];
    for (let i = 0; i < 3; i += 1) {
      answer.wide.push(document.documentElement.scrollWidth - innerWidth);
      album.querySelector(".on").click();
    }
    const size = album.querySelector("details[open] svg.patches").getBoundingClientRect();
    answer.sides = size.width / size.height;
    """
    answer = browser.run(html, PRESS + driver, width=width)
    assert answer["troubles"] == []
    assert answer["loaded"] == []
    assert max(answer["wide"]) <= 0
    # 600 by 400 px and a colour bar only on maps: the classes stand first.
    assert answer["sides"] == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_screens_show_the_picture(browser: Browser, width: int, height: int, tmp_path: Path) -> None:
    html, _ = page(2, cells=6)
    alone = "header, .first, main > section:not(#visual-sinks) { display: none }"
    html = html.replace("</style>", f"{alone}</style>", 1)
    folder = Path(os.environ.get("SINKLENS_SCREENSHOTS") or tmp_path)
    taken = browser.screenshot(html, folder / f"pictures-{width}x{height}.png", width, height)
    pixels = np.asarray(Image.open(taken).convert("RGB"), dtype=int)
    assert pixels.shape == (height, width, 3)
    # On the classes' panel the disc has its own colour, and the red corner, cut off, is veiled to 28 %.
    for colour in ((250, 215, 60), (242, 195, 195)):
        near = np.abs(pixels - np.array(colour)).max(-1) < 24
        assert near.sum() > 40, colour


def test_print_is_three_pages_at_most_and_has_the_picture(browser: Browser, tmp_path: Path) -> None:
    run, stored = factory_pictures.make(12)
    folder = Path(os.environ.get("SINKLENS_SCREENSHOTS") or tmp_path)
    printed = browser.pdf(render_report(*run.args, pictures=stored), folder / "pictures.pdf").read_bytes()
    bare = browser.pdf(render_report(*run.args, pictures={}), tmp_path / "bare.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= 3
    assert printed.count(b"/Subtype /Image") > bare.count(b"/Subtype /Image"), "the picture itself is printed"
