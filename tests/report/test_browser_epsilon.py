"""Epsilon moved in the page: sentences, boxes, sign and notes are what a new analysis and a new verdict say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sinklens as sl
from sinklens.analyzers import MassiveActivations, PrimarySinks
from sinklens.pipeline.run import Run
from sinklens.report import page, read_report
from sinklens.tracers.selfcheck import Check
from sinklens.tracers.trace import Trace
from tests.analyzers.made import causal_uniform, record, states, trace, with_sink
from tests.analyzers.test_primary_sweep import mixed

from . import real
from .chromium import Browser

pytestmark = pytest.mark.slow

READ = """
const inputs = Array.from(document.querySelectorAll(".epsilon input, .slider input"));
const [first, section, map] = inputs;
const heat = map.closest("figure").querySelector("svg.heat .cells");
const text = (selector) => document.querySelector(selector)?.textContent;
const read = () => ({
  at: inputs.map((input) => Number(input.value)),
  spoken: inputs.map((input) => input.getAttribute("aria-valuetext")),
  lead: text("#primary-sinks .lead"),
  main: text(".says .sentence"), again: text("#trust > .lead"),
  kind: text(".verdict .kind"), sink: document.querySelector(".verdict .sign-full") !== null,
  status: document.querySelector("section.verdict").className, rule: document.querySelector(".says").title,
  tiles: Array.from(document.querySelectorAll(".tile"))
    .filter((tile) => tile.querySelector(".name a")?.hash === "#primary-sinks")
    .map((tile) => [tile.querySelector(".value").textContent, tile.querySelector(".note").textContent]),
  notes: Array.from(document.querySelectorAll("#primary-sinks > .notes:not([hidden]) li"), (li) => li.textContent),
  rate: text(".slider .at"), moved: document.querySelectorAll(".moved").length, cells: heat.innerHTML,
});
const move = (input, index) => { input.value = index; input.dispatchEvent(new Event("input")); return read(); };
answer.own = read();
answer.steps = Number(first.max) + 1;
answer.said = tried.map((index, i) => move(inputs[i % inputs.length], index));
answer.names = inputs.map((input) => input.labels[0].textContent.trim());
answer.reset = Array.from(document.querySelectorAll(".epsilon .reset, .slider .reset"), (button) => {
  move(first, tried[0]); button.click(); return { ...read(), cells: answer.own.cells };
});
"""


def html(run: Run, tmp_path: Path, **options: Any) -> str:
    return run.report(tmp_path / "report.html", **options).read_text(encoding="utf-8")


def held(browser: Browser, run: Run, tmp_path: Path, tried: list[float]) -> dict[str, Any]:
    """Moves epsilon at each of its handles in turn, and holds the page against a run that is judged again."""
    swept = run.adjustable["primary-sinks"]
    grid = swept.arrays["epsilon"].tolist()
    places = [grid.index(epsilon) for epsilon in tried]
    answer = browser.run(html(run, tmp_path), f"const tried = {json.dumps(places)};\n{READ}")
    assert answer["troubles"] == []
    assert answer["steps"] == len(grid)
    assert answer["names"] == ["Threshold ε", "Threshold ε", "Threshold"]
    assert answer["reset"] == [answer["own"]] * 3
    assert answer["own"]["moved"] == 0
    own = next(analyzer for analyzer in run.analyzers if isinstance(analyzer, PrimarySinks))
    for place, epsilon, said in zip(places, tried, answer["said"], strict=True):
        assert said["at"] == [place] * 3
        assert said["spoken"] == [f"ε = {epsilon:g}"] * 3
        again = replace(own, epsilon=epsilon)
        findings = {**run.findings, own.name: again.read(run.trace)}
        told = Run(run.trace, run.analyzers, run.checks, None, findings)
        same(said, told, moved=epsilon != own.epsilon)
        mark = f" shown at ε = {epsilon:g}, this run: {own.epsilon:g}"
        assert said["kind"].endswith(mark) == (epsilon != own.epsilon)
    return answer


def same(said: dict[str, Any], told: Run, *, moved: bool) -> None:
    finding, verdict = told.findings["primary-sinks"], told.verdict
    assert said["lead"] == finding.verdict
    assert said["main"] == said["again"] == verdict.text
    assert said["rule"] == f"Rule {verdict.rule}"
    assert said["kind"].startswith(page.headline(verdict.status))
    assert said["sink"] == (verdict.status == "sink")
    assert verdict.status in said["status"].split()
    assert said["tiles"] == [[tile.value, tile.note] for tile in finding.tiles]
    assert said["notes"] == finding.notes
    assert (said["moved"] > 0) == moved
    if finding.summary["strongest_position"] == 0:
        shown = re.search(r"the rate is ([0-9.]+) %", said["rate"])
        assert shown is not None
        assert float(shown.group(1)) == pytest.approx(finding.summary["sink_rate"], abs=0.05)


def two_sinks() -> Trace:
    """Weak on many heads at position 0, strong on few heads at position 7: which one leads depends on epsilon."""
    records = []
    for index in range(3):
        weights = causal_uniform(3, 4, 47 + index)
        for layer in range(3):
            for head in range(4):
                few = (layer, head) in ((1, 2), (2, 0), (2, 3))
                with_sink(weights, layer, head, 7 if few else 0, 0.8 if few else 0.4 + 0.01 * index)
        spiked = states(3, 47 + index, 11, index).astype(np.float32)
        spiked[1:, 0, 5] *= 900
        records.append(record(weights, spiked, index=index))
    return trace(records)


PASSED = [Check("logits unchanged", True)]


def test_the_strongest_position_changes_and_the_sink_disappears(browser: Browser, tmp_path: Path) -> None:
    run = Run(two_sinks(), (PrimarySinks(), MassiveActivations(absolute=50.0, relative=20.0)), PASSED)
    answer = held(browser, run, tmp_path, [0.6, 0.9, 0.3, 0.05, 0.41, 0.43, 0.001, 0.8])
    main = [said["main"] for said in answer["said"]]
    assert "sink on position 7" in main[0]
    assert main[1].startswith("No attention sink")
    assert "sink on position 0" in main[3]
    assert len({said["cells"] for said in answer["said"]}) > 2
    assert run.findings["massive-activations"].verdict in main[0]


@pytest.mark.parametrize("options", [{"recipe": "code"}, {"exclude_diagonal": True, "epsilon": 0.137}])
def test_recipes_and_estimates_follow(browser: Browser, options: dict[str, Any], tmp_path: Path) -> None:
    seen = mixed(3, sampled="recipe" in options)
    run = Run(seen, (PrimarySinks(**options),), PASSED)
    answer = held(browser, run, tmp_path, [0.2, 0.55, 0.02, 0.99])
    assert ("Estimated from" in answer["said"][0]["main"]) == ("recipe" in options)


def test_a_real_run(browser: Browser, tmp_path: Path) -> None:
    held(browser, real.run("moe-ind"), tmp_path, [0.1, 0.5, 0.77, 0.003, 0.99])


def test_a_real_run_with_sampled_rows(browser: Browser, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"prompts": "corpus:mixed", "n": 2, "seq_len": 128, "verify": False}
    run = sl.profile("bundled:dense-ind", sample_queries=0.5, analyzers=["primary-sinks"], pack=True, **asked)
    answer = held(browser, run, tmp_path, [0.2, 0.5, 0.99])
    assert all("Estimated from " in said["main"] for said in answer["said"])


def test_other_thresholds_stay_where_they_were_moved(browser: Browser, tmp_path: Path) -> None:
    analyzer = MassiveActivations(absolute=50.0, relative=20.0)
    run = Run(two_sinks(), (PrimarySinks(), analyzer), PASSED)
    moved = replace(analyzer, absolute=1000.0)
    told = Run(run.trace, (PrimarySinks(epsilon=0.6), moved), PASSED)
    place = run.adjustable["primary-sinks"].arrays["epsilon"].tolist().index(0.6)
    driver = f"""
    const put = (input, value) => {{ input.value = value; input.dispatchEvent(new Event("input")); }};
    const epsilon = document.querySelector(".epsilon input");
    const floor = document.querySelector('.thresholds [name="absolute"]');
    const main = () => document.querySelector(".says .sentence").textContent;
    put(floor, 1000); put(epsilon, {place}); answer.one = main();
    document.querySelector(".thresholds .reset").click(); answer.less = main();
    put(floor, 1000); answer.other = main();
    document.querySelector(".epsilon .reset").click(); document.querySelector(".thresholds .reset").click();
    answer.reset = main();
    """
    answer = browser.run(html(run, tmp_path), driver)
    assert answer["troubles"] == []
    assert answer["one"] == answer["other"] == told.verdict.text
    assert answer["less"] == Run(run.trace, (PrimarySinks(epsilon=0.6), analyzer), PASSED).verdict.text
    assert answer["reset"] == run.verdict.text


def test_an_untrusted_page_stays_without_a_verdict(browser: Browser, tmp_path: Path) -> None:
    run = Run(two_sinks(), (PrimarySinks(),), [Check("row mass", False)])
    answer = browser.run(html(run, tmp_path), f"const tried = [90, 100, 3];\n{READ}")
    assert answer["troubles"] == []
    for said in (answer["own"], *answer["said"]):
        assert said["main"] == answer["own"]["main"]
        assert "untrusted" in said["status"]
        assert all(note.startswith("Not trustworthy") for _, note in said["tiles"])
    assert answer["said"][0]["lead"] != answer["own"]["lead"]


def test_without_scripts_and_without_text(browser: Browser, tmp_path: Path) -> None:
    run = Run(two_sinks(), (PrimarySinks(),), PASSED)
    assert run.verdict.text in html(run, tmp_path).replace("&#39;", "'")
    for made in run.trace:
        made.pieces = tuple(f"secret{i}" for i in range(len(made)))
    hidden = html(Run(run.trace, (PrimarySinks(),), PASSED), tmp_path, include_text=False)
    assert "secret" not in hidden
    assert read_report(tmp_path / "report.html")["verdict"]["status"] == "sink"
    answer = browser.run(hidden, f"const tried = [50, 80, 101];\n{READ}")
    assert answer["troubles"] == []
    assert answer["reset"] == [answer["own"]] * 3
    assert "[text left out]" in answer["said"][0]["main"]


def test_what_it_adds_to_a_page_does_not_grow_with_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = causal_uniform(48, 32, 37) * rng.uniform(0.2, 1, (48, 32, 1, 37))
    weights[:, :, :, 0] += rng.uniform(0, 3, (48, 32, 1))
    weights = np.tril(weights)
    weights /= weights.sum(-1, keepdims=True)
    big = len(
        json.dumps(
            json.loads(_data(html(Run(trace([record(weights)]), (PrimarySinks(),), PASSED), tmp_path)))[
                "adjustable"
            ]
        )
    )
    small = len(
        json.dumps(
            json.loads(_data(html(Run(two_sinks(), (PrimarySinks(),), PASSED), tmp_path)))["adjustable"]
        )
    )
    assert max(big, small) < 150_000


def _data(source: str) -> str:
    found = re.search(r'<script type="application/json" id="sinklens-run">([^<]*)</script>', source)
    assert found is not None
    return found.group(1)
