"""The report as a file: self-contained, complete without scripts, honest about failures, inert to hostile text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinklens.core.errors import DataError, SinklensError
from sinklens.core.figures import Heatmap, Samples
from sinklens.report import read_report, render_report, write_report

from . import factory
from .parsed import Page


@pytest.fixture(scope="module")
def run() -> factory.Run:
    return factory.make(layers=5, heads=3, experts=7, n_prompts=2, seq_len=19)


@pytest.fixture(scope="module")
def html(run: factory.Run) -> str:
    return render_report(*run.args)


def _page(run: factory.Run, **options: Any) -> Page:
    return Page(render_report(*run.args, **options))


def test_nothing_is_loaded_from_outside(html: str) -> None:
    page = Page(html)
    for tag, attrs in page.elements:
        if tag in ("script", "link", "img", "image", "iframe", "object", "embed", "source", "use", "font"):
            for name in ("src", "href", "xlink:href", "srcset", "data"):
                value = attrs.get(name)
                assert value is None or value.startswith(("data:", "#")), (tag, value)
    style = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    assert len(style) == 1
    assert "@import" not in style[0]
    assert re.findall(r"url\(([^)]*)\)", style[0]) == ["#hatch"]
    assert not {"iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}


def test_policy_allows_the_one_script_and_nothing_else(html: str) -> None:
    page = Page(html)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    programs = [body for attrs, body in page.scripts if attrs.get("type") != "application/json"]
    assert len(programs) == 1
    digest = base64.b64encode(hashlib.sha256(programs[0].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert not re.search(
        r"\beval\(|new Function|innerHTML|outerHTML|document\.write|fetch\(|XMLHttp", programs[0]
    )
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_complete_without_scripts(run: factory.Run, html: str) -> None:
    words = Page(html).words
    assert " ".join(run.document["verdict"]["text"].split()) in words
    for tile in run.tiles:
        assert tile.label in words
        assert " ".join(tile.note.split()) in words
    for check in run.document["checks"]:
        assert check["name"] in words
    for figures in run.figures.values():
        for figure in figures:
            assert figure.title in words
            assert figure.caption in words
    for finding in run.document["findings"].values():
        assert finding["verdict"] in words
    for method in run.methods:
        assert method["reference"]["title"] in words
    assert "Attention sinks were measured with sinklens on a synthetic example." in words
    assert "2.13.0" in words
    assert "3 GiB" in words
    assert "1 min 48 s" in words
    assert "sinklens profile -m example/synthetic --seq-len 19" in words


def test_every_figure_has_a_drawing_with_a_description(html: str) -> None:
    page = Page(html)
    drawings = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"]
    assert (
        len(drawings) == 2 + 3 + 1 + 1 + 1
    )  # first screen, sinks with the curve of the rate, norms, experts
    assert html.count("<title>") == len(drawings) + 1


def test_links_inside_the_page_lead_somewhere(html: str) -> None:
    page = Page(html)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    targets = {href[1:] for href in page.attributes("href") if href.startswith("#")}
    assert {t for t in targets if not re.fullmatch(r"L\d+H\d+", t)} <= set(ids)
    assert {
        "trust",
        "primary-sinks",
        "massive-activations",
        "super-experts",
        "prompts",
        "methods",
        "manifest",
    } <= set(ids)
    for tag, attrs in page.elements:
        if tag == "a" and (attrs.get("href") or "").startswith("http"):
            assert attrs.get("rel") == "noopener noreferrer"


def test_round_trip(tmp_path: Path, run: factory.Run) -> None:
    path = write_report(tmp_path / "deep" / "report.html", *run.args)
    assert read_report(path) == json.loads(json.dumps(run.document))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html></html>", "is not a sinklens report"),
        ('<script type="application/json" id="sinklens-run">{"a":</script>', "are damaged"),
        ('<script type="application/json" id="sinklens-run">{"schema":"x"}</script>', "are damaged"),
        (
            '<script type="application/json" id="sinklens-run">'
            '{"schema":"sinklens/report/9","document":{"schema":"sinklens/run/1"}}</script>',
            "another version",
        ),
    ],
)
def test_reading_other_files_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.html"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_report(path)
    assert len(str(caught.value).splitlines()) <= 4


def test_reading_nothing_and_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read the report"):
        read_report(tmp_path / "missing.html")
    (tmp_path / "b.html").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_report(tmp_path / "b.html")


def test_other_documents_are_refused(run: factory.Run) -> None:
    with pytest.raises(SinklensError, match="not the document of a sinklens run"):
        render_report({"schema": "other"}, {}, [], None, [])


def test_writing_where_one_cannot_is_a_sentence(tmp_path: Path, run: factory.Run) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot write the report"):
        write_report(tmp_path / "file" / "r.html", *run.args)


def test_failed_check_takes_the_verdict_away() -> None:
    run = factory.make()
    run.document["checks"][2] |= {"passed": False, "value": 0.031}
    html = render_report(*run.args)
    page = Page(html)
    assert "Strong primary sink" not in page.words
    assert "Not trustworthy" in page.words
    assert "1 of 5 checks failed: streamed equals dense." in page.words
    assert ("body", {"class": "untrusted"}) in page.elements
    assert page.words.count("Not trustworthy:") == 4  # on each tile with a number
    style = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)[0]
    rule = re.search(r"\.untrusted \.tile \.value[^{]*\{([^}]*)\}", style)
    assert rule is not None
    assert "font-weight: 400" in rule.group(1)
    assert not {"b", "strong"} & {tag for tag, _ in page.elements}


def test_untrusted_without_a_failed_check_keeps_its_own_words() -> None:
    run = factory.make()
    run.document["verdict"] = {
        "status": "untrusted",
        "text": "Prompts are too short for a verdict.",
        "rule": "short",
    }
    page = _page(run)
    assert "Prompts are too short for a verdict." in page.words
    assert ("body", {"class": "untrusted"}) in page.elements


def test_checks_that_did_not_run_are_not_counted_as_passed() -> None:
    run = factory.make()
    run.document["checks"][0]["passed"] = None
    assert "4 checks passed, 1 not run." in _page(run).words
    run.document["checks"] = []
    assert "No self-check was run" in _page(run).words


def test_no_sink_is_an_answer() -> None:
    run = factory.make()
    run.document["verdict"] = {"status": "no-sink", "text": "No position draws attention.", "rule": "none"}
    run.document["findings"]["primary-sinks"] |= {"status": "not-found", "rows": [], "verdict": "No sink."}
    page = _page(run)
    assert "No attention sink" in page.words
    assert "The table is empty: nothing met this method's criterion." in page.words


def test_not_applicable_is_a_sentence_never_an_empty_plot() -> None:
    run = factory.make()
    html = render_report(*run.args)
    section = html[html.index('id="super-experts"') : html.index('id="prompts"')]
    assert "Not applicable: the model is dense, it has no experts." in section
    assert "<svg" not in section
    assert "<table" not in section
    assert "Not applicable: the model is dense." in Page(html).words


def test_figures_without_values_are_sentences() -> None:
    run = factory.make()
    blank = np.full((3, 4), np.nan)
    run.figures["primary-sinks"] = [
        Heatmap("a", "A map", "Its caption.", blank, "share"),
        Samples("b", "A rate", "Its caption.", np.full((2, 3, 4), np.nan), 0.3),
    ]
    run.figures["massive-activations"] = []
    page = _page(run)
    assert page.words.count("There are no values to draw.") >= 2
    assert "No analyzer of this run recorded hidden-state norms by layer." in page.words


def test_run_with_nothing_but_a_verdict() -> None:
    page = Page(
        render_report({"schema": "sinklens/run/1", "verdict": {"status": "no-sink"}}, {}, [], None, [])
    )
    assert "Unnamed model" in page.words
    assert "This report was written without its prompts." in page.words
    assert "This run has no manifest" in page.words


def test_unknown_analyzers_get_their_section(run: factory.Run) -> None:
    document = json.loads(json.dumps(run.document))
    document["findings"] |= {
        "new-thing": {
            "status": "found",
            "verdict": "Something new.",
            "rows": [{"a_b": 0.123456789}],
            "units": {"a_b": "nats"},
        },
        "prompts": {"status": "found", "verdict": "A name that is taken.", "rows": []},
    }
    figures = run.figures | {
        "new-thing": [Heatmap("m", "New map", "By nobody.", np.eye(3), "nats", "a", "b")]
    }
    page = Page(render_report(document, figures, [], None, []))
    ids = page.attributes("id")
    assert "new-thing" in ids
    assert "prompts-finding" in ids
    assert len(ids) == len(set(ids))
    assert "New thing Something new. New map" in page.words
    assert "a b nats 0.123" in page.words


def test_numbers_are_short(html: str) -> None:
    shown = Page(html).words
    assert not re.findall(r"\d\.\d{6,}", shown)
    assert "9.88" in shown


def test_lists_of_heads_are_labels_not_brackets() -> None:
    run = factory.make()
    heads = [[i, i % 3, 1.0 - i / 40] for i in range(19)]
    run.document["findings"]["primary-sinks"]["summary"] |= {"heads": heads, "dormant_heads": []}
    html = render_report(*run.args)
    section = html[html.index('id="primary-sinks"') : html.index('id="massive-activations"')]
    assert section.count("[[") == 0
    assert '<li><a href="#L0H0">L0H0</a> <span>100 %</span></li>' in section
    assert "<summary>3 more</summary>" in section
    assert "dormant heads none" in Page(html).words


def test_twenty_rows_first_then_the_rest() -> None:
    run = factory.make()
    rows = [{"layer": i, "value": float(i), "ratio_to_median": 1.5 * i} for i in range(733)]
    run.document["findings"]["massive-activations"]["rows"] = rows
    html = render_report(*run.args)
    section = html[html.index('id="massive-activations"') : html.index('id="super-experts"')]
    first, rest = section.split('<details class="more">')
    assert first.count("<tr data-value") == 20
    assert rest.count("<tr data-value") == 480
    assert "733 rows; the page shows the first 500, the downloads have all" in " ".join(section.split())
    assert len(Page(html).data()["document"]["findings"]["massive-activations"]["rows"]) == 733
    assert 'value="100"' in section
    assert 'value="1000"' in section


@pytest.mark.parametrize(
    ("parameters", "fields"),
    [
        ({"absolute": 100.0, "relative": 1000.0, "recipe": "paper"}, ["100", "1000"]),
        ({"floor": 17, "ratio": 250.5}, ["17", "250.5"]),
        ({"recipe": "paper"}, ["0", "0"]),
    ],
)
def test_threshold_fields_start_at_the_runs_own(parameters: dict[str, Any], fields: list[str]) -> None:
    run = factory.make()
    run.document["findings"]["massive-activations"]["parameters"] = parameters
    page = _page(run)
    shown = [a["value"] for tag, a in page.elements if tag == "input" and a.get("type") == "number"]
    assert shown == fields


def test_tokens_at_sink_positions_are_marked(html: str, run: factory.Run) -> None:
    section = html[html.index('id="prompts"') : html.index('id="methods"')]
    viewers = re.findall(r'<p class="tokens" data-prompt="\d+">(.*?)</p>', section, flags=re.DOTALL)
    assert len(viewers) == len(run.prompts)
    for viewer in viewers:
        assert re.findall(r"<bdi( class=\"sink\")?>", viewer) == [' class="sink"'] + [""] * 18


def test_values_behind_the_figures_are_embedded(html: str, run: factory.Run) -> None:
    data = Page(html).data()
    figure = run.figures["primary-sinks"][0]
    assert isinstance(figure, Heatmap)
    stored = data["figures"]["primary-sinks--share"]
    values = np.frombuffer(base64.b64decode(stored["values"]), "<f4").reshape(stored["shape"])
    assert values == pytest.approx(figure.values, rel=1e-6)
    rate = data["figures"]["primary-sinks--rate"]
    grid = np.frombuffer(base64.b64decode(rate["thresholds"]), "<f8")
    above = np.frombuffer(base64.b64decode(rate["above"]), "<u2").reshape(len(grid), *rate["shape"])
    sampled = run.figures["primary-sinks"][1]
    assert isinstance(sampled, Samples)
    own = grid.tolist().index(rate["own"])
    assert above[own].tolist() == (sampled.values > 0.3).sum(axis=0).tolist()
    tokens = data["tokens"]
    index = np.frombuffer(base64.b64decode(tokens["items"]["1"]), "<u4")
    assert [tokens["words"][i][0] for i in index] == run.prompts[1]["token_ids"]


def test_big_model_stays_small_and_small_model_smaller() -> None:
    big = factory.make(layers=48, heads=32, experts=128, n_prompts=64, seq_len=512)
    assert len(render_report(*big.args).encode()) < 2_000_000
    assert len(render_report(*factory.make(layers=4, heads=2).args).encode()) < 150_000


def test_same_run_same_file(run: factory.Run, html: str) -> None:
    assert render_report(*run.args) == html
