"""The page in a real browser, without a network: no errors, and its script does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sinklens.report
from sinklens.core.figures import Samples
from sinklens.report import numbers, render_report

from . import factory, factory_chain
from .chromium import Browser
from .parsed import HOSTILE, poisoned

pytestmark = pytest.mark.slow
STATIC = Path(sinklens.report.__file__).parent / "static"


@pytest.fixture
def run() -> factory.Run:
    return factory.make(layers=5, heads=3, experts=7, n_prompts=3, seq_len=700)


def test_slider_recounts_the_rate(browser: Browser, run: factory.Run) -> None:
    driver = """
    const slider = document.querySelector(".slider");
    const input = slider.querySelector("input");
    const say = () => slider.querySelector(".at").textContent;
    answer.first = say();
    answer.at = {};
    for (const index of [0, 40, 70, Number(input.max)]) {
      input.value = index;
      input.dispatchEvent(new Event("input"));
      answer.at[index] = say();
    }
    const map = slider.closest("figure").querySelector("svg.heat");
    answer.cells = Array.from(map.querySelectorAll(".cells path"), (p) => p.getAttribute("d").split("M").length - 1);
    slider.querySelector(".reset").click();
    answer.last = say();
    """
    answer = browser.run(render_report(*run.args), driver)
    assert answer["troubles"] == []
    figure = run.figures["primary-sinks"][1]
    assert isinstance(figure, Samples)
    grid = sinklens.report.samples.thresholds(figure.values, 0.3)  # pyright: ignore
    for index, sentence in answer["at"].items():
        threshold = grid[int(index)]
        rate = numbers.percent(100 * float(np.mean(figure.values > threshold)))
        assert sentence == f"At threshold {numbers.brief(float(threshold))} the rate is {rate} %."
    assert sum(answer["cells"]) == 15
    assert answer["first"] == answer["last"]
    assert "0.3" in answer["first"]


def test_keys_and_addresses_move_the_cursor(browser: Browser, run: factory.Run) -> None:
    driver = """
    const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    const out = document.querySelector("output[data-main]");
    answer.start = out.textContent;
    press("j"); press("l"); answer.moved = out.textContent; answer.hash = location.hash;
    for (let i = 0; i < 9; i += 1) press("k");
    answer.top = out.textContent;
    press("?"); answer.help = document.getElementById("help").open; document.getElementById("help").close();
    press("/"); answer.focused = document.activeElement.id;
    const before = getComputedStyle(document.body).backgroundColor;
    document.activeElement.blur(); press("t");
    answer.turned = before !== getComputedStyle(document.body).backgroundColor;
    answer.rings = document.querySelectorAll("svg[data-linked] .cursor").length;
    """
    answer = browser.run(render_report(*run.args), driver, address="#L2H1")
    assert answer["troubles"] == []
    share = np.asarray(run.figures["primary-sinks"][0].values, np.float32)  # pyright: ignore
    assert answer["start"] == f"layer 2, head 1: {numbers.number(float(share[2, 1]))} share"
    assert answer["moved"] == f"layer 3, head 2: {numbers.number(float(share[3, 2]))} share"
    assert answer["hash"] == "#L3H2"
    assert answer["top"].startswith("layer 0, head 2")
    assert answer["help"] is True
    assert answer["focused"] == "find"
    assert answer["turned"] is True
    assert answer["rings"] == 3


def test_values_under_the_pointer(browser: Browser, run: factory.Run) -> None:
    driver = """
    const point = (svg, x, y) => {
      const [px, py, w, h] = svg.dataset.plot.split(" ").map(Number);
      const at = new DOMPoint(px + x * w, py + y * h).matrixTransform(svg.getScreenCTM());
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y, bubbles: true }));
      return svg.closest("figure").querySelector("output.readout").textContent;
    };
    answer.cell = point(document.querySelector("#map svg.heat"), 0.99, 0.01);
    answer.curve = point(document.querySelector("#norms svg.curves"), 0.51, 0.5);
    answer.expert = point(document.querySelector("#super-experts svg.heat"), 0.5, 0.99);
    """
    answer = browser.run(render_report(*run.args), driver)
    assert answer["troubles"] == []
    share = np.asarray(run.figures["primary-sinks"][0].values, np.float32)  # pyright: ignore
    assert answer["cell"] == f"layer 0, head 2: {numbers.number(float(share[0, 2]))} share"
    assert answer["curve"].startswith("layer 2: strongest position 908 · largest other ")
    assert answer["expert"].startswith("layer 4, expert 3: ")


def test_filter_search_and_long_prompts(browser: Browser, run: factory.Run) -> None:
    driver = """
    const filter = document.querySelector(".filter");
    const [value] = filter.querySelectorAll("input");
    value.value = 892; value.dispatchEvent(new Event("input"));
    answer.filter = filter.querySelector("output").textContent;
    answer.shown = document.querySelectorAll("tr[data-value]:not([hidden])").length;
    filter.querySelector(".reset").click();
    answer.reset = document.querySelectorAll("tr[data-value]:not([hidden])").length;
    const find = document.getElementById("find");
    find.value = "λ"; find.dispatchEvent(new Event("input"));
    answer.found = document.getElementById("found").textContent;
    document.getElementById("find-next").click();
    answer.now = document.querySelector(".tokens .now").textContent;
    answer.complete = document.querySelector('.tokens[data-prompt="0"]').childElementCount;
    answer.open = document.querySelectorAll(".prompts details[open]").length;
    """
    answer = browser.run(render_report(*run.args), driver)
    assert answer["troubles"] == []
    assert answer["filter"] == "4 of 6 rows pass."
    assert (answer["shown"], answer["reset"]) == (4, 6)
    wanted = sum(piece == " λ" for prompt in run.prompts for piece in prompt["pieces"])
    assert answer["found"] == f"{wanted} tokens"
    assert answer["now"] == "·λ"
    assert answer["complete"] == 700
    assert answer["open"] >= 1


def test_downloads_hold_the_data(browser: Browser, run: factory.Run) -> None:
    driver = """
    const saved = {};
    const blobs = {};
    let n = 0;
    URL.createObjectURL = (blob) => { n += 1; blobs[`blob:x${n}`] = blob; return `blob:x${n}`; };
    HTMLAnchorElement.prototype.click = function () { saved[this.download] = blobs[this.href].size; };
    for (const button of document.querySelectorAll("[data-values], [data-json], [data-csv]")) button.click();
    answer.saved = saved;
    """
    answer = browser.run(render_report(*run.args), driver)
    assert answer["troubles"] == []
    assert {
        "summary.json",
        "primary-sinks.json",
        "primary-sinks--share.csv",
        "massive-activations--norms.csv",
    } <= set(answer["saved"])
    assert all(size > 30 for size in answer["saved"].values())


@pytest.mark.parametrize("width", [1280, 390])
def test_first_screen_fits_and_nothing_overflows(browser: Browser, width: int) -> None:
    run = factory.make(layers=48, heads=32, experts=128, n_prompts=4, seq_len=64)
    driver = """
    answer.bottom = document.querySelector(".pair").getBoundingClientRect().bottom;
    answer.wide = document.documentElement.scrollWidth - innerWidth;
    """
    answer = browser.run(render_report(*run.args), driver, width=width)
    assert answer["troubles"] == []
    assert answer["wide"] <= 0
    if width == 1280:
        assert answer["bottom"] <= 800


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("layers", "heads"), [(4, 2), (48, 32)])
def test_first_screen_holds_the_whole_chain(browser: Browser, layers: int, heads: int, width: int) -> None:
    run = factory_chain.make(layers, heads, 128, n_prompts=4, seq_len=64)
    run.document["verdict"]["text"] *= 3
    driver = """
    answer.bottom = document.querySelector(".pair").getBoundingClientRect().bottom;
    answer.wide = document.documentElement.scrollWidth - innerWidth;
    answer.lines = document.querySelectorAll(".lines li").length;
    answer.cards = document.querySelectorAll(".pair > .card").length;
    HTMLAnchorElement.prototype.click = () => {};  // nothing is written to disk here
    for (const button of document.querySelectorAll("[data-values]")) button.click();
    """
    answer = browser.run(render_report(*run.args), driver, width=width)
    assert answer["troubles"] == []
    assert answer["wide"] <= 0
    assert (answer["lines"], answer["cards"]) == (8, 3)
    if width == 1280:
        assert answer["bottom"] <= 800


def test_a_big_run_opens_fast(browser: Browser) -> None:
    run = factory_chain.make(48, 32, 128, n_prompts=64, seq_len=512)
    html = render_report(*run.args)
    assert len(html.encode()) < 8_000_000
    driver = "answer.ms = performance.now();"
    fastest = min(browser.run(html, driver)["ms"] for _ in range(2))
    assert fastest < 2000


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_runs_nothing(browser: Browser, text: str) -> None:
    driver = """
    answer.scripts = document.scripts.length;
    answer.images = document.images.length;
    answer.wide = document.documentElement.scrollWidth - innerWidth;
    for (const details of document.querySelectorAll("details")) details.open = true;
    """
    run = poisoned(text)
    answer = browser.run(
        render_report(*run.args, title=text), "window.alert = () => troubles.push('alert');" + driver
    )
    assert answer["troubles"] == []
    assert answer["scripts"] == 4  # the data, the page's own, and this test's two
    assert answer["images"] == 0
    assert answer["wide"] <= 0


def test_numbers_read_the_same_in_table_and_script(browser: Browser) -> None:
    rng = np.random.default_rng(5)
    values = [
        0.0,
        1.125,
        100.5,
        0.3,
        999.96,
        0.00999999,
        9999999.9,
        12345.0,
        0.5,
        99.97,
        100.0,
        99.99999,
        1e-9,
    ]
    values += (10 ** rng.uniform(-9, 9, 300) * rng.choice([-1, 1], 300)).tolist()
    page = (
        '<!doctype html><meta http-equiv="Content-Security-Policy" content="script-src \'unsafe-hashes\'">'
        '<style></style><body><script type="application/json" id="sinklens-run">{"figures":{}}</script></body>'
    )
    source = (STATIC / "data.js").read_text(encoding="utf-8")
    driver = f"{source}\nanswer.all = {json.dumps(values)}.map((v) => [number(v), brief(v), percent(v)]);"
    answer = browser.run(page, driver)
    expected = [[numbers.number(v), numbers.brief(v), numbers.percent(v)] for v in values]
    assert answer["all"] == expected
