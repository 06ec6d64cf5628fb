"""ImageCentricHeads on counts made from rows of attention by the definition."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import ImageCentricHeads, Status
from sinklens.core.errors import UsageError
from sinklens.core.figures import Heatmap
from sinklens.tracers.signals_visual import MASS_FLOORS, SHARE_BINS
from sinklens.tracers.sink_dims import SinkDims
from sinklens.tracers.trace import PromptRecord

from .made_pictures import HEADS, LAYERS, made, record

GOLDEN = (0.45, 0.25 / 0.45)
"""Mass on visual tokens and non-sink ratio of the row .30 .05 | .10 .20 .05 .10 | .05 .15 whose second key "
"is a sink."""


def counted(
    index: int, rows: dict[tuple[int, int], list[tuple[float, float]]], sinks: int = 1
) -> PromptRecord:
    """Counts of queries, given as (mass, ratio) by (layer, head); every other head has three queries without mass."""
    counts = np.zeros((LAYERS, HEADS, len(MASS_FLOORS), SHARE_BINS), dtype=np.int32)
    masses = np.zeros((LAYERS, HEADS, SHARE_BINS), dtype=np.int32)
    means = np.full((LAYERS, HEADS, len(MASS_FLOORS)), np.nan, dtype=np.float32)
    by_class = np.zeros((LAYERS, HEADS, 5), dtype=np.float32)
    masses[..., 0] = 3
    for (layer, head), queries in rows.items():
        masses[layer, head] = 0
        for mass, ratio in queries:
            floor = max(i for i, least in enumerate(MASS_FLOORS) if mass >= least)
            counts[layer, head, floor, min(int(ratio * SHARE_BINS + 1e-9), SHARE_BINS - 1)] += 1
            masses[layer, head, int(mass * SHARE_BINS)] += 1
        for i, least in enumerate(MASS_FLOORS):
            known = [ratio for mass, ratio in queries if mass >= least]
            means[layer, head, i] = np.mean(known) if known else np.nan
        by_class[layer, head, 0] = np.mean([mass * ratio for mass, ratio in queries])
        by_class[layer, head, 1] = np.mean([mass * (1 - ratio) for mass, ratio in queries])
    count = np.tile(np.array([8 - sinks, sinks, 1, 1, 3], dtype=np.int32), (LAYERS, 1))
    return record(
        index, nonsink_ratio=counts, nonsink_ratio_mean=means, visual_mass=masses, key_class_mass=by_class,
        key_class_count=count,
    )  # fmt: skip


def test_the_golden_row_is_selected_at_one_half_and_not_at_eight_tenths() -> None:
    trace = made([counted(0, {(2, 1): [GOLDEN]})])
    finding = ImageCentricHeads(rho=0.5).analyze(trace)
    assert finding.status is Status.FOUND
    (row,) = finding.rows
    assert (row["layer"], row["head"], row["selected"]) == (2, 1, 1.0)
    assert row["ratio"] == pytest.approx(0.555556, abs=1e-6)
    assert row["mass"] == pytest.approx(0.45)
    strict = ImageCentricHeads().analyze(trace)
    assert strict.summary["least_ratio"] == 0.8
    assert strict.status is Status.NOT_FOUND
    assert not strict.rows


def test_rho_of_the_paper_and_of_the_code_run_in_opposite_directions() -> None:
    trace = made([counted(0, {(2, 0): [(0.3, 0.85)], (2, 1): [(0.3, 0.55)], (2, 2): [(0.3, 0.45)]})])

    def heads(**parameters: object) -> list[int]:
        rows = ImageCentricHeads(**parameters).analyze(trace).rows  # type: ignore[arg-type]
        return sorted(row["head"] for row in rows)

    assert heads() == [0]
    assert heads(recipe="code") == [0, 1]
    assert heads(recipe="code", rho=0.2) == heads(rho=0.8) == [0]
    assert heads(rho=0.5) == heads(recipe="code", rho=0.5) == [0, 1]


def test_the_mass_floor_and_the_least_share_of_queries() -> None:
    rows = {(1, 0): [(0.19, 1.0), (0.2, 1.0), (0.6, 0.9)], (2, 0): [(0.15, 1.0)] * 2 + [(0.3, 0.9)]}
    trace = made([counted(0, rows), counted(1, {(1, 0): [(0.3, 0.1)] * 3})])
    finding = ImageCentricHeads(min_queries=0.3).analyze(trace)
    (row,) = finding.rows
    assert row["selected"] == pytest.approx((2 / 3 + 0) / 2), "per prompt, then averaged"
    assert ImageCentricHeads().analyze(trace).status is Status.NOT_FOUND
    lower = ImageCentricHeads(floor=0.1, min_queries=0.3).analyze(trace)
    assert [(r["layer"], round(r["selected"], 3)) for r in lower.rows] == [(1, 0.5), (2, 0.5)]


def test_layers_left_out_and_layers_without_a_sink() -> None:
    everywhere = {(layer, 0): [(0.5, 1.0)] for layer in range(LAYERS)}
    with_sinks, without = made([counted(0, everywhere)]), made([counted(0, everywhere, sinks=0)])
    assert [r["layer"] for r in ImageCentricHeads().analyze(with_sinks).rows] == [0, 1, 2, 3]
    assert [r["layer"] for r in ImageCentricHeads(recipe="code").analyze(with_sinks).rows] == [2, 3, 4]
    finding = ImageCentricHeads().analyze(without)
    assert [r["layer"] for r in finding.rows] == [0, 1, 2, 3]
    assert finding.notes == [
        "5 of 5 layers have no visual sink in any prompt: the ratio is 1 there and the mass alone decides."
    ]
    code = ImageCentricHeads(recipe="code").analyze(without)
    assert code.status is Status.NOT_FOUND
    assert "nothing is selected there" in code.notes[0]


def test_what_is_drawn_and_said() -> None:
    finding = ImageCentricHeads(rho=0.5).analyze(made([counted(0, {(2, 1): [GOLDEN]})]))
    selected, ratio, mass = finding.figures
    assert isinstance(selected, Heatmap)
    assert selected.marks == ((2, 1),)
    assert np.isnan(selected.values[-1]).all()
    assert isinstance(ratio, Heatmap)
    assert np.isnan(ratio.values).sum() == LAYERS * HEADS - 1
    assert isinstance(mass, Heatmap)
    assert mass.values[2, 1] == pytest.approx(0.45)
    assert finding.verdict.startswith(
        "1 of 12 heads is image-centric: 50 % of the text queries or more have at least 20 %"
    )


def test_it_says_why_it_does_not_apply() -> None:
    text = made([counted(0, {})])
    text.records[0].spans = None
    assert ImageCentricHeads().analyze(text).status is Status.NOT_APPLICABLE
    none = SinkDims((), 64, "discovered", "8 text prompts", "measured", "no dim stands out.", False)
    reason = ImageCentricHeads().analyze(made([counted(0, {})], none)).reason
    assert reason == "the model has no sink dims: no dim stands out."
    assert "no text follows" in (ImageCentricHeads().analyze(made([record(0)])).reason or "")
    for wrong in ({"floor": 0.25}, {"rho": 0.33}, {"recipe": "neither"}):
        with pytest.raises(UsageError):
            ImageCentricHeads(**wrong)  # type: ignore[arg-type]
