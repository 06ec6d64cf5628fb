"""Mass ledger on traces made by hand: both ways to tell sinks, groups that add up, and when there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import MassLedger, Status
from sinklens.core.errors import UsageError
from sinklens.tracers.sink_dims import SinkDims, SinkRule

from . import made
from .made_visual import DIM, LENGTH, TEXT, VISUAL, received
from .made_visual import record as pictured
from .made_visual import trace as visual_trace

LAYERS, HEADS, TOKENS = 3, 4, 40


def text_trace(share: float = 0.7, position: int = 2) -> Any:
    weights = made.causal_uniform(LAYERS, HEADS, TOKENS)
    for layer in range(1, LAYERS):
        for head in range(2):
            made.with_sink(weights, layer, head, position, share)
    return made.trace([made.record(weights, index=0), made.record(weights, index=1)])


def rows_of(share: float, position: int) -> np.ndarray:
    """`[layer]`: mean attention of a query on the position."""
    uniform = np.array([1 / (q + 1) if q >= position else 0.0 for q in range(TOKENS)])
    sinking = np.where(np.arange(TOKENS) > position, share, uniform)
    return np.array([uniform.mean(), *[(sinking.mean() + uniform.mean()) / 2] * (LAYERS - 1)])


def test_a_sink_inside_a_text() -> None:
    finding = MassLedger().analyze(text_trace())
    assert finding.status is Status.FOUND
    expected = rows_of(0.7, 2)
    assert [row["text_sink"] for row in finding.rows] == pytest.approx(expected)
    assert [row["other"] for row in finding.rows] == pytest.approx(1 - expected)
    assert [row["text_sinks"] for row in finding.rows] == [1.0] * LAYERS
    assert finding.summary["text_sink"] == pytest.approx(expected.mean())
    assert finding.summary["unaccounted"] < 1e-12
    assert finding.summary["rule"] == "attention"
    assert "visual_sink" not in finding.summary
    assert f"{100 * expected.mean():.1f} % to text sinks" in finding.verdict
    assert "all tokens" in finding.verdict
    assert not finding.notes
    drawn: Any = finding.figures[0]
    assert [series.name for series in drawn.series] == ["text sink", "other"]


def test_no_sink_is_said_to_be_none() -> None:
    finding = MassLedger().analyze(text_trace(share=0.05))
    assert finding.status is Status.NOT_FOUND
    assert finding.verdict.startswith("No token is a sink")
    assert finding.summary["other"] == pytest.approx(1.0)


def test_what_a_learned_sink_takes_is_no_groups() -> None:
    weights = made.causal_uniform(LAYERS, HEADS, TOKENS) * 0.6
    record = made.record(weights, index=0, learned_sink_mass=np.full((LAYERS, HEADS), 0.4))
    finding = MassLedger().analyze(made.trace([record]))
    assert finding.summary["learned_sink"] == pytest.approx(0.4)
    assert finding.summary["other"] == pytest.approx(0.6)
    assert finding.summary["unaccounted"] < 1e-12
    assert "40.0 % to learned sinks" in finding.verdict


def test_rows_that_do_not_add_up_are_noted() -> None:
    weights = made.causal_uniform(LAYERS, HEADS, TOKENS) * 0.9
    finding = MassLedger().analyze(made.trace([made.record(weights, index=0)]))
    assert finding.summary["unaccounted"] == pytest.approx(0.1)
    assert "differ from 1 by up to 0.1" in finding.notes[0]


def visual(phi: np.ndarray | None, mass: np.ndarray, dims: tuple[int, ...] = (3,)) -> Any:
    arrays = received(mass) | ({} if phi is None else {"phi": phi})
    found = visual_trace([pictured(0, **arrays)], layers=2)
    why = None if dims else "nothing stands out."
    sinks = SinkDims(SinkDims.given(dims, DIM).dims, DIM, "discovered", "made", "measured", why)
    found.tracing["sinks"] = SinkRule(sinks).to_json()
    return found


def test_groups_of_pictures_by_the_state_of_each_layer() -> None:
    rng = np.random.default_rng(0)
    mass = rng.dirichlet(np.ones(LENGTH), size=2)
    phi = np.ones((2, LENGTH))
    phi[1, [0, 4, 7]] = 5.0  # BOS and two visual tokens, in the second layer only
    finding = MassLedger().analyze(visual(phi, mass))
    inside = np.zeros(LENGTH, dtype=bool)
    inside[1 : 1 + VISUAL] = True
    first, second = finding.rows
    assert (first["text_sink"], first["visual_sink"]) == (0.0, 0.0)
    assert first["visual_nonsink"] == pytest.approx(mass[0, inside].sum())
    assert second["text_sink"] == pytest.approx(mass[1, 0])
    assert second["visual_sink"] == pytest.approx(mass[1, [4, 7]].sum())
    assert second["visual_nonsink"] == pytest.approx(mass[1, inside].sum() - mass[1, [4, 7]].sum())
    assert second["other"] == pytest.approx(mass[1, -TEXT - 1 :].sum())
    assert (second["text_sinks"], second["visual_sinks"]) == (1.0, 2.0)
    assert finding.summary["unaccounted"] < 1e-6
    assert "by their state" in finding.verdict
    assert "the text after the pictures" in finding.verdict
    assert finding.status is Status.FOUND


def test_states_are_not_asked_for_where_there_are_no_dims() -> None:
    mass = np.full((2, LENGTH), 1 / LENGTH)
    finding = MassLedger(rule="states").analyze(visual(None, mass, dims=()))
    assert finding.status is Status.NOT_APPLICABLE
    assert finding.reason == "the model has no sink dims: nothing stands out."
    text = MassLedger(rule="states").analyze(text_trace())
    assert "pictures only" in str(text.reason)
    with pytest.raises(UsageError, match="rule must be"):
        MassLedger(rule="phi")
