"""The comparison page: what differs, one row per run, plots over one axis, inert to hostile text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinklens.core.errors import DataError
from sinklens.core.figures import Lines, Series
from sinklens.report import read_report, render_comparison, write_comparison
from sinklens.report.comparison import group, notes, sentence, table, title

from .chromium import Browser
from .parsed import HOSTILE, Page

QUANTITIES = ("sink_rate", "share", "norm_ratio", "super_experts")


def row(name: str, x: float, **changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"run": name, "x": x, "verdict": "sink", "model": "example/synthetic"}
    made |= {"strongest_position": 0, "sink_rate": 41.0625, "share": 0.123456789, "value_drain": None}
    made |= {"strongest_head": 0.9, "norm_ratio": 731.5, "max_ratio": 12345.6, "massive_dims": [711, 1415]}
    return made | {"super_experts": None} | changed


def comparison(names: list[str], steps: list[float] | None = None) -> tuple[dict[str, Any], list[Lines]]:
    """Runs whose sink rate grows by 7.25 from run to run; the second one read other prompts."""
    xs = steps or [float(i) for i in range(len(names))]
    rows = [
        row(name, x, sink_rate=13.5 + 7.25 * i) for i, (name, x) in enumerate(zip(names, xs, strict=True))
    ]
    differences: dict[str, Any] = {name: {} for name in names[1:]}
    differences[names[1]] = {"inputs.n_prompts": [8, 17], "versions.torch": ["2.13.0", None]}
    label = "training step" if steps else "run"
    return document(rows, label, differences), plots(rows, label)


def document(rows: list[dict[str, Any]], label: str, differences: dict[str, Any]) -> dict[str, Any]:
    return {"schema": "sinklens/compare/1", "x_label": label, "rows": rows, "differences": differences}


def plots(rows: list[dict[str, Any]], label: str) -> list[Lines]:
    x = np.array([r["x"] for r in rows])
    figures = []
    for name in QUANTITIES:
        y = np.array([np.nan if r[name] is None else float(r[name]) for r in rows])
        if np.isfinite(y).sum() >= 2:
            caption = f"Plot of {name}, one point per run, by {label}."
            figures.append(
                Lines(name, f"Plot of {name}", caption, (Series(name, x, y, True),), label, "unit")
            )
    return figures


def page(names: list[str], steps: list[float] | None = None) -> Page:
    return Page(render_comparison(*comparison(names, steps)))


def drawings(shown: Page) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in shown.elements if tag == "svg" and attrs.get("role") == "img"]


def test_the_file_is_complete_and_holds_its_data(tmp_path: Path) -> None:
    record, figures = comparison(["run-a", "run-b", "run-c"])
    path = write_comparison(tmp_path / "deep" / "comparison.html", record, figures)
    assert [p.name for p in path.parent.iterdir()] == ["comparison.html"]
    html = path.read_text(encoding="utf-8")
    assert html == render_comparison(record, figures)
    shown = Page(html)
    data, program = shown.scripts
    assert data[0] == {"type": "application/json", "id": "sinklens-compare"}
    assert json.loads(data[1])["document"] == record
    policy = next(a["content"] for t, a in shown.elements if t == "meta" and a.get("http-equiv")) or ""
    digest = base64.b64encode(hashlib.sha256(program[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy
    for name in ("src", "href", "srcset", "data"):
        assert all(value.startswith(("#", "data:")) for value in shown.attributes(name))
    ids = shown.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in shown.attributes("href") if href.startswith("#")} <= set(ids)


def test_a_comparison_is_not_read_as_a_run(tmp_path: Path) -> None:
    path = write_comparison(tmp_path / "c.html", *comparison(["a", "b"]))
    with pytest.raises(DataError, match="is a comparison of runs"):
        read_report(path)


@pytest.mark.parametrize(
    "record",
    [
        {"schema": "sinklens/run/1", "rows": [row("a", 0.0)]},
        {"schema": "sinklens/compare/1", "rows": []},
        {},
    ],
)
def test_other_documents_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not the document of a sinklens comparison") as caught:
        render_comparison(record, [])
    assert len(str(caught.value).splitlines()) <= 4


def test_one_row_per_run_with_verdicts_in_words_and_shapes() -> None:
    states = {"sink": "Attention sink", "no-sink": "No attention sink", "untrusted": "Not trustworthy"}
    states |= {"unknown": "Not measured"}
    rows = [row(f"run-{i}", float(i), verdict=status) for i, status in enumerate(states)]
    html = render_comparison(document(rows, "run", {}), plots(rows, "run"))
    section = html[html.index('id="runs"') : html.index('id="plots"')]
    body = re.findall(r"<tr>(.*?)</tr>", section, flags=re.DOTALL)[1:]
    shapes = []
    for i, (line, words) in enumerate(zip(body, states.values(), strict=True)):
        assert f"<th scope=row><bdi>run-{i}</bdi></th>" in line
        assert f"<bdi>{words}</bdi>" in line
        shapes.append(re.findall(r"<svg.*?</svg>", line, flags=re.DOTALL))
    assert [len(shape) for shape in shapes] == [1] * 4
    assert len({shape[0] for shape in shapes}) == 4


def test_numbers_read_as_in_the_report() -> None:
    rows = [
        row("a", 0.0),
        row("b", 1.0, sink_rate=None, massive_dims=[], max_ratio=3.1e-7),
        row("c", 2.0, massive_dims=list(range(9))),
    ]
    built = table(rows, "run")
    by_name = {c.key: [made.cells[i].shown for made in built.rows] for i, c in enumerate(built.columns)}
    assert by_name["sink_rate"] == ["41.1", "–", "41.1"]
    assert by_name["share"] == ["0.123"] * 3
    assert by_name["norm_ratio"] == ["732"] * 3
    assert by_name["max_ratio"] == ["12\u202f346", "3.10 × 10⁻⁷", "12\u202f346"]
    assert by_name["massive_dims"] == ["711, 1415", "none", "0, 1, 2, 3, 4, 5 and 3 more"]
    assert built.csv_link is not None
    assert "0.123456789" in built.csv_link


def test_columns_stand_only_where_they_say_something() -> None:
    same = table([row("a", 0.0), row("b", 1.0)], "run")
    assert {"model", "x", "number", "super_experts", "value_drain"} & {c.key for c in same.columns} == set()
    other = table([row("a", 0.0), row("b", 1.0, model="other", super_experts=3)], "run")
    assert {"model", "super_experts"} <= {c.key for c in other.columns}
    steps = table([row("a", 1000.0), row("b", 20000.0)], "training step")
    at = [c.key for c in steps.columns].index("training step")
    assert [made.cells[at].shown for made in steps.rows] == ["1000", "20\u202f000"]
    many = table([row(f"r{i}", float(i)) for i in range(13)], "run")
    assert "number" in {c.key for c in many.columns}
    assert "In no run: value drain, super experts." in page(["a", "b"]).words


def test_titles_say_which_runs_and_over_what() -> None:
    assert title([row("a", 0.0), row("b", 1.0)], "run") == "2 runs of example/synthetic side by side: a and b"
    many = [row(f"r{i}", float(i), model=f"m{i}") for i in range(7)]
    assert title(many, "run") == "7 runs side by side: r0, r1, r2 and 4 more"
    steps = [row("s-5", 5.0), row("s-9", 20000.0)]
    assert title(steps, "training step") == "2 runs of example/synthetic over training step 5 to 20\u202f000"


def test_the_sentence_counts_sinks_and_gives_the_range_of_the_rate() -> None:
    rows = [row("a", 0.0, sink_rate=50.0), row("b", 1.0, sink_rate=9.04), row("c", 2.0, sink_rate=20.0)]
    rows[1]["verdict"] = "no-sink"
    assert sentence(rows, "run") == (
        "2 of 3 runs have an attention sink; the sink rate of the strongest position lies between "
        "9.0 % (b) and 50.0 % (a)."
    )
    assert sentence(rows, "training step").endswith("goes from 50.0 % (a) to 20.0 % (c).")
    alone = [row("a", 0.0), row("b", 1.0, sink_rate=None, verdict="untrusted")]
    assert sentence(alone, "run") == "1 of 2 runs has an attention sink."


def test_differences_are_grouped_by_runs_that_agree() -> None:
    rows = [row(name, float(i)) for i, name in enumerate("abcde")]
    changed = {"versions.torch": ["2.13.0", "2.14.0"], "inputs.n_prompts": [8, 17]}
    differences = {"b": {}, "c": changed, "d": {}, "e": changed | {"inputs.first_tokens.<s>": [8, None]}}
    found = group(rows, differences)
    assert found.groups == ("a, b, d", "c", "e")
    assert [(s.name, s.values) for s in found.first] == [
        ("inputs › n prompts", ("8", "17", "17")),
        ("versions › torch", ("2.13.0", "2.14.0", "2.14.0")),
    ]
    assert [(s.name, s.values) for s in found.rest] == [("inputs › first tokens › <s>", ("8", "8", "–"))]


def test_many_differences_are_folded_the_telling_ones_first() -> None:
    rows = [row("a", 0.0), row("b", 1.0)]
    changed = {f"versions.package-{i:02d}": ["1", "2"] for i in range(11)}
    changed |= {"tracing.mode": ["faithful", "eager"], "inputs.sha256": ["ab" * 32, "cd" * 32]}
    found = group(rows, {"b": changed})
    assert [s.name for s in found.first][:3] == ["inputs › sha256", "tracing › mode", "versions › package-00"]
    assert found.first[0].values == ("abababababab…", "cdcdcdcdcdcd…")
    assert (len(found.first), len(found.rest)) == (8, 5)
    html = render_comparison(document(rows, "run", {"b": changed}), [])
    assert "<summary>5 more details</summary>" in html


def test_runs_that_agree_are_said_to_agree() -> None:
    rows = [row("a", 0.0), row("b", 1.0)]
    words = Page(render_comparison(document(rows, "run", {"b": {}}), [])).words
    assert "Nothing: the manifests agree" in words
    assert "No number is known for at least two runs" in words


def test_notes_name_what_spoils_the_comparison() -> None:
    rows = [row("a", 0.0), row("b", 1.0, verdict="untrusted")]
    found = notes(rows, {"b": {"inputs.sha256": ["x", "y"], "inputs.longest": [64, 512]}})
    assert [note.split(":")[0].split(",")[0] for note in found] == [
        "A check failed in b",
        "The runs did not read the same prompts",
        "The prompts differ in length between the runs",
    ]
    assert notes([row("a", 0.0)], {"b": {"versions.torch": ["1", "2"]}}) == []


def test_plots_share_one_axis_even_where_values_are_missing() -> None:
    rows = [row(f"step-{x}", float(x)) for x in (20, 100, 700)]
    rows[2]["norm_ratio"] = None
    rows[0] |= {"super_experts": None}
    for later in rows[1:]:
        later["super_experts"] = 3
    shown = drawings(
        Page(render_comparison(document(rows, "training step", {}), plots(rows, "training step")))
    )
    assert len(shown) == 4
    assert {attrs["data-x"] for attrs in shown} == {"20 700"}
    boxes = {tuple((attrs["data-plot"] or "").split()[::2]) for attrs in shown}
    assert len(boxes) == 1


def test_steps_are_joined_and_other_runs_are_not() -> None:
    over_steps = render_comparison(*comparison(["step-5", "step-30", "step-70"], [5.0, 30.0, 70.0]))
    beside = render_comparison(*comparison(["a", "b", "c"]))
    assert over_steps.count('class="line"') == len(drawings(Page(over_steps)))
    assert 'class="line"' not in beside
    assert over_steps.count('class="mark"') == beside.count('class="mark"') == 3 * len(drawings(Page(beside)))


def test_ticks_are_names_while_they_have_room() -> None:
    few, many = ["base", "instruct"], [f"a-long-name-{i}" for i in range(17)]
    svg = render_comparison(*comparison(few)).split('id="plots"')[1]
    assert len(re.findall(r'text-anchor="middle">(base|instruct)<', svg)) == 2 * len(drawings(page(few)))
    svg = render_comparison(*comparison(many)).split('id="plots"')[1]
    assert "a-long-name" not in svg.split("<script")[0]
    assert 'text-anchor="middle">15<' in svg


def test_what_all_plots_have_in_common_is_said_once() -> None:
    words = page(["a", "b"]).words
    assert words.count("One point per run, by run.") == 1
    assert "Plot of share" in words


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text(text: str) -> None:
    def made(word: str) -> str:
        rows = [
            row(word, 0.0, model=word),
            row(f"{word} (1)", 1.0, verdict=word, massive_dims=[word]),
        ]
        record = document(rows, word, {f"{word} (1)": {f"inputs.{word}": [word, {word: [word]}]}})
        x = np.arange(2.0)
        return render_comparison(record, [Lines(word, word, word, (Series(word, x, x),), word, word)])

    html = made(text)
    shown, clean = Page(html), Page(made("word"))
    assert {tag for tag, _ in shown.elements} == {tag for tag, _ in clean.elements}
    assert len(shown.scripts) == 2
    block = shown.scripts[0][1]
    assert shown.scripts[1][1] == clean.scripts[1][1]
    assert block.isascii()
    assert not set(block) & set("<>&")
    assert json.loads(block)["document"]["rows"][0]["run"] == text
    outside = html.replace(block, "")
    assert not re.search(
        "[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", outside
    )
    assert not [name for _, attrs in shown.elements for name in attrs if name.startswith("on")]
    before_plots = outside[: outside.index('id="plots"')]
    assert "x" * 500 not in re.sub(r"data:text/csv[^\"]*", "", before_plots)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser: Browser, width: int) -> None:
    names = ["step-20", "step-100", "x" * 3000]
    driver = """
    answer.wide = document.documentElement.scrollWidth - innerWidth;
    const svg = document.querySelector("#plots svg.curves");
    const [x, y, w, h] = svg.dataset.plot.split(" ").map(Number);
    const at = new DOMPoint(x + 0.09 * w, y + h / 2).matrixTransform(svg.getScreenCTM());
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y, bubbles: true }));
    answer.read = svg.closest("figure").querySelector("output").textContent;
    const before = getComputedStyle(document.body).backgroundColor;
    for (const key of ["j", "k", "h", "l", "?", "/", "t"]) {
      document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    }
    answer.turned = before !== getComputedStyle(document.body).backgroundColor;
    const saved = {};
    HTMLAnchorElement.prototype.click = function () { saved[this.download] = true; };
    document.querySelector("[data-json]").click();
    answer.saved = Object.keys(saved);
    answer.scrollers = Array.from(document.querySelectorAll(".scroll"), (s) => s.tabIndex);
    """
    answer = browser.run(render_comparison(*comparison(names, [20.0, 100.0, 1000.0])), driver, width=width)
    assert answer["troubles"] == []
    assert answer["wide"] <= 0
    assert answer["read"] == "training step 100: 20.8"
    assert answer["turned"] is True
    assert answer["saved"] == ["comparison.json"]
    assert set(answer["scrollers"]) == {0}
