"""VisionTowerSinks on norms made by hand, with merged patches, a class token and several rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sinklens.analyzers import Status, VisionTowerSinks
from sinklens.analyzers.propagation import Table, by_placement, table
from sinklens.analyzers.vision_tower import above_gap
from sinklens.core.errors import UsageError
from sinklens.core.pictures import PictureMap
from sinklens.inputs.spans import ModalitySpans
from sinklens.tracers.sink_dims import SinkDims
from sinklens.tracers.trace import PromptRecord, Trace

from .made_pictures import made, phi_record

BLOCKS, PLACES = 3, 1 + 32
"""A class token, then 4 x 8 patches in blocks of 2 x 2: four for each of the 2 x 4 visual tokens."""


def with_members(spans: ModalitySpans, places: np.ndarray | None) -> ModalitySpans:
    (grid,) = spans.grids
    return replace(spans, grids=(replace(grid, members=places),))


def merged(
    index: int, tower: dict[tuple[int, int], float], llm: dict[tuple[int, int], float] | None = None
) -> PromptRecord:
    """Norms by (block, place in the tower's sequence); about 10 elsewhere, the class token 30."""
    item = phi_record(index, llm or {})
    norms = 10 + np.random.default_rng(index).uniform(-1, 1, size=(BLOCKS, PLACES)).astype(np.float32)
    norms[:, 0] = 30.0
    received = np.full((BLOCKS, PLACES), 0.03, dtype=np.float32)
    for (block, place), value in tower.items():
        norms[block, place], received[block, place] = value, 0.3
    item.arrays |= {"vision_norm": norms, "vision_received": received}
    places = 1 + np.arange(32).reshape(2, 4, 4)
    return replace(item, spans=with_members(item.spans, places))  # type: ignore[arg-type]


def feature(trace: Trace, block: int = -1) -> Trace:
    trace.tracing["vision_feature_layer"] = block
    return trace


def test_a_token_is_a_sink_if_any_of_its_patches_is() -> None:
    """Place 14 is the second patch of the fourth token: row 0, column 3, position 4."""
    trace = feature(made([merged(0, {(1, 14): 100.0, (2, 14): 100.0, (2, 15): 60.0}, {(3, 4): 30.0})]))
    finding = VisionTowerSinks().analyze(trace)
    assert finding.status is Status.FOUND
    (row,) = finding.rows
    assert (row["row"], row["col"], row["position"]) == (0, 3, 4)
    assert (row["members"], row["of_members"]) == (2, 4)
    assert (row["first_block"], row["last_block"]) == (1, 2)
    assert row["norm"] == 100.0
    assert row["ratio"] == pytest.approx(10.0, abs=0.5)
    assert row["vision_share"] == pytest.approx(0.3 / ((30 * 0.03 + 2 * 0.3) / 32), rel=1e-5)
    assert row["llm_sink"] is True
    summary = finding.summary
    assert (summary["both"], summary["tower_only"], summary["llm_only"], summary["neither"]) == (1, 0, 0, 7)
    assert summary["both_by_chance"] == pytest.approx(1 / 8)
    assert summary["p_value"] == pytest.approx(1 / 8, abs=0.02)
    assert (summary["attention_ratio_max"], summary["attention_ratio_layer"]) == (pytest.approx(8.0), 3)
    assert any("1 place of the tower's sequence becomes no token" in note for note in finding.notes)
    drawn = finding.figures[0]
    assert isinstance(drawn, PictureMap)
    (grid,) = drawn.pages[0].grids
    assert grid.values[0, 0, 3] == 100.0
    assert grid.classes is not None
    assert grid.classes.tolist() == [[-1, -1, -1, 1], [-1, -1, -1, -1]]
    assert drawn.pages[0].sentence.startswith("1 token of this picture holds a patch with a norm 10 MAD")
    assert drawn.pages[0].sentence.endswith(
        "1 of 1 is one of the language model too; it has 0 other visual sinks of the language model."
    )


def test_the_block_is_the_one_the_language_model_is_given() -> None:
    trace = made([merged(0, {(1, 14): 100.0})])
    assert VisionTowerSinks().analyze(feature(trace, -2)).status is Status.FOUND
    last = VisionTowerSinks().analyze(feature(trace, -1))
    assert last.status is Status.NOT_FOUND
    assert "after block 2 of the vision tower no patch" in last.verdict
    del trace.tracing["vision_feature_layer"]
    assert any("the last one was taken" in note for note in VisionTowerSinks().analyze(trace).notes)


def test_propagation_is_held_against_random_placement() -> None:
    records = [merged(i, {(2, 14): 100.0}, {(2, 4): 30.0, (3, 6): 30.0}) for i in range(6)]
    summary = VisionTowerSinks().analyze(feature(made(records))).summary
    assert (summary["both"], summary["llm_only"], summary["neither"]) == (6, 6, 36)
    assert summary["both_by_chance"] == pytest.approx(6 * 2 / 8)
    assert summary["p_value"] < 0.005
    apart = [merged(i, {(2, 14): 100.0}, {(2, 7): 30.0}) for i in range(6)]
    summary = VisionTowerSinks().analyze(feature(made(apart))).summary
    assert (summary["both"], summary["tower_only"], summary["llm_only"]) == (0, 6, 6)
    assert summary["p_value"] == 1.0


def test_without_sink_dims_the_tower_still_speaks() -> None:
    dims = SinkDims((), 64, "discovered", "8 text prompts", "measured", "no dim stands out.", False)
    finding = VisionTowerSinks().analyze(feature(made([merged(0, {(2, 14): 100.0})], dims)))
    assert finding.status is Status.FOUND
    assert "both" not in finding.summary
    assert any("Nothing is said of the language model's sinks" in note for note in finding.notes)


def test_rules_and_thresholds() -> None:
    norms = np.array([1.0, 1.1, 0.9, 1.2, 1.0, 0.95, 1.05, 1.1, 0.9, 1.0, 1.0, 5.0])
    assert VisionTowerSinks().outliers(norms).nonzero()[0].tolist() == [11]
    assert not VisionTowerSinks(least=6.0).outliers(norms).any()
    assert above_gap(norms, 1.5).nonzero()[0].tolist() == [11]
    assert not above_gap(np.linspace(1, 2, 30), 1.5).any()
    half = np.r_[np.ones(10), np.full(10, 9.0)]
    assert not above_gap(half, 1.5).any(), "half of the patches are no outliers"
    assert not VisionTowerSinks().outliers(np.full(9, 2.0)).any()
    assert VisionTowerSinks(tau_vit=1.1).outliers(norms).sum() == 4
    random = abs(np.random.default_rng(1).normal(20, 2, size=400))
    assert not VisionTowerSinks().outliers(random).any()
    for wrong in ({"rule": "neither"}, {"mads": 0.0}, {"least": 0.5}, {"gap": 1.0}, {"tau_vit": -1.0}):
        with pytest.raises(UsageError):
            VisionTowerSinks(**wrong)  # type: ignore[arg-type]


def test_the_table_and_its_test() -> None:
    first, second = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert table(first, second) == Table(1, 1, 1, 1, 1.0)
    assert by_placement([Table(1, 1, 1, 1, 1.0)]) == pytest.approx(5 / 6, abs=0.02), "1 - C(2,2)/C(4,2)"
    assert by_placement([Table(2, 0, 0, 2, 1.0)]) == pytest.approx(1 / 6, abs=0.02)


def test_it_says_why_it_does_not_apply() -> None:
    bare = VisionTowerSinks().analyze(made([phi_record(0, {})]))
    assert bare.status is Status.NOT_APPLICABLE
    assert "no vision tower" in (bare.reason or "")
    unknown = merged(0, {})
    unknown = replace(unknown, spans=with_members(unknown.spans, None))  # type: ignore[arg-type]
    assert "which patches" in (VisionTowerSinks().analyze(made([unknown])).reason or "")
