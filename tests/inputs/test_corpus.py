"""The bundled corpora are what their README says."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from sinklens.inputs import list_corpora
from sinklens.inputs.corpus import CORPORA, DOMAINS, corpus_rows, read_corpus

ROWS = {domain: corpus_rows(domain) for domain in DOMAINS}


def words(text: str) -> int:
    """Words and groups of signs: no common tokenizer needs fewer tokens for ordinary text, so a lower bound."""
    return len(re.findall(r"\w+|[^\w\s]+", text))


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_are_complete(domain):
    assert len(ROWS[domain]) == 28
    for row in ROWS[domain]:
        assert set(row) == {"text", "domain", "title", "licence", "source"}
        assert row["domain"] == domain
        assert row["licence"] in ("CC0-1.0", "public domain")
        assert (row["licence"] == "CC0-1.0") == (row["source"] == "written for sinklens")
        assert all(row.values())
        assert "\r" not in row["text"]
        assert "\ufffd" not in row["text"]


def test_no_text_twice_and_no_filler():
    texts = [row["text"] for rows in ROWS.values() for row in rows]
    assert len(set(texts)) == 112
    sentences = [s.strip() for t in texts for s in re.split(r"(?<=[.!?])\s|\n", t) if len(s.strip()) > 40]
    assert len(set(sentences)) > 0.995 * len(sentences)


def test_lengths_serve_the_two_protocols():
    texts = [row["text"] for rows in ROWS.values() for row in rows]
    assert sum(words(text) >= 64 for text in texts) >= 100
    assert {domain: sum(words(row["text"]) >= 500 for row in rows) for domain, rows in ROWS.items()} == {
        "prose": 16,
        "code": 8,
        "mathematics": 8,
        "dialogue": 13,
    }


def test_python_examples_compile():
    found = [row for row in ROWS["code"] if "(Python)" in row["title"]]
    assert len(found) >= 5
    for row in found:
        compile(row["text"], row["title"], "exec")


def test_listing():
    listed = {info.name: info for info in list_corpora()}
    assert list(listed) == list(CORPORA)
    assert listed["mixed"].n_prompts == sum(listed[domain].n_prompts for domain in DOMAINS) == 112
    assert listed["mixed"].n_characters == sum(listed[domain].n_characters for domain in DOMAINS)
    assert len({info.sha256 for info in listed.values()}) == 5


def test_the_readme_counts_right():
    text = (files("sinklens.inputs") / "corpora" / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (\w+)\.jsonl \| (\d+) \|", text, flags=re.MULTILINE))
    assert table == {domain: str(len(rows)) for domain, rows in ROWS.items()}


def test_mixed_is_all_domains_in_order():
    source = read_corpus("mixed")
    assert [d.domain for d in source.documents] == [domain for domain in DOMAINS for _ in range(28)]
    assert source.documents[30].source == "corpus:mixed#30"
    assert source.groups
    assert not read_corpus("code").groups
