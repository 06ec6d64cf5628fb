"""Head classes against the plainest code on full maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.head_classes import HeadClasses
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace, with_sink
from .made_heads import head_record, softmax_maps

T = 97


def plain(weights: np.ndarray) -> dict[str, Any]:
    """The published definitions on one head's map `[query, key]`."""
    length = len(weights)
    tail = weights[max(length - 64, 0) :]
    m = tail.mean(0)
    relative = -sum(p * np.log(p) for p in m if p > 0) / np.log(length)
    if m[:4].sum() > 0.5:
        word = "strong sink"
    elif m[:4].sum() > 0.2:
        word = "moderate sink"
    elif relative > 0.8:
        word = "distributed"
    elif m.argmax() > 0.8 * length:
        word = "recency"
    else:
        word = "mixed"
    return {
        "class": word,
        "share_first": m[:4].sum(),
        "entropy_ratio": relative,
        "peak_at": m.argmax() / length,
    }


def five_heads(length: int = T) -> np.ndarray:
    """One head of every class."""
    weights = causal_uniform(1, 5, length)
    with_sink(weights, 0, 0, 1, 0.9)
    with_sink(weights, 0, 1, 2, 0.3)
    for query in range(length):
        recent = int(0.85 * length)
        weights[0, 3, query] = np.eye(length)[min(query, recent)]
        weights[0, 4, query] = np.eye(length)[min(query, 11)]
    return weights


def test_one_head_of_every_class() -> None:
    finding = HeadClasses().analyze(trace([head_record(five_heads())]))
    assert [row["class"] for row in finding.rows] == [
        "strong sink", "moderate sink", "distributed", "recency", "mixed"
    ]  # fmt: skip
    assert [row["head"] for row in finding.rows] == [0, 1, 2, 3, 4]
    assert finding.status is Status.FOUND
    assert "in 1 of 5 heads" in finding.verdict


@pytest.mark.parametrize("length", [64, 70, 131])
def test_classes_equal_the_published_rules(length: int) -> None:
    weights = softmax_maps(length, 2, 5, length)
    for head, share in enumerate((0.9, 0.45, 0.18)):
        with_sink(weights, 1, head, 0, share)
    finding = HeadClasses().analyze(trace([head_record(weights)]))
    assert len(finding.rows) == 10
    for row in finding.rows:
        for key, value in plain(weights[row["layer"], row["head"]]).items():
            assert row[key] == (value if isinstance(value, str) else pytest.approx(value)), key
        assert row["agreement"] == 1


def test_the_class_is_that_of_most_prompts() -> None:
    strong, weak = causal_uniform(1, 1, T), causal_uniform(1, 1, T)
    with_sink(strong, 0, 0, 0, 0.9)
    records = [head_record(w, index=i) for i, w in enumerate((strong, weak, strong))]
    finding = HeadClasses().analyze(trace(records))
    assert finding.rows[0]["class"] == "strong sink"
    assert finding.rows[0]["agreement"] == pytest.approx(2 / 3)
    assert "1 head has its class in fewer" in finding.notes[-1]


def test_no_sink_class_is_not_found_and_missing_layers_have_no_class() -> None:
    made = head_record(causal_uniform(3, 2, T))
    for name in ("attention_tail", "tail_entropy", "tail_peak"):
        made.arrays[name][1] = np.nan
    finding = HeadClasses().analyze(trace([made]))
    assert finding.status is Status.NOT_FOUND
    assert {row["layer"] for row in finding.rows} == {0, 2}
    assert finding.summary["n_heads"] == 4
    assert np.isnan(finding.figures[1].series[0].y[1])  # type: ignore[union-attr]


def test_not_applicable() -> None:
    analyzer = HeadClasses()
    short = analyzer.analyze(trace([record(causal_uniform(2, 3, 40))]))
    assert short.status is Status.NOT_APPLICABLE
    assert "at least 64 tokens; the longest has 40" in str(short.reason)
    old = analyzer.analyze(trace([record(causal_uniform(2, 3, 80))]))
    assert "does not hold attention_tail" in str(old.reason)
    none = analyzer.analyze(trace([head_record(causal_uniform(2, 3, 80))], attention=False))
    assert "no softmax attention" in str(none.reason)
    with pytest.raises(UsageError):
        HeadClasses(first=17)
    with pytest.raises(UsageError):
        HeadClasses(moderate=0.7)
