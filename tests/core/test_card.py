"""Cards for notebooks: complete, small, and inert whatever stands in them."""

from __future__ import annotations

from sinklens.core.card import card


def test_it_says_everything_and_how_many_rows_there_are() -> None:
    rows = [{"layer": i, "value": i / 3, "kept": i % 2 == 0, "gone": None} for i in range(12)]
    html = card("Sinks", "Two sinks.", ["Mind the gap."], rows, {"value": "share"})
    for said in ("Sinks", "Two sinks.", "Mind the gap.", "share", "0.3333", "yes", "no", "–"):
        assert said in html
    assert "The first 10 of 12 rows." in html
    assert ">11<" not in html


def test_hostile_text_is_inert_and_visible() -> None:
    text = "<script>alert(1)</script>\u202e\x00"
    html = card(text, text, [text], [{text: text}], {text: text}, below="<b>kept</b>")
    assert "<script" not in html
    assert "\u202e" not in html
    assert "\\u202e" in html
    assert "\\x00" in html
    assert html.endswith("<b>kept</b></div>")


def test_long_texts_and_wide_tables_stay_small() -> None:
    row = {f"{i}" * 50: "x" * 5000 for i in range(40)}
    assert len(card("t" * 9000, "s" * 9000, ["n" * 9000] * 30, [row] * 100)) < 150_000
