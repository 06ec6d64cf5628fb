"""Pages of the bundled checkpoints in a real browser: complete at first sight, quiet, printable, readable again.

With SINKLENS_SCREENSHOTS naming a folder, screens of every page in both sizes and themes, and prints, are kept there
to be looked at; without it two screens stand for all.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sinklens as sl

from . import real
from .chromium import Browser

pytestmark = pytest.mark.slow

WHOLE = """
const urls = performance.getEntriesByType("resource").map((entry) => entry.name);
answer.loaded = urls.filter((url) => !url.startsWith("data:"));
answer.wide = document.documentElement.scrollWidth - innerWidth;
answer.scripted = document.documentElement.className;
const seen = (node) => node && node.checkVisibility() && node.getBoundingClientRect().bottom <= 800;
const text = document.body.innerText;
answer.first = {
  sink: seen(document.querySelector(".says .sentence")),
  where: seen(document.querySelector("#map svg.heat")),
  causes: Array.from(document.querySelectorAll(".lines li"), (li) => seen(li) && li.dataset.finding).filter(Boolean),
  norms: seen(document.querySelector("#norms svg")),
  trust: seen(document.querySelector(".verdict .trust .line")),
  tiles: Array.from(document.querySelectorAll(".first .tile")).filter(seen).length,
  strip: seen(document.querySelector("#strip svg")),
};
answer.headView = Boolean(document.querySelector("#head-view")?.checkVisibility());
HTMLAnchorElement.prototype.click = function () { answer.saved = (answer.saved || 0) + 1; };
for (const button of document.querySelectorAll("[data-values], [data-json], [data-csv]")) button.click();
answer.buttons = document.querySelectorAll("[data-values], [data-json], [data-csv]").length;
"""


def kept(tmp_path: Path) -> Path:
    return Path(os.environ.get("SINKLENS_SCREENSHOTS") or tmp_path)


SCREENS = [
    (name, *size, theme)
    for name in ("dense-ind", "moe-ind", "vlm-shapes", "comparison", "mitigations")
    for size in ((1280, 800), (390, 844))
    for theme in ("light", "dark")
]
FEW = [(name, 1280, 800, theme) for name, theme in (("moe-ind", "light"), ("comparison", "dark"))]


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 1280) for name in real.NAMES), ("moe-ind", 390), ("comparison", 390)]
)
def test_nothing_is_loaded_fails_or_overflows(browser: Browser, name: str, width: int) -> None:
    answer = browser.run(real.html(name), WHOLE, width=width)
    assert answer["troubles"] == []
    assert answer["loaded"] == []
    assert answer["scripted"] == "scripted"
    assert answer["wide"] <= 0
    assert answer["saved"] == answer["buttons"] > 0
    assert not answer["headView"]


@pytest.mark.parametrize("name", ["dense-ind", "moe-ind", "vlm-shapes"])
def test_the_first_screen_answers_the_questions(browser: Browser, name: str) -> None:
    first = browser.run(real.html(name), WHOLE)["first"]
    assert all(first[part] for part in ("sink", "where", "norms", "trust"))
    assert first["tiles"] == 6
    found = set(first["causes"])
    wanted = {"massive-activations", "head-roles"}  # what makes it, which heads rest on it
    wanted |= {"visual-sinks", "visual-tokens"} if name == "vlm-shapes" else {"secondary-sinks", "writers"}
    wanted |= {"causal-effects"} if real.ANALYZERS[name]["verify"] else set()  # what happens without it
    assert wanted <= found
    if "sensitivity" in real.ANALYZERS[name]:  # structural, or a matter of the prompts
        assert first["strip"]
        assert "sensitivity" in found


@pytest.mark.parametrize(
    ("name", "width", "height", "theme"), SCREENS if os.environ.get("SINKLENS_SCREENSHOTS") else FEW
)
def test_screens(browser: Browser, name: str, width: int, height: int, theme: str, tmp_path: Path) -> None:
    target = kept(tmp_path) / f"{name}-{theme}-{width}x{height}.png"
    taken = browser.screenshot(real.themed(name, theme), target, width, height)
    pixels = np.asarray(Image.open(taken).convert("L"), dtype=int)
    assert pixels.shape == (height, width)
    ground = np.median(pixels)
    assert ground > 200 if theme == "light" else ground < 60
    assert (np.abs(pixels - ground) > 90).mean() > 0.01, "there is something on it"


@pytest.mark.parametrize("name", ["dense-ind", "moe-ind", "vlm-shapes", "comparison", "dynamics"])
def test_print_is_three_pages_at_most(browser: Browser, name: str, tmp_path: Path) -> None:
    printed = browser.pdf(real.html(name), kept(tmp_path) / f"{name}.pdf").read_bytes()
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", printed)) <= 3


@pytest.mark.parametrize("name", ["dense-ind", "moe-ind", "vlm-shapes"])
def test_a_report_is_read_again(name: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(real.html(name), encoding="utf-8")
    assert sl.load(path) == json.loads(json.dumps(real.run(name).document))
    limit = 15_000_000 if name == "vlm-shapes" else 8_000_000
    assert path.stat().st_size <= limit
