"""The small parts: numbers, strings, tags, tables, formulas."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklens.analyzers import registry
from sinklens.report import numbers, tables, text
from sinklens.report.marks import KEPT, SHOWN, marks
from sinklens.report.mathml import formula


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (7, "7"),
        (12345, "12\u202f345"),
        (-12345, "−12\u202f345"),
        (0.0, "0"),
        (0.123456789, "0.123"),
        (9.87654321, "9.88"),
        (0.3, "0.300"),
        (1.125, "1.13"),
        (100.5, "101"),
        (999.96, "1000"),
        (0.00999999, "0.0100"),
        (123456.7, "123\u202f457"),
        (9999999.9, "1.00 × 10⁷"),
        (3.1e-7, "3.10 × 10⁻⁷"),
        (-2.5e-12, "−2.50 × 10⁻¹²"),
        (float("nan"), "n/a"),
        (float("-inf"), "−∞"),
    ],
)
def test_number(value: object, shown: str) -> None:
    assert numbers.number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_number_is_short_and_means_the_value(value: float) -> None:
    shown = numbers.number(value)
    assert len(shown) <= 16
    plain = shown.replace("−", "-").replace("\u202f", "")
    if "×" in plain:
        mantissa, power = plain.split(" × 10")
        plain = f"{mantissa}e{power.translate(str.maketrans('⁻⁰¹²³⁴⁵⁶⁷⁸⁹', '-0123456789'))}"
    assert float(plain) == pytest.approx(value, rel=6e-3)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(100.0, "100"), (0.0, "0"), (99.97, "99.97"), (0.04, "0.04"), (84.6, "84.6"), (1e-9, "< 0.001")],
)
def test_percent_never_rounds_to_all_or_nothing(value: float, shown: str) -> None:
    assert numbers.percent(value) == shown


def test_other_readings() -> None:
    assert numbers.brief(0.3) == "0.3"
    assert numbers.brief(1e-5) == "1 × 10⁻⁵"
    assert numbers.brief(1000.0) == "1000"
    assert numbers.duration(108.4) == "1 min 48 s"
    assert numbers.duration(7620) == "2 h 07 min"
    assert numbers.size(3 * 2**30) == "3 GiB"
    assert numbers.size(17) == "17 B"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("", "∅"),
        (" the", "·the"),
        ("a b", "a b"),
        ("\n\t", "↵⇥"),
        ("\x00\x1b[31m", "␀␛[31m"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("a\u200bb", "a\\u200bb"),
        ("\u0301", "◌\u0301"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
        ("日本", "日本"),
    ],
)
def test_tokens_hide_nothing(raw: str, shown: str) -> None:
    assert text.token(raw) == shown


@given(st.text(alphabet=st.characters(), max_size=200))
def test_shown_tokens_are_short_and_without_invisible_characters(raw: str) -> None:
    import unicodedata

    shown = text.token(raw)
    assert shown
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert not re.search("[\u0300-\u036f]{4}", shown)


def test_long_tokens_are_cut_and_say_so() -> None:
    assert text.token("x" * 5000) == "x" * 80 + "… (+4920)"
    assert text.token("a" + "\u0301" * 60) == "a" + "\u0301" * 3


@pytest.mark.parametrize(
    "bad", ["javascript:alert(1)", "data:text/html,x", "https://a b", 'https://a"b', None, 3, ""]
)
def test_only_plain_web_addresses_become_links(bad: object) -> None:
    assert text.web_link(bad) is None
    assert text.repository_link(bad) is None


def test_prose_sets_names_as_code_and_escapes_both() -> None:
    shown = text.prose("a `b<c>` <d> \u202e `e` `unclosed")
    assert shown == "a <code>b&lt;c&gt;</code> &lt;d&gt; \\u202e <code>e</code> `unclosed"


def test_good_links() -> None:
    assert text.web_link("https://arxiv.org/abs/2410.10781") == "https://arxiv.org/abs/2410.10781"
    assert text.repository_link("sail-sg/Attention-Sink") == "https://github.com/sail-sg/Attention-Sink"


def test_tables() -> None:
    rows = [{"layer": 3, "head": 2, "token": " <b>", "share": 0.123456789}, {"layer": 1, "extra": [1, 2]}]
    built = tables.table(rows, {"share": "share"})
    assert built is not None
    assert [column.key for column in built.columns] == ["layer", "head", "token", "share", "extra"]
    cells = built.rows[0].cells
    assert [cell.shown for cell in cells] == ["3", "2", "·<b>", "0.123", "–"]
    assert cells[0].link == cells[1].link == "#L3H2"
    assert cells[2].token
    assert built.indexed
    assert tables.table([], {}) is None


def test_long_units_stand_below_the_table() -> None:
    built = tables.table(
        [{"rate": 84.58, "share": 0.5}], {"rate": "% of (prompt, layer, head)", "share": "share"}
    )
    assert built is not None
    rate, share = built.columns
    assert (rate.header_unit, rate.explained) == ("%", "% of (prompt, layer, head)")
    assert (share.header_unit, share.explained) == ("", "")
    assert built.rows[0].cells[0].shown == "84.6"


def test_csv_is_exact_but_runs_nothing() -> None:
    rows = [
        {"token": "=HYPERLINK(1)", "value": 0.1},
        {"token": "=", "value": None},
        {"token": 'a,"b"\n', "value": 3},
    ]
    assert tables.as_csv(rows) == 'token,value\r\n\'=HYPERLINK(1),0.1\r\n=,\r\n"a,""b""\n",3\r\n'


def test_formulas_are_mathematics_or_text() -> None:
    good = (
        '<math xmlns="http://www.w3.org/1998/Math/MathML" onclick="x">'
        '<mi mathvariant="bold">A</mi><mo>&lt;</mo></math>'
    )
    assert formula(good) == '<math><mi mathvariant="bold">A</mi><mo>&lt;</mo></math>'
    assert formula("") == ""
    assert formula("<math><mi>f</mi><mo>\u2061</mo><mi>\u202e</mi></math>") == (
        "<math><mi>f</mi><mo>\u2061</mo><mi>\\u202e</mi></math>"
    )
    for bad in (
        "<math><script>alert(1)</script></math>",
        '<math><mi href="javascript:x">a</mi><img src="x"/></math>',
        "<img src=x onerror=alert(1)>",
        "<!DOCTYPE a><math/>",
        "A_{qk} < 1",
    ):
        shown = formula(bad)
        assert shown.startswith("<code>")
        assert "<script" not in shown
        assert "<img" not in shown


@pytest.mark.parametrize("name", sorted(registry))
def test_the_analyzers_formulas_pass_whole(name: str) -> None:
    source = registry[name].formula
    shown = formula(source)
    assert shown.startswith('<math display="block">')
    assert ET.canonicalize(shown) == ET.canonicalize(source)


def test_lists_of_heads_and_experts_are_labels_largest_first() -> None:
    found = marks("dormant_heads", [[2, 0, 0.25], [11, 7, 1.0], [0, 3, 0.25]])
    assert found is not None
    assert found.name == "dormant heads"
    assert [(m.label, m.value, m.link) for m in found.items] == [
        ("L11H7", "100 %", "#L11H7"),
        ("L0H3", "25.0 %", "#L0H3"),
        ("L2H0", "25.0 %", "#L2H0"),
    ]
    experts = marks("experts", [[3, 17, 480.25], [1, 5, 0.5]])
    assert experts is not None
    assert [(m.label, m.value, m.link) for m in experts.items] == [
        ("L3E17", "480", None),
        ("L1E5", "0.500", None),
    ]
    bare = marks("heads", [[4, 1], [0, 9]])
    assert bare is not None
    assert [(m.label, m.value) for m in bare.items] == [("L0H9", ""), ("L4H1", "")]


def test_long_lists_of_heads_are_cut_and_counted() -> None:
    found = marks("heads", [[i, 1, 0.5] for i in range(1000)])
    assert found is not None
    assert (len(found.first), len(found.rest), found.total) == (SHOWN, KEPT - SHOWN, 1000)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("heads", []),
        ("heads", 3),
        ("heads", [1, 2]),
        ("heads", [[1]]),
        ("heads", [[1, 2, 3, 4]]),
        ("heads", [[1, 2, None]]),
        ("heads", [[1, 2, float("nan")]]),
        ("heads", [[1, -2, 0.5]]),
        ("heads", [[True, 2, 0.5]]),
        ("heads", [[1, 2, 0.5], "L1H2"]),
        ("groups", [[0, 3], [4, 7]]),
    ],
)
def test_other_lists_are_not_places(key: str, value: object) -> None:
    assert marks(key, value) is None
