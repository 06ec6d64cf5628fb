"""Mean maps of the first tokens: probabilities and logits, means over heads and prompts."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.mean_maps import MeanMaps
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace, with_sink
from .made_heads import head_record

L, H = 7, 3


def prompt(seed: int, length: int, index: int = 0):
    """Random logits with more on the first key in layer 2, and their softmax."""
    logits = np.random.default_rng(seed).normal(size=(L, H, length, length))
    logits[2, :, :, 0] += 4
    seen = np.tril(np.ones((length, length), dtype=bool))
    weights = np.where(seen, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    return head_record(weights, logits=logits, index=index), weights, logits


def test_rows_equal_the_plainest_code() -> None:
    made = [prompt(seed, length, seed) for seed, length in ((0, 23), (1, 40))]
    finding = MeanMaps().analyze(trace([record for record, *_ in made]))
    assert [row["layer"] for row in finding.rows] == list(range(L))
    for row in finding.rows:
        first, own, first_logit, others = [], [], [], []
        for _, weights, logits in made:
            for head in range(H):
                for q in range(1, 16):
                    first.append(weights[row["layer"], head, q, 0])
                    own.append(weights[row["layer"], head, q, q])
                    first_logit.append(logits[row["layer"], head, q, 0])
                    others += [logits[row["layer"], head, q, k] for k in range(1, q + 1)]
        assert row["first_share"] == pytest.approx(np.mean(first))
        assert row["self_share"] == pytest.approx(np.mean(own))
        assert row["first_logit"] == pytest.approx(np.mean(first_logit))
        assert row["other_logit"] == pytest.approx(np.mean(others))
        assert row["uniform_share"] == pytest.approx(0.1587, abs=1e-4)
    assert finding.status is Status.FOUND
    assert finding.summary["layer"] == 2


def test_figures_say_what_they_show() -> None:
    made, weights, logits = prompt(5, 20)
    drawn = MeanMaps(shown=3).analyze(trace([made])).figures
    assert [figure.key for figure in drawn] == ["layer_0", "layer_3", "layer_6", "first"]
    values = drawn[1].values  # type: ignore[union-attr]
    assert np.isnan(values[0, 1])
    assert values[5, 2] == pytest.approx(logits[3, :, 5, 2].mean())
    assert "logits" in drawn[1].title
    shares = MeanMaps(of="probabilities", shown=3).analyze(trace([made])).figures[1]
    assert "probabilities" in shares.title
    assert shares.values[5, 2] == pytest.approx(weights[3, :, 5, 2].mean())  # type: ignore[union-attr]


def test_hidden_logits_fall_back_to_probabilities() -> None:
    made, _weights, _ = prompt(6, 30)
    del made.arrays["prefix_logits"]
    finding = MeanMaps().analyze(trace([made]))
    assert finding.summary["drawn"] == "probabilities"
    assert "not visible" in finding.notes[0]
    assert "first_logit" not in finding.rows[0]


def test_uniform_attention_is_not_found_and_short_prompts_are_left_out() -> None:
    records = [head_record(causal_uniform(1, 2, 40)), head_record(causal_uniform(1, 2, 9), index=1)]
    finding = MeanMaps().analyze(trace(records))
    assert finding.status is Status.NOT_FOUND
    assert finding.rows[0]["first_share"] == pytest.approx(finding.rows[0]["uniform_share"])
    assert "1 prompt shorter than 16" in finding.notes[-1]


def test_layers_without_attention_have_no_row() -> None:
    weights = causal_uniform(3, 2, 40)
    with_sink(weights, 2, 0, 0, 0.9)
    made = head_record(weights)
    made.arrays["prefix_map"][1] = np.nan
    finding = MeanMaps(of="probabilities").analyze(trace([made]))
    assert [row["layer"] for row in finding.rows] == [0, 2]


def test_not_applicable_and_settings() -> None:
    assert MeanMaps().analyze(trace([head_record(causal_uniform(1, 2, 9))])).status is Status.NOT_APPLICABLE
    assert "prefix_map" in str(MeanMaps().analyze(trace([record(causal_uniform(1, 2, 40))])).reason)
    with pytest.raises(UsageError):
        MeanMaps(of="scores")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        MeanMaps(shown=0)
