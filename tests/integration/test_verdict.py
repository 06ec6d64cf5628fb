"""The run's main sentence: the chain in it, everything else in lines below, nothing when a check failed."""

from __future__ import annotations

from typing import Any

from sinklens.analyzers.base import Finding, Status, registry
from sinklens.pipeline.verdict import judge
from sinklens.tracers.selfcheck import Check


def _sinks(status: Status = Status.FOUND, **summary: Any) -> Finding:
    row = {
        "first_layer": 1,
        "last_layer": 3,
        "n_heads": 5,
        "position": 0,
        "token": "x",
        "share": 0.4,
        "lift": 6.0,
    }
    rows = [row | {"rate": 61.0}] if status is Status.FOUND else []
    own = {"epsilon": 0.3, "heads_in_all": 8, "learned_sink_mass": None} | summary
    return Finding(
        "primary-sinks", "Primary sinks", status, "No attention sink here.", summary=own, rows=rows
    )


def _other(name: str, status: Status = Status.FOUND, *, headline: bool = False) -> Finding:
    return Finding(name, name.title(), status, f"{name} says this.", headline=headline)


def _all(*findings: Finding) -> dict[str, Finding]:
    return {finding.analyzer: finding for finding in findings}


def test_links_of_the_chain_stand_in_the_sentence_and_others_in_lines() -> None:
    verdict = judge(_all(_sinks(), _other("a"), _other("b", headline=True), _other("c")), [])
    assert verdict.status == "sink"
    assert verdict.text.startswith("Strong attention sink on position 0 ('x')")
    assert verdict.text.endswith("b says this.")
    assert [(line.analyzer, line.title, line.text) for line in verdict.lines] == [
        ("a", "A", "a says this."),
        ("c", "C", "c says this."),
    ]
    assert verdict.to_json()["lines"][0] == {"analyzer": "a", "title": "A", "text": "a says this."}


def test_what_runs_only_on_request_comes_last() -> None:
    asked = next(name for name, cls in registry.items() if not cls.default)
    verdict = judge(_all(_sinks(), _other(asked), _other("b"), _other("c")), [])
    assert [line.analyzer for line in verdict.lines] == ["b", "c", asked]


def test_a_link_that_was_not_found_is_a_line() -> None:
    verdict = judge(_all(_sinks(), _other("b", Status.NOT_FOUND, headline=True)), [])
    assert "b says" not in verdict.text
    assert [line.analyzer for line in verdict.lines] == ["b"]


def test_what_does_not_apply_is_silent() -> None:
    verdict = judge(
        _all(_sinks(), _other("a", Status.NOT_APPLICABLE), _other("b", Status.NOT_APPLICABLE)), []
    )
    assert verdict.lines == ()
    assert "says" not in verdict.text


def test_no_sink_keeps_its_own_sentence_and_the_lines() -> None:
    verdict = judge(_all(_sinks(Status.NOT_FOUND), _other("a")), [])
    assert (verdict.status, verdict.text) == ("no-sink", "No attention sink here.")
    assert [line.analyzer for line in verdict.lines] == ["a"]
    learned = judge(_all(_sinks(Status.NOT_FOUND, learned_sink_mass=0.42)), [])
    assert "learned sink logits take 42 %" in learned.text


def test_a_failed_check_leaves_nothing_to_say() -> None:
    check = Check("row mass", passed=False, value=0.3, limit=0.1, detail="")
    verdict = judge(_all(_sinks(), _other("a"), _other("b", headline=True)), [check])
    assert verdict.status == "untrusted"
    assert verdict.lines == ()
    assert "says" not in verdict.text


def test_the_sentence_tells_few_links() -> None:
    links = [name for name, cls in registry.items() if cls.headline]
    assert 1 <= len(links) <= 4
    assert all(registry[name].default for name in links)
