"""From a map's cell to its head, the tokens of a prompt and the prompt: with the mouse, with keys, and by address."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sinklens as sl
from sinklens.core.head_strip import HeadStrip
from sinklens.pipeline.head_strips import MOST_PROMPTS, head_strips
from sinklens.report import numbers, render_report

from . import factory
from .chromium import Browser

pytestmark = pytest.mark.slow

VIEW = """
const view = document.getElementById("head-view");
const strip = view.querySelector(".strip");
const press = (key, node = document.body) =>
  node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const said = () => view.querySelector("output").textContent;
const title = () => view.querySelector(".title").textContent;
const cell = (svg, x, y) => {
  const [px, py, w, h] = svg.dataset.plot.split(" ").map(Number);
  const at = new DOMPoint(px + x * w, py + y * h).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new MouseEvent("click", { clientX: at.x, clientY: at.y, bubbles: true }));
};
"""


def strips(run: factory.Run, layers: int, heads: int) -> list[HeadStrip]:
    """Two prompts with positions that are not all of them."""
    rng = np.random.default_rng(3)
    kept = (np.array([0, 1, 2, 5, 9]), np.array([0, 4, 11]))
    return [
        HeadStrip(place, positions, rng.random((layers, heads, len(positions))).astype(np.float32))
        for place, positions in zip((0, 2), kept, strict=True)
    ]


def page(**options: Any) -> tuple[str, list[HeadStrip], factory.Run]:
    run = factory.make(layers=5, heads=3, experts=7, n_prompts=3, seq_len=17)
    held = strips(run, 5, 3)
    return render_report(*run.args, heads=held, **options), held, run


def value(strip: HeadStrip, layer: int, head: int, position: int) -> str:
    place = strip.positions.tolist().index(position)
    return numbers.number(float(strip.received[layer, head, place]))


def test_a_click_opens_the_head_and_its_tokens_lead_to_the_prompt(browser: Browser) -> None:
    html, held, run = page()
    driver = """
    answer.before = !view.checkVisibility();
    cell(document.querySelector("#map svg.heat"), 0.99, 0.5);
    answer.title = title(); answer.hidden = !view.checkVisibility(); answer.hash = location.hash;
    answer.facts = Array.from(view.querySelectorAll(".of-head dd"), (node) => node.textContent);
    answer.tokens = strip.querySelectorAll(".token").length;
    answer.unknown = strip.querySelectorAll(".unknown").length;
    answer.heights = Array.from(strip.querySelectorAll(".token:not(.unknown) i"),
      (bar) => parseFloat(bar.style.height));
    strip.querySelector('[data-position="5"]').click(); answer.said = said(); answer.with = location.hash;
    strip.querySelector('[data-position="3"]').click(); answer.unkept = said();
    strip.querySelector('[data-position="5"]').click();
    view.querySelector(".to-prompt").click();
    answer.now = document.querySelector('.tokens[data-prompt="0"] .now').textContent;
    answer.open = document.querySelector('.tokens[data-prompt="0"]').closest("details").open;
    view.querySelector(".close").click(); answer.closed = !view.checkVisibility(); answer.after = location.hash;
    """
    answer = browser.run(html, VIEW + driver)
    assert answer["troubles"] == []
    assert (answer["before"], answer["hidden"], answer["closed"]) == (True, False, True)
    assert (answer["title"], answer["hash"]) == ("Layer 2, head 2", "#L2H2P0")
    share = np.asarray(run.figures["primary-sinks"][0].values, np.float32)  # pyright: ignore
    assert f"{numbers.number(float(share[2, 2]))} share" in answer["facts"]
    assert (answer["tokens"], answer["unknown"]) == (17, 12)
    assert np.allclose(answer["heights"], 28 * held[0].received[2, 2], atol=0.01)
    piece = run.prompts[0]["pieces"][5].replace(" ", "·").replace("\n", "↵")
    assert (
        answer["said"] == f"Position 5, {piece}: receives {value(held[0], 2, 2, 5)} of this head's attention."
    )
    assert answer["unkept"].endswith("not among the positions kept.")
    assert answer["with"] == "#L2H2P0T5"
    assert answer["now"] == piece
    assert answer["open"] is True
    assert answer["after"] == "#L2H2"


def test_keys_go_all_the_way(browser: Browser) -> None:
    html, held, _ = page()
    driver = """
    press("Enter"); answer.nothing = view.hidden;
    press("j"); press("l"); press("l"); press("Enter");
    answer.title = title(); answer.hash = location.hash;
    press("j"); answer.follows = title(); answer.moved = location.hash;
    strip.focus();
    press("ArrowRight", strip); press("ArrowRight", strip); answer.second = said();
    press("End", strip); answer.end = location.hash; press("Home", strip); answer.home = location.hash;
    press("s", strip); answer.strongest = said();
    press("PageDown", strip); answer.other = location.hash;
    answer.chosen = view.querySelector("select").value;
    press("s", strip); answer.there = said();
    press("Enter", strip);
    answer.now = document.querySelectorAll('.tokens[data-prompt="2"] .now').length;
    press("Escape"); answer.closed = view.hidden; answer.after = location.hash;
    """
    answer = browser.run(html, VIEW + driver)
    assert answer["troubles"] == []
    assert answer["nothing"] is True
    assert (answer["title"], answer["hash"]) == ("Layer 0, head 2", "#L0H2P0")
    assert (answer["follows"], answer["moved"]) == ("Layer 1, head 2", "#L1H2P0")
    assert f"receives {value(held[0], 1, 2, 1)} of" in answer["second"]
    assert (answer["end"], answer["home"]) == ("#L1H2P0T16", "#L1H2P0T0")
    order = held[0].positions[np.argsort(-held[0].received[1, 2])].tolist()
    after = order[(order.index(0) + 1) % len(order)]
    assert answer["strongest"].startswith(f"Position {after}, ")
    assert (answer["other"], answer["chosen"]) == ("#L1H2P2", "2")
    best = int(held[1].positions[held[1].received[1, 2].argmax()])
    assert answer["there"].startswith(f"Position {best}, ")
    assert answer["now"] == 1
    assert (answer["closed"], answer["after"]) == (True, "#L1H2")


@pytest.mark.parametrize(
    ("address", "title", "begin"),
    [
        ("#L3H1P2T11", "Layer 3, head 1", "Position 11, "),
        ("#L4H0P0", "Layer 4, head 0", "Point at a token"),
        ("#L4H0P1T3", "Layer 4, head 0", "Position 3, "),  # a prompt without a strip: the first that has one
        ("#L99H99P0T99", "Layer 4, head 2", "Point at a token"),
    ],
)
def test_an_address_restores_it(browser: Browser, address: str, title: str, begin: str) -> None:
    html, held, _ = page()
    answer = browser.run(html, VIEW + "answer.view = [view.hidden, title(), said()];", address=address)
    assert answer["troubles"] == []
    assert answer["view"][:2] == [False, title]
    assert answer["view"][2].startswith(begin)
    if address == "#L3H1P2T11":
        assert f"receives {value(held[1], 3, 1, 11)} of" in answer["view"][2]


def test_without_text_positions_stand_for_tokens(browser: Browser) -> None:
    html, _, _ = page(include_text=False)
    driver = 'answer.said = said(); answer.link = view.querySelector(".to-prompt").hidden;'
    answer = browser.run(html, VIEW + driver, address="#L1H1P0T5")
    assert answer["troubles"] == []
    assert answer["said"].startswith("Position 5, 5: receives ")
    assert answer["link"] is True


def test_a_run_brings_its_strips(browser: Browser, tmp_path: Any) -> None:
    run = sl.profile("bundled:dense-ind", n=10, analyzers=["primary-sinks"], verify=False)
    found = head_strips(run.trace)
    assert len(found) == MOST_PROMPTS
    record = run.trace.records[1]
    assert np.array_equal(found[1].received, record["attention_received"])
    html = run.report(tmp_path / "report.html").read_text(encoding="utf-8")
    answer = browser.run(html, VIEW + "answer.said = said();", address="#L1H1P1T0")
    received = float(record["attention_received"][1, 1, record["kept_positions"].tolist().index(0)])
    assert f"receives {numbers.number(received)} of" in answer["said"]
