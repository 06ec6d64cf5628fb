"""The Mitigations section of a real run in a real browser, without a network: read, reached and drawn by everybody."""

from __future__ import annotations

import re

import pytest

import sinklens as sl

from .chromium import Browser
from .test_access import CHECKS, axe_violations

pytestmark = pytest.mark.slow
METHODS = (
    "expert-pruning",
    "fake-quantisation:weights=4:experts=4:weights-by=tensor:protect=found",
    "act:threshold=0.9999",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Methods that act, with controls, and one that does not."""
    run = sl.mitigate("bundled:moe-ind", METHODS, tasks="ppl", n=4, n_items=12, controls=1)
    return run.report(tmp_path_factory.mktemp("page") / "report.html").read_text(encoding="utf-8")


def themed(page: str, theme: str) -> str:
    return page.replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">', 1)


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_there_and_nothing_overflows(browser: Browser, page: str, width: int) -> None:
    driver = """
    const section = document.getElementById("mitigations");
    section.scrollIntoView();
    answer.linked = document.querySelectorAll('nav a[href="#mitigations"]').length;
    answer.heads = Array.from(section.querySelectorAll("h3"), (h) => h.textContent);
    answer.text = section.textContent;
    answer.maps = section.querySelectorAll("svg.heat").length;
    const rowsOf = (table) => table.querySelectorAll("tbody tr").length;
    answer.rows = Array.from(section.querySelectorAll("table"), rowsOf);
    answer.wide = document.documentElement.scrollWidth - innerWidth;
    const clipped = (svg) => { const box = svg.getBoundingClientRect(); return Array.from(svg.querySelectorAll("text"))
      .filter((t) => t.getBoundingClientRect().left < box.left - 1).map((t) => t.textContent); };
    answer.clipped = Array.from(section.querySelectorAll("svg.intervals")).flatMap(clipped);
    answer.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
    """
    answer = browser.run(page, driver, width=width)
    assert answer["troubles"] == []
    assert answer["linked"] >= 1
    assert answer["wide"] <= 0
    assert answer["clipped"] == []
    assert answer["fetched"] == []
    assert answer["maps"] == 1 + 2 + 3  # unchanged, two that act, their controls
    # Two that act: three metrics each; text sinks and the rest, of each; the same by layer.
    assert answer["rows"] == [2 * 3, 2 * 2, 2 * 2 * 4]
    assert any(head.startswith("expert-pruning:experts=found: harmful") for head in answer["heads"])
    assert "% of the sink is lost" in answer["text"]
    assert "control (layer-matched)" in answer["text"]
    assert "Nothing was compared" in answer["text"]


def test_values_under_the_pointer_are_those_of_the_maps(browser: Browser, page: str) -> None:
    driver = """
    const svg = document.querySelector("#mitigations svg.heat");
    svg.scrollIntoView();
    const [px, py, w, h] = svg.dataset.plot.split(" ").map(Number);
    const at = new DOMPoint(px + 0.1 * w, py + 0.99 * h).matrixTransform(svg.getScreenCTM());
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y, bubbles: true }));
    answer.cell = svg.closest("figure").querySelector("output.readout").textContent;
    """
    answer = browser.run(page, driver)
    assert answer["troubles"] == []
    assert re.match(r"layer 3, head 0: 0\.\d+ share", answer["cell"])


def test_it_is_complete_without_scripts(page: str) -> None:
    still = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    section = still[still.index('id="mitigations"') :]
    section = section[: section.index("</section>")]
    for said in (
        "expert-pruning:experts=found: harmful",
        "control (random)",
        "% of the sink is lost",
        "<table",
    ):
        assert said in section
    assert section.count("<svg") >= 7
    assert not re.search(r"""(src|href)=["']https?:|url\(https?:""", section)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everybody_can_read_and_reach_it(browser: Browser, page: str, theme: str) -> None:
    answer = browser.run(themed(page, theme), CHECKS)
    assert answer["troubles"] == []
    for kind in ("faint", "nameless", "undrawn", "bare", "twice", "dangling", "outside"):
        assert answer[kind] == [], kind
    assert answer["skipped"] == 0


def test_axe_finds_nothing(browser: Browser, page: str) -> None:
    assert axe_violations(browser, page) == []
