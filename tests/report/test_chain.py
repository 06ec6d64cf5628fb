"""The page when the whole chain speaks: lines, plain names, intervals in tables, published values, six tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sinklens.core.figures import Intervals, Tile
from sinklens.report import first, names, published, render_report, run_repr_html, tables

from . import factory_chain
from .parsed import Page


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(*factory_chain.make().args)


def test_other_findings_stand_in_lines_that_lead_to_their_sections(html: str) -> None:
    run = factory_chain.make()
    shown = Page(html)
    first = html[html.index('<ul class="lines">') : html.index("</ul>", html.index('<ul class="lines">'))]
    for line in run.document["verdict"]["lines"]:
        assert f'<a href="#{line["analyzer"]}">{line["title"]}</a>' in first
        assert shown.words.count(line["text"]) == 3  # first screen, trust, own section
    assert set(shown.attributes("id")) >= {line["analyzer"] for line in run.document["verdict"]["lines"]}


def test_a_failed_check_silences_the_lines_too() -> None:
    run = factory_chain.make()
    run.document["checks"][0]["passed"] = False
    html = render_report(*run.args)
    assert '<ul class="lines">' not in html
    assert '<dl class="said">' not in html


def test_sections_are_titled_by_their_findings_in_the_order_of_the_document(html: str) -> None:
    run = factory_chain.make()
    ids = Page(html).attributes("id")
    order = [name for name in ids if name in run.document["findings"]]
    assert order == list(run.document["findings"])
    assert "Who writes it <" in html.replace("\n", " ") or "<h2>Who writes it" in html


def test_labels_take_the_place_of_keys(html: str) -> None:
    words = Page(html).words
    assert "secondary sinks per 1000 tokens 2" in words
    assert "found by both rules none" in words
    assert "per_thousand" not in words
    assert "agree" not in words


def test_intervals_stand_behind_their_values(html: str) -> None:
    words = Page(html).words
    assert "change of the sink rate (interval) percentage points" in words
    assert "−71.2 (−75.0 to −66.4)" in words
    assert "delta ci low" not in words
    table = tables.table(
        [{"x": 1.0, "x_low": 0.5, "x_high": None}, {"x": 2.0, "x_low": 1.5, "x_high": 2.5}], {}
    )
    assert table is not None
    assert [column.label for column in table.columns] == ["x (interval)"]
    assert [row.cells[0].shown for row in table.rows] == ["1.00", "2.00 (1.50 to 2.50)"]
    assert "x_low" in tables.as_csv([{"x": 1.0, "x_low": 0.5, "x_high": 2.0}])


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("sink_rate", "sink rate"),
        ("n_prompts", "prompts"),
        ("n_sink_heads", "number of sink heads"),
        ("max_ratio", "largest ratio"),
        ("seq_len_min", "prompt length, smallest"),
        ("rate_ci_low", "rate, 95 % interval from"),
        ("down_proj_output", "down projection output"),
        ("bos-alignment", "BOS alignment"),
        ("x", "x"),
    ],
)
def test_names_without_a_label_are_words(key: str, shown: str) -> None:
    assert names.name(key) == shown
    assert names.name(key, {key: "another"}) == "another"


def test_ends_alone_stay_columns() -> None:
    assert names.folded(["a_low", "b", "b_low", "b_high"]) == {"b_low", "b_high"}
    assert names.ends("b", ["b", "b_ci_low", "b_ci_high", "b_low", "b_high"]) == ("b_ci_low", "b_ci_high")


def test_published_values_stand_beside_the_run(html: str) -> None:
    words = Page(html).words
    assert "What others published about this model, beside what this run measured." in words
    assert "74.3 % base model 71.3 % An example paper , table 1 read in the paper" in words
    assert "711, 1415" in words
    section = html[html.index('id="references"') : html.index('id="prompts"')]
    assert section.count('<tr class="unsure">') == 1
    assert 'rel="noopener noreferrer">An example paper' in section


def test_documents_without_published_values_have_no_section() -> None:
    run = factory_chain.make()
    del run.document["references"]
    assert 'id="references"' not in render_report(*run.args)
    run.document["references"] = {"match": None, "rows": []}
    assert "No published value is known for this model or its family." in Page(render_report(*run.args)).words


def test_hostile_addresses_are_no_links() -> None:
    run = factory_chain.make()
    run.document["references"]["rows"][0]["url"] = "javascript:alert(1)"
    found = published.beside(run.document)
    assert found is not None
    assert found.rows[0].url is None
    assert "javascript:" not in render_report(*run.args).split('<script type="application/json"')[0]


def test_relatives_are_not_compared() -> None:
    rows = [{"model": "Kin", "title": "Rate", "published": 3, "here": None, "status": "paper"}]
    found = published.beside({"references": {"match": "family", "rows": rows}})
    assert found is not None
    assert not found.compared
    assert "relatives" in found.lead


def test_the_strip_says_what_it_leaves_out() -> None:
    run = factory_chain.make()
    (strip,) = run.figures["sensitivity"]
    assert isinstance(strip, Intervals)
    many = tuple(replace(strip.rows[0], label=f"variant {i}") for i in range(31))
    run.figures["sensitivity"] = [replace(strip, rows=many)]
    html = render_report(*run.args)
    card = html[html.index('id="strip"') : html.index("<main>")]
    shown = card.count("<circle")
    assert 4 <= shown < 31
    assert f"{31 - shown} more in its section." in card


def test_tables_in_a_summary_are_tables() -> None:
    run = factory_chain.make()
    ranking = [{"layer": 2, "expert": 5, "lost": 0.887123456}, {"layer": 0, "expert": 1, "lost": 0.01}]
    summary = run.document["findings"]["causal-effects"]["summary"]
    summary |= {"ranking": ranking, "by_domain": {"code": 3, "prose": 0.25}}
    html = render_report(*run.args)
    section = html[html.index('id="causal-effects"') : html.index('id="sensitivity"')]
    assert "0.887123456" not in section
    words = Page(section).words
    assert "Ranking layer expert lost 2 5 0.887 0 1 0.0100" in words
    assert "by domain code: 3, prose: 0.25" in words


def test_pairs_are_heads_where_rows_are_about_heads() -> None:
    run = factory_chain.make()
    roles = run.document["findings"]["head-roles"]
    roles |= {"summary": {"switching": [[3, 0], [2, 1]]}, "labels": {"switching": "dormant on some queries"}}
    assert "L3H0" not in render_report(*run.args).split("<main>")[1]
    roles["rows"] = [{"layer": 3, "head": 0, "role": "switching"}]
    section = render_report(*run.args).split('id="head-roles"')[1].split("</section>")[0]
    assert "dormant on some queries" in section
    assert '<a href="#L3H0">L3H0</a>' in section


def test_many_sections_fold_into_two_rows_of_links() -> None:
    run = factory_chain.make()
    blank = run.document["findings"]["head-classes"]
    for i in range(12):
        run.document["findings"][f"reading-{i}"] = blank | {"title": f"A reading metric, number {i}"}
    html = render_report(*run.args)
    head = html[html.index("<nav") : html.index("</nav>")]
    direct, folded = head.split("<details>")
    assert 'href="#primary-sinks"' in direct
    assert 'href="#reading-11"' in folded
    assert {"#prompts", "#methods", "#manifest"} <= set(
        Page(folded.split("</details>")[1]).attributes("href")
    )


def test_many_figures_fold() -> None:
    run = factory_chain.make()
    (figure,) = run.figures["secondary-sinks"]
    run.figures["secondary-sinks"] = [replace(figure, key=f"f{i}", title=f"Figure {i}") for i in range(11)]
    html = render_report(*run.args)
    section = html[html.index('id="secondary-sinks"') : html.index('id="writers"')]
    shown, folded = section.split('<details class="more"><summary>3 more figures</summary>')
    assert "Figure 7" in shown
    assert "Figure 8" not in shown
    assert "Figure 10" in folded


def test_tiles_that_do_not_apply_give_way() -> None:
    tiles = [Tile(f"t{i}", "1", applicable=i != 2) for i in range(9)]
    shown, rest = first.split_tiles(tiles)
    assert [tile.label for tile in shown] == ["t0", "t1", "t3", "t4", "t5", "t6"]
    assert [tile.label for tile in rest] == ["t7", "t8", "t2"]
    few = first.split_tiles(tiles[:4])
    assert [tile.label for tile in few[0]] == ["t0", "t1", "t2", "t3"]


def test_text_is_left_out_of_rows_and_lines() -> None:
    run = factory_chain.make()
    html = render_report(*run.args, include_text=False)
    assert "position 7 &#39;,&#39;" not in html
    assert "position 0 &#39;The&#39;, dim 711" not in html
    assert "[text left out]" in html


def test_notebook_form_stays_small_with_many_findings() -> None:
    run = factory_chain.make(layers=48, heads=32, experts=128)
    html = run_repr_html(run.document, run.figures, run.tiles)
    assert len(html) < 100_000
    for line in run.document["verdict"]["lines"]:
        assert line["text"] in Page(html).words
