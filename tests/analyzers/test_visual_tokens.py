"""Classes of visual tokens: planted clusters are found and named, the rest is alive; the published rule by ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import Status, VisualTokens
from sinklens.analyzers.recurring import nearest_direction, recurring_directions
from sinklens.analyzers.visual_classes import Named, class_values, vision_ratio
from sinklens.core.errors import UsageError
from sinklens.tracers.trace import PromptRecord

from .made_visual import COLS, DIM, LENGTH, ROWS, VISUAL, received, record, trace

LAYERS = 8
SINKS, DEAD = [3, 11], [0, 4, 5, 7, 18]
"""Places of the planted tokens; places 1 and 2 recur too, but are attended and change, so they are alive."""
RECURRING_ALIVE = [1, 2]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def planted(index: int, seed: int = 0, **other: np.ndarray) -> PromptRecord:
    """A picture with two sinks, five dead tokens, two recurring ones that are neither, and the rest its own."""
    axes = unit(np.random.default_rng(seed).normal(size=(3, DIM)))
    rng = np.random.default_rng((seed, index + 1))
    vectors = unit(rng.normal(size=(VISUAL, DIM)))
    for axis, places in zip(axes, (SINKS, DEAD, RECURRING_ALIVE), strict=True):
        vectors[places] = unit(axis + 0.01 * rng.normal(size=(len(places), DIM)))
    first = np.full((LAYERS, VISUAL), 0.1)
    first[3:7, SINKS] = 0.95
    drift = np.full((LAYERS, VISUAL), 0.5)
    drift[0], drift[1:, DEAD], drift[1:, RECURRING_ALIVE] = 1.0, 0.99, 0.2
    share = np.full((LAYERS, LENGTH), 0.02)
    share[:, 1 + np.array(DEAD)] = 0.001
    share[:, 1 + np.array(SINKS)] = 0.2
    norm = np.full(LENGTH, 2.0)
    norm[1 + np.array(SINKS)] = 30.0
    lens = np.tile(np.arange(100, 110), (1, VISUAL, 1))
    arrays = {
        "visual_unit": vectors.astype(np.float16), "visual_first_cosine": first, "visual_drift": drift,
        "embedded_norm": norm, "lens_id": lens, **received(share),
    }  # fmt: skip
    return record(index, **{**arrays, **other})


def classes(rows: list[dict[str, Any]], prompt: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"sink": [], "dead": [], "alive": []}
    for row in sorted((row for row in rows if row["prompt"] == prompt), key=lambda row: row["position"]):
        assert (row["row"], row["col"]) == divmod(row["position"] - 1, COLS)
        found[row["cls"]].append(row["position"] - 1)
    return found


def test_planted_classes_are_found_exactly() -> None:
    finding = VisualTokens().analyze(trace([planted(i) for i in range(12)], words={"100": "cat"}))
    assert finding.status is Status.FOUND
    for prompt in range(12):
        found = classes(finding.rows, prompt)
        assert found["sink"] == SINKS
        assert found["dead"] == DEAD
        assert len(found["alive"]) == VISUAL - 7
    assert finding.rows[0]["kind"] == "of the language model"
    assert finding.rows[0]["nearest"] == "cat"
    s = finding.summary
    assert [s[f"share_{c}"] for c in ("sink", "dead", "alive")] == pytest.approx([2 / 20, 5 / 20, 13 / 20])
    assert (s["recurring_clusters"], s["unnamed_clusters"]) == (3, 1)
    assert s["norm_sink"] == pytest.approx(30.0)
    assert s["text_norm"] == pytest.approx(2.0)
    mass = np.array([2 * 0.2, 5 * 0.001, 13 * 0.02])
    assert [s[f"attention_{c}"] for c in ("sink", "dead", "alive")] == pytest.approx(
        mass / mass.sum(), rel=1e-5
    )
    assert "10.0 % sink, 25.0 % dead, 65.0 % alive" in finding.verdict
    drawn, drift = finding.figures
    assert len(drawn.pages) == 12  # type: ignore[union-attr]
    assert {series.name for series in drift.series} == {"sink", "dead", "alive"}  # type: ignore[union-attr]


def test_thresholds_can_be_changed_on_the_same_trace() -> None:
    made = trace([planted(i) for i in range(12)])
    strict = VisualTokens(first_cosine=0.97).analyze(made)
    assert strict.summary["share_sink"] == 0
    assert strict.summary["share_dead"] == 5 / 20
    assert VisualTokens(recurring=1.01).analyze(made).status is Status.NOT_FOUND


def test_a_direction_of_few_pictures_is_no_class() -> None:
    """Two of twelve pictures lack it at the default share, three are too many."""
    for lacking, share in ((2, 2 / 20 * 10 / 12), (3, 0.0)):
        records = [planted(i) for i in range(12)]
        for one in records[:lacking]:
            one.arrays["visual_unit"][SINKS] = unit(
                np.random.default_rng(900 + one.index).normal(size=(2, DIM))
            )
        assert VisualTokens().analyze(trace(records)).summary["share_sink"] == pytest.approx(share)


def test_the_same_picture_counts_once() -> None:
    records = [replace(planted(0), index=i) for i in range(12)]
    finding = VisualTokens().analyze(trace(records))
    assert finding.status is Status.NOT_APPLICABLE
    assert finding.reason is not None
    assert finding.reason.startswith("1 different picture ")


def test_norm_outliers_of_the_vision_tower_are_its_sinks() -> None:
    """Two patches make a token, one of the sinks' stands out; a class token before them does not count."""
    members = 1 + np.arange(2 * VISUAL).reshape(ROWS, COLS, 2)
    norms = np.full((3, 1 + 2 * VISUAL), 10.0)
    norms[-1, 0] = 500.0
    norms[-1, [1 + 2 * place for place in SINKS]] = 60.0
    records = [record(i, members, **{**planted(i).arrays, "vision_norm": norms}) for i in range(12)]
    ratio = vision_ratio(records[0])
    assert ratio is not None
    assert np.flatnonzero(ratio > 1).tolist() == SINKS
    assert ratio[SINKS[0]] == 6.0
    finding = VisualTokens().analyze(trace(records))
    assert finding.summary["vit_sink_share"] == pytest.approx(2 / 20)
    assert finding.summary["llm_sink_share"] == 0
    assert not any("which patches" in note for note in finding.notes)


def test_the_published_rule_takes_ids_of_the_three_nearest() -> None:
    """LLaVA-1.5-7B's ids; the fourth nearest does not count, the first class wins an overlap."""
    lens = np.tile(np.arange(100, 110), (1, VISUAL, 1))
    lens[0, 2, 0], lens[0, 6, 2], lens[0, 9, 3] = 1141, 26673, 30296
    lens[0, 12, 1], lens[0, 13, :2] = 30296, [30296, 26673]
    made = trace([planted(0, lens_id=lens)])
    finding = VisualTokens(recipe="code", vit_sink=1141, llm_sink=26673, dead=30296).analyze(made)
    found = classes(finding.rows, 0)
    assert found["sink"] == [2, 6, 13]
    assert found["dead"] == [12]
    assert finding.summary["overlaps"] == 1
    assert [row["kind"] for row in finding.rows[:3]] == [
        "of the vision tower",
        *["of the language model"] * 2,
    ]
    without = VisualTokens(recipe="code").analyze(made)
    assert without.status is Status.NOT_APPLICABLE
    assert "vit_sink" in (without.reason or "")


def test_recipes_are_two() -> None:
    with pytest.raises(UsageError, match="recipe"):
        VisualTokens(recipe="ours")


def test_recurring_directions_by_the_plainest_search() -> None:
    """Against a search over every token of every picture as a leader."""
    pictures = [planted(i).arrays["visual_unit"].astype(float) for i in range(9)]
    found = recurring_directions(pictures, join=0.95, frequency=0.8, tightness=0.9)
    every = np.concatenate([unit(p) for p in pictures])
    brute = [v for v in every if np.mean([(unit(p) @ v >= 0.95).any() for p in pictures]) >= 0.8]
    assert sorted(cluster.size for cluster in found) == [2 * 9, 2 * 9, 5 * 9]
    assert len(brute) == 9 * 9
    for vector in brute:
        assert max(float(cluster.centroid @ vector) for cluster in found) > 0.95
    members = unit(np.concatenate([pictures[i][places] for i, places in enumerate(found[0].members)]))
    cosines = members @ members.T
    n = len(members)
    assert found[0].tightness == pytest.approx((cosines.sum() - n) / (n * (n - 1)), abs=1e-3)
    index, value = nearest_direction(np.eye(DIM)[:2], np.zeros((0, DIM)), 0.9)
    assert index.tolist() == [-1, -1]
    assert np.isnan(value).all()


def test_a_class_without_tokens_has_no_numbers() -> None:
    value = class_values(planted(0), Named(np.full(VISUAL, 2), [""] * VISUAL))
    assert np.isnan(value.norm[:2]).all()
    assert value.share.tolist() == [0, 0, 1]
    assert value.mass.tolist() == [0, 0, 1]
