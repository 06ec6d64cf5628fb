"""Text from models and users: it stays text, it stays readable, and it stays at home when asked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sinklens.report import read_report, render_report, write_report

from . import factory
from .parsed import HOSTILE, Page, poisoned


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_everywhere(text: str) -> None:
    run = poisoned(text)
    html = render_report(*run.args, title=text, methods_paragraph=text)
    page = Page(html)
    clean = Page(render_report(*poisoned("word").args, title="word", methods_paragraph="word"))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements} | {"code"}
    assert len(page.scripts) == 2
    assert page.scripts[1][1] == clean.scripts[1][1]
    block = page.scripts[0][1]
    assert not set(block) & set("<>&\u2028\u2029")
    assert block.isascii()
    assert page.data()["document"]["findings"][text]["rows"] == [{text: text, "token": text}]
    outside = html.replace(block, "")
    assert not re.search(
        "[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", outside
    )
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert all(h.startswith(("#", "data:", "https://")) for h in page.attributes("href"))
    outside.encode("utf-8")


def test_long_tokens_are_cut_in_the_page() -> None:
    run = factory.make()
    run.document["findings"]["primary-sinks"]["rows"][0]["token"] = "y" * 9000
    run.prompts[0]["pieces"][0] = "y" * 9000
    html = render_report(*run.args)
    assert "y" * 81 not in re.sub(r"<script.*?</script>|data:text/csv[^\"]*", "", html, flags=re.DOTALL)


def test_round_trip_of_hostile_and_strange_values(tmp_path: Path) -> None:
    run = factory.make()
    row = run.document["findings"]["primary-sinks"]["rows"][0]
    row["token"] = "".join(HOSTILE)
    row["share"] = np.float32(0.25)
    row["lift"] = float("nan")
    row["rate"] = np.int64(3)
    path = write_report(tmp_path / "r.html", *run.args)
    back = read_report(path)["findings"]["primary-sinks"]["rows"][0]
    assert back["token"] == "".join(HOSTILE)
    assert (back["share"], back["lift"], back["rate"]) == (0.25, None, 3)


def test_without_text_no_token_is_left(tmp_path: Path) -> None:
    run = factory.make()
    secret = " Zanzibar"
    for prompt in run.prompts:
        prompt["pieces"] = [secret] * len(prompt["pieces"])
    finding = run.document["findings"]["primary-sinks"]
    finding["rows"][0] |= {"token": secret, "token_id": 987654}
    finding["verdict"] = (
        "The sink is 'Zanzibar' (\"Zanzibar\", ' Zanzibar', `Zanzibar`, “Zanzibar”); 'other' stays."
    )
    run.document["verdict"]["text"] = "Sink on ' Zanzibar'."
    run.document["manifest"]["inputs"]["first_tokens"] = {secret: 3}
    run.document["manifest"]["command"] = [
        "sinklens",
        "profile",
        "--prompt",
        "Go to Zanzibar",
        "--prompts",
        "a.txt",
    ]
    run.tiles[0] = replace(run.tiles[0], note="on 'Zanzibar'")
    run.tiles[2] = replace(run.tiles[2], value="position 0 · Zanzibar")
    finding["summary"]["max_token"] = secret
    run.figures["primary-sinks"][0] = replace(run.figures["primary-sinks"][0], caption="To 'Zanzibar'.")
    path = write_report(tmp_path / "r.html", *run.args, include_text=False)
    html = path.read_text(encoding="utf-8")
    assert "Zanzibar" not in html
    assert "987654" not in html
    assert "'other' stays" in json.dumps(read_report(path))
    assert "a.txt" in html
    for prompt in run.prompts:
        assert prompt["sha256"] in html
    assert Page(html).data()["tokens"] is None
    assert "Zanzibar" in render_report(*run.args)
