"""Tokens that could go at a fixed loss: by hand, for both distributions together."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import AttentionDivergence, Status
from sinklens.analyzers.attention_divergence import removable
from sinklens.core.errors import UsageError

from .made_visual import VISUAL, record, trace


def test_the_smallest_go_first() -> None:
    values = np.array([0.4, 0.05, 0.3, 0.05, 0.2])
    assert removable(values, 0.1).tolist() == [False, True, False, True, False]
    assert removable(values, 0.09).tolist() == [False, True, False, False, False]
    assert not removable(values, 0.0).any()
    assert removable(np.array([0.0, 1.0]), 0.0).tolist() == [True, False]


def test_both_distributions_must_agree() -> None:
    text, visual = np.full(VISUAL, 0.001), np.full(VISUAL, 0.001)
    text[:4], visual[2:6] = 1.0, 1.0
    given = np.stack([np.stack([text, visual]), np.ones((2, VISUAL))])
    finding = AttentionDivergence().analyze(trace([record(0, head_max_received=given)], 2))
    assert finding.status is Status.FOUND
    assert finding.rows[0]["by_text"] == 16 / 20
    assert finding.rows[0]["by_visual"] == 16 / 20
    assert finding.rows[0]["removable"] == 14 / 20
    assert finding.rows[1]["removable"] == 2 / 20  # even: a tenth of the tokens is a tenth of the attention
    assert finding.summary["most_layer"] == 0
    assert (
        AttentionDivergence(loss=0.0).analyze(trace([record(0, head_max_received=given)], 2)).status
        is Status.NOT_FOUND
    )


def test_reasons() -> None:
    assert AttentionDivergence().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
    nothing = np.zeros((2, 2, VISUAL))
    assert (
        AttentionDivergence().analyze(trace([record(0, head_max_received=nothing)], 2)).status
        is Status.NOT_APPLICABLE
    )
    with pytest.raises(UsageError, match="loss"):
        AttentionDivergence(loss=1.0)
