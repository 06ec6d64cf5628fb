"""Sentences count correctly: one prompt is not "1 prompts", one layer no "layers 1 to 1", and one thing "is"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import sinklens as sl
from sinklens.analyzers import registry
from sinklens.analyzers.base import Finding
from sinklens.core.counts import counted, verb
from sinklens.report import render_report

THINGS = (
    "prompt|picture|token|head|layer|position|place|patch|item|row|dim|entry|expert|sink|finding|check|warning|block|run|"
    "neuron|step|direction|change|word|projection|query|cell|figure|variant"
)
_MANY = THINGS.replace("|", "s|") + "s|entries|queries|patches|others"
_BEFORE = r"(?<![\d.,+−-])(?<!of )(?<!layer )(?<!head )(?<!block )(?<!position )(?<!first )(?<!last )\b"
_PLURAL = r"(?:become|have|are|were|hold|do|prefer|rest|recur|rise)\b"
_END = r"(?=[.;,)]|$| (?:and|in|of|is|are|have|were)\b)"
WRONG = (
    re.compile(rf"{_BEFORE}1 (?:\w+ )?(?:{_MANY})\b"),
    re.compile(rf"{_BEFORE}1 (?:\w+ )?(?:{THINGS}|other)\b(?: [\w']+){{0,4}} {_PLURAL}"),
    re.compile(rf"\b1 of \d+ (?:\w+ )?(?:{_MANY}) {_PLURAL}"),
    re.compile(r"\b(?:layers|positions|blocks|heads) (\d+) to \1\b(?!\.\d)"),
    re.compile(rf"(?<![\d.,/])\b(?:[2-9]|[1-9]\d+) (?:{THINGS}){_END}"),
    re.compile(r"\w\(s\)"),
)


def sentences(finding: Finding) -> Iterator[str]:
    yield finding.verdict
    yield from finding.notes
    yield finding.reason or ""
    for tile in finding.tiles:
        yield tile.note
    for figure in finding.figures:
        yield figure.caption
        for page in getattr(figure, "pages", ()):
            yield page.sentence


def wrong(text: str) -> list[str]:
    text = re.sub(r"\((?:layer \d+ head \d+(?:, )?)+\)|layer \d+ head \d+", "a head", text)
    return [match.group() for pattern in WRONG for match in pattern.finditer(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Mean over 1 prompts of it.", ["1 prompts"]),
        ("1 place of the tower's sequence become no token.", ["1 place of the tower"]),
        ("1 other positions are sinks too.", ["1 other positions"]),
        ("1 of 8 heads are dormant.", ["1 of 8 heads are"]),
        ("in layers 1 to 1 (even: 8 %)", ["layers 1 to 1"]),
        ("It has 3 prompt.", ["3 prompt"]),
        ("1 prompt is, 2 prompts are, 0 prompts are; 1 of 8 heads is; layers 1 to 3, layer 1 heads.", []),
        ("above 1 in 21 prompts, 1.1 prompts per picture, 2.1 times; layer 2 head 1, layer 1 head 0", []),
    ],
)
def test_the_rules_see_what_is_wrong_and_nothing_else(text: str, found: list[str]) -> None:
    seen = wrong(text)
    assert bool(seen) == bool(found)
    assert all(said.startswith(begin[:8]) for said, begin in zip(seen, found, strict=False))


def test_numbers_with_nouns() -> None:
    assert [counted(n, "prompt") for n in (0, 1, 2)] == ["0 prompts", "1 prompt", "2 prompts"]
    assert counted(2, "entry", "entries") == "2 entries"
    assert [verb(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]


@pytest.mark.parametrize("name", ["dense-ind", "moe-ind", "vlm-shapes"])
def test_every_analyzer_counts_correctly(name: str) -> None:
    run = sl.profile(f"bundled:{name}", n=4, analyzers=["all"], verify=True)
    bad: dict[str, Any] = {}
    for n, starts in ((4, (0,)), (2, (0,)), (1, (1, 3))):
        for start in starts:
            part = replace(run.trace, records=run.trace.records[start : start + n])
            for key, cls in registry.items():
                found = {w: text for text in sentences(cls().read(part)) for w in wrong(text)}
                bad |= {f"{key}: {w}": text for w, text in found.items()}
    assert bad == {}


@pytest.mark.parametrize("n", [1, 3])
def test_reports_count_correctly(n: int) -> None:
    run = sl.profile("bundled:moe-ind", n=n, analyzers=["primary-sinks", "massive-activations"])
    prompts = [record.describe() for record in run.trace]
    html = render_report(run.document, run.figures, run.tiles, prompts, [])
    shown = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", html, flags=re.DOTALL)
    pieces = [" ".join(piece.split()) for piece in re.split(r"<(?!/?(?:b|bdi|code|span)\b)[^>]+>", shown)]
    assert [piece for piece in pieces if wrong(re.sub(r"<[^>]+>", "", piece))] == []
