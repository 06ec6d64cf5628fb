"""TTV: the worked examples of paper and program, the band of layers, and the ranking."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status, TokenTransitions
from sinklens.analyzers.token_transitions import band, top_share, transition_variation
from sinklens.core.errors import UsageError

from .made_visual import LENGTH, VISUAL, record, trace


def test_the_worked_examples() -> None:
    m, d = np.array([0.5, 1.0, 2.0]), np.array([0.9, 0.5, -0.2])
    assert transition_variation(m, d) == pytest.approx([0.110974, 0.331106, 0.893893], abs=5e-7)
    assert transition_variation(m, d, absolute=False) == pytest.approx(
        [0.090975, 0.271439, 1.093221], abs=5e-7
    )


def test_the_band_is_that_of_32_layers() -> None:
    assert band(32).tolist() == [7, 8, 9, 10, 11, 12]
    assert band(4).tolist() == [1]
    assert band(1).tolist() == [0]


def made(index: int = 0, layers: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    ratio = rng.uniform(0.5, 1.0, (layers, 2, LENGTH))
    ratio[:, :, 6] = 9.0
    return {"transition_ratio": ratio, "transition_cosine": rng.uniform(-0.5, 0.5, (layers, 2, LENGTH))}


def test_tokens_are_ranked_by_their_change() -> None:
    arrays = made()
    finding = TokenTransitions().analyze(trace([record(0, **arrays)], 32))
    assert finding.status is Status.FOUND
    assert finding.rows[0]["position"] == 6
    assert finding.rows[0]["attention_ratio"] == 9.0
    visual = slice(1, 1 + VISUAL)
    wanted = np.zeros(VISUAL)
    for layer in range(7, 13):
        for part in range(2):
            turn = np.exp(1 - np.abs(arrays["transition_cosine"][layer, part, visual]))
            wanted += turn / turn.sum() * arrays["transition_ratio"][layer, part, visual]
    assert finding.rows[0]["ttv"] == pytest.approx(wanted[5])
    assert finding.summary["top_tenth"] == pytest.approx(np.sort(wanted)[-2:].sum() / wanted.sum())
    code = TokenTransitions(recipe="code").analyze(trace([record(0, **arrays)], 32))
    assert code.rows[0]["position"] == 6
    assert code.rows[0]["ttv"] < finding.rows[0]["ttv"]  # the softmax is over the text too


def test_equal_tokens_are_not_found() -> None:
    arrays = {"transition_ratio": np.ones((32, 2, LENGTH)), "transition_cosine": np.zeros((32, 2, LENGTH))}
    assert TokenTransitions().analyze(trace([record(0, **arrays)], 32)).status is Status.NOT_FOUND
    assert top_share(np.ones(20)) == pytest.approx(0.1)


def test_reasons() -> None:
    assert TokenTransitions().analyze(trace([record(0)])).status is Status.NOT_APPLICABLE
    arrays = made()
    arrays["transition_ratio"][8, 1] = np.nan
    assert TokenTransitions().analyze(trace([record(0, **arrays)], 32)).status is Status.NOT_APPLICABLE
    with pytest.raises(UsageError, match="recipe"):
        TokenTransitions(recipe="ours")
