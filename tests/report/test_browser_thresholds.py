"""Thresholds moved in the page say, to the letter, what the analyzer says of the same trace with these parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sinklens as sl
from sinklens.analyzers import MassiveActivations, SuperExperts, VisualSinks
from sinklens.analyzers.base import Analyzer
from sinklens.report import read_report, render_report
from sinklens.tracers.trace import Trace
from tests.analyzers.made import record
from tests.analyzers.made import trace as traced
from tests.analyzers.made_pictures import made, phi_record
from tests.analyzers.test_causal_effects import effects, experiment
from tests.analyzers.test_super_experts import experts, large, moe, pruned

from . import factory
from .chromium import Browser

pytestmark = pytest.mark.slow

MOVE = """
const form = document.querySelector(`.thresholds[data-for="${name}"]`);
const lead = form.closest("section").querySelector(".lead");
const put = (values) => {
  for (const [key, value] of Object.entries(values)) {
    const input = form.querySelector(`input[name="${key}"]`);
    input.value = value;
    input.dispatchEvent(new Event("input"));
  }
  return lead.textContent;
};
answer.own = lead.textContent;
answer.said = tried.map((values) => put(values));
answer.line = document.querySelector(`.lines li[data-finding="${name}"]`)?.textContent;
answer.main = document.querySelector(".says .sentence").textContent;
answer.output = form.querySelector("output").textContent;
form.querySelector(".reset").click();
answer.reset = lead.textContent;
answer.mainReset = document.querySelector(".says .sentence").textContent;
put(wrong); answer.wrong = [lead.textContent, form.querySelector("output").textContent];
"""


def page(analyzer: Analyzer, trace: Trace, *, include_text: bool = True) -> str:
    finding = analyzer.read(trace)
    run = factory.make(layers=len(trace.layers))
    run.document["findings"] = {analyzer.name: finding.to_json()}
    run.document["verdict"]["lines"] = [
        {"analyzer": analyzer.name, "title": analyzer.title, "text": finding.verdict}
    ]
    assert finding.adjustable is not None
    movable = finding.adjustable()
    assert movable is not None
    prompts = [item.describe() for item in trace]
    return render_report(
        run.document,
        {analyzer.name: []},
        finding.tiles,
        prompts,
        [],
        adjustable={analyzer.name: movable},
        include_text=include_text,
    )


def said(browser: Browser, analyzer: Analyzer, trace: Trace, tried: list[dict[str, float]]) -> dict[str, Any]:
    """Moves the thresholds and holds every sentence against the analyzer's own."""
    key = next(iter(tried[0]))
    head = (
        f"const name = {json.dumps(analyzer.name)}, tried = {json.dumps(tried)}, wrong = {{ {key}: -1 }};\n"
    )
    answer = browser.run(page(analyzer, trace), head + MOVE)
    assert answer["troubles"] == []
    own = analyzer.read(trace).verdict
    assert answer["own"] == answer["reset"] == own
    assert answer["wrong"][0] == own
    assert answer["wrong"][1].startswith("From ")
    expected = [changed(analyzer, **values).read(trace).verdict for values in tried]
    assert answer["said"] == expected
    assert answer["line"] == f"{analyzer.title} {expected[-1]}"
    assert answer["output"].endswith("at these thresholds; table and figures show the run's own.")
    return answer


def changed(analyzer: Any, **values: float) -> Analyzer:
    return replace(analyzer, **values)


def states(seed: int, spikes: dict[tuple[int, int, int], float], layers: int = 5, n: int = 11) -> np.ndarray:
    hidden = np.random.default_rng(seed).normal(size=(layers, n, 23)).astype(np.float32)
    for (layer, pos, dim), value in spikes.items():
        hidden[layer, pos, dim] = value * (1 + 0.013 * seed)
    return hidden


def test_massive_activations(browser: Browser) -> None:
    spikes = {(layer, 0, 7): 900.0 + 31 * layer for layer in range(1, 5)}
    spikes |= {(2, 3, 5): -433.0, (3, 3, 5): -512.5, (4, 9, 11): 77.7}
    prompts = [record(None, states(seed, spikes, n=11 + seed), index=seed) for seed in range(13)]
    odd = record(None, states(14, {(1, 2, 3): 250.0}, n=5), index=13)
    tried = [
        {"absolute": 100.0, "relative": 500.0},
        {"absolute": 500.0, "relative": 400.0},
        {"absolute": 20.0, "relative": 50.0},
        {"absolute": 1.5, "relative": 2.0},
        {"absolute": 931.0, "relative": 10.0},
        {"absolute": 5000.0, "relative": 10.0},
        {"absolute": 512.5, "relative": 700.3},
    ]
    trace = traced([*prompts, odd])
    answer = said(browser, MassiveActivations(absolute=300.0), trace, tried)
    assert len(set(answer["said"])) >= 5
    said(browser, MassiveActivations(recipe="code", min_prompts=0.5, relative=300.0), trace, tried)


@pytest.mark.parametrize("tested", [False, True])
def test_super_experts(browser: Browser, tested: bool) -> None:
    trace = moe(experts(large(L1_5=90.0, L3_2=70.0, L6_9=12.0, L7_7=31.0), spikes={1: (0, 5, 90.0)}))
    if tested:
        both = experiment("experts", "experts", 0.95, target={"experts": [[1, 5], [3, 2]]})
        done = effects(pruned(1, 5, 0.1), pruned(3, 2, 0.9), both)
        trace.manifest = {"experiments": {"effects": done}}
    tried = [
        {"percentile": 99.5, "fraction": 0.9},
        {"percentile": 90.0, "fraction": 0.3},
        {"percentile": 99.0, "fraction": 0.75},
        {"percentile": 50.0, "fraction": 0.02},
        {"percentile": 98.37, "fraction": 0.1},
        {"percentile": 100.0, "fraction": 0.1},
    ]
    answer = said(browser, SuperExperts(floor=2.0), trace, tried)
    assert len(set(answer["said"])) >= 4
    together = [text for text in answer["said"] if "Without them the sink's share goes" in text]
    carrier = [text for text in answer["said"] if "the sink hangs on L3E2" in text]
    assert (bool(together), bool(carrier)) == (tested, tested)
    assert len(together) < len(carrier) or not tested


def test_few_experts_and_the_code_recipe(browser: Browser) -> None:
    few = moe(experts(large(4, 30, L1_5=90.0, L2_2=70.0), spikes={1: (0, 5, 90.0)}))
    said(
        browser,
        SuperExperts(),
        few,
        [{"percentile": 99.9, "fraction": 0.8}, {"percentile": 10, "fraction": 0}],
    )
    said(
        browser,
        SuperExperts(recipe="code"),
        few,
        [{"percentile": 50.0}, {"percentile": 97.5}, {"percentile": 0}],
    )


@pytest.mark.parametrize("recipe", ["paper", "code"])
def test_visual_sinks(browser: Browser, recipe: str) -> None:
    bos = {(layer, 0): 60.0 for layer in range(1, 5)}
    first = {**bos, (1, 4): 20.0, (2, 4): 25.0, (3, 4): 31.0, (3, 8): 22.0, (2, 8): 19.9}
    trace = made([phi_record(0, first), phi_record(1, {**bos, (4, 5): 27.5})])
    tried = [{"tau": tau} for tau in (20.0, 19.9, 22.5, 25.0, 27.6, 31.0, 40.0, 18.0)]
    answer = said(browser, VisualSinks(tau=21.0, recipe=recipe), trace, tried)  # type: ignore[arg-type]
    assert len(set(answer["said"])) >= 5


def test_a_run_of_a_real_model(browser: Browser) -> None:
    run = sl.profile("bundled:moe-ind", n=3, analyzers=["massive-activations", "super-experts"], verify=False)
    tried = [
        {"absolute": 5.0, "relative": 100.0},
        {"absolute": 3.0, "relative": 60.0},
        {"absolute": 12, "relative": 200},
    ]
    said(browser, MassiveActivations(), run.trace, tried)
    said(
        browser,
        SuperExperts(),
        run.trace,
        [{"percentile": 99, "fraction": 0.4}, {"percentile": 9, "fraction": 0.01}],
    )


def test_a_found_link_of_the_chain_comes_into_the_main_sentence(browser: Browser) -> None:
    trace = traced([record(None, states(0, {(2, 0, 7): 200.0}))])
    analyzer = MassiveActivations()
    head = 'const name = "massive-activations", tried = [{ absolute: 50, relative: 20 }], wrong = {};\n'
    answer = browser.run(page(analyzer, trace), head + MOVE)
    found = changed(analyzer, absolute=50.0, relative=20.0).read(trace).verdict
    assert found.startswith("1 massive dim")
    assert answer["main"].endswith(found)
    assert found not in answer["mainReset"]


def test_tokens_are_left_out_where_text_is(browser: Browser, tmp_path: Any) -> None:
    trace = traced([record(None, states(0, {(2, 0, 7): 2000.0}))])
    trace.records[0].pieces = tuple(f"secret{i}" for i in range(len(trace.records[0])))
    html = page(MassiveActivations(), trace, include_text=False)
    assert "secret" not in html
    target = tmp_path / "report.html"
    target.write_text(html, encoding="utf-8")
    assert read_report(target)["findings"]["massive-activations"]["status"] == "found"
