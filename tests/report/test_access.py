"""Pages for everybody: names for what takes focus, contrast in both themes, links that are more than a colour.

The checks are written out here; where axe-core lies at the place that SINKLENS_AXE names, it is asked too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sinklens.report import render_report

from . import factory_pictures, real
from .chromium import Browser

pytestmark = pytest.mark.slow

CHECKS = """
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const mixed = (over, under) => over.slice(0, 3).map((c, i) => c * (over[3] ?? 1) + under[i] * (1 - (over[3] ?? 1)));
function ground(node) {
  const seen = [];
  for (let at = node; at; at = at.parentElement) seen.push(parts(getComputedStyle(at).backgroundColor));
  return seen.reverse().reduce((under, over) => mixed(over, under), [255, 255, 255]);
}
function light(rgb) {
  const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(node) {
  const style = getComputedStyle(node);
  const under = ground(node.closest("svg") ? node.closest("svg").parentElement : node);
  const ink = mixed(parts(node.closest("svg") ? style.fill : style.color), under);
  const [a, b] = [light(ink), light(under)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
const shown = (node) => node.checkVisibility() && node.getClientRects().length > 0;
const class_ = (node) => node.className.baseVal ?? node.className;
const name = (node) => `${node.tagName} ${class_(node)} ${node.textContent.trim().slice(0, 40)}`;
const all = Array.from(document.querySelectorAll("body *")).filter(shown);

const silent = ["SCRIPT", "STYLE", "TITLE", "OPTION"];
const worded = all.filter((node) => !silent.includes(node.tagName)
  && Array.from(node.childNodes).some((child) => child.nodeType === 3 && child.textContent.trim()));
answer.words = worded.length;
const faint = worded.filter((node) => contrast(node) < 4.5);
answer.faint = faint.map((node) => `${name(node)} ${contrast(node).toFixed(2)}`);

const spoken = (node) => (node.getAttribute("aria-label") || node.textContent
  || Array.from(node.labels || [], (label) => label.textContent).join("")).trim();
const focus = all.filter((node) => node.matches("a[href], button, input, summary, [tabindex]"));
answer.focus = focus.length;
answer.nameless = focus.filter((node) => !spoken(node)).map(name);
const drawn = all.filter((node) => node.matches('svg[role="img"]'));
answer.undrawn = drawn.filter((node) => !node.querySelector(":scope > title")).map(name);

const inline = all.filter((node) => node.matches("a[href]")
  && Array.from(node.parentElement.childNodes).some((at) => at.nodeType === 3 && /\\w/.test(at.textContent)));
answer.inline = inline.length;
answer.bare = inline.filter((node) => getComputedStyle(node).textDecorationLine === "none").map(name);

const ids = Array.from(document.querySelectorAll("[id]"), (node) => node.id);
answer.twice = ids.filter((id, i) => ids.indexOf(id) !== i);
const targets = Array.from(document.querySelectorAll("use"), (node) => node.getAttribute("href").slice(1));
answer.dangling = targets.filter((id) => !document.getElementById(id));
const levels = Array.from(document.querySelectorAll("h1, h2, h3, h4"), (node) => Number(node.tagName[1]));
answer.skipped = levels.filter((level, i) => i > 0 && level > levels[i - 1] + 1).length;
const places = "header, nav, main, footer, dialog, [role=region]";
answer.outside = worded.filter((node) => !node.closest(places)).map(name);
"""


PAGES = ("pictures", "head view", "comparison", "comparison-pictures", "mitigations")


def page(name: str, theme: str) -> str:
    if name != "pictures":
        return real.themed("moe-ind" if name == "head view" else name, theme)
    run, stored = factory_pictures.make(3)
    html = render_report(*run.args, pictures=stored)
    return html.replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">', 1)


def address(name: str) -> str:
    return "#L3H1P0T0" if name == "head view" else ""


BOTH = [(name, theme) for name in PAGES for theme in ("light", "dark")]


@pytest.mark.parametrize(("name", "theme"), BOTH)
def test_everybody_can_read_and_reach_everything(browser: Browser, theme: str, name: str) -> None:
    answer = browser.run(page(name, theme), CHECKS, address=address(name))
    assert answer["troubles"] == []
    assert min(answer["words"], answer["focus"]) >= 3
    assert answer["inline"] >= (3 if name == "pictures" else 0)
    for kind in ("faint", "nameless", "undrawn", "bare", "twice", "dangling", "outside"):
        assert answer[kind] == [], kind
    assert answer["skipped"] == 0


def axe_violations(browser: Browser, page: str, address: str = "") -> list[object]:
    """What axe-core finds; skips where there is none."""
    place = os.environ.get("SINKLENS_AXE", "")
    if not place:
        pytest.skip("SINKLENS_AXE names no axe.min.js")
    driver = """
    const found = await axe.run(document, { resultTypes: ["violations"] });
    answer.found = found.violations.map((v) => [v.impact, v.id, v.nodes.map((node) => node.target.join(" "))]);
    answer.passed = found.passes.length;
    """
    answer = browser.run_later(page, Path(place).read_text(encoding="utf-8"), driver, address=address)
    assert answer["passed"] > 0
    return answer["found"]


@pytest.mark.parametrize(("name", "theme"), BOTH)
def test_axe_finds_nothing(browser: Browser, theme: str, name: str) -> None:
    assert axe_violations(browser, page(name, theme), address(name)) == []
