"""ContributionNorm on ratios that are known."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import ContributionNorm, Status
from sinklens.core.figures import Heatmap, Lines
from sinklens.tracers.sink_dims import SinkDims
from sinklens.tracers.trace import PromptRecord

from .made_pictures import HEADS, LAYERS, made, record


def measured(
    index: int, attention: float, value: float, sinks: int = 2, layers: tuple[int, ...] = (2, 3)
) -> PromptRecord:
    """Visual sinks in some layers, with these ratios to the six or so other visual tokens; the norm of those is 2."""
    counts = np.tile(np.array([8, 0, 1, 1, 3], dtype=np.int32), (LAYERS, 1))
    mass = np.zeros((LAYERS, HEADS, 5), dtype=np.float32)
    norms = np.full((LAYERS, HEADS, 5), np.nan, dtype=np.float32)
    added = norms.copy()
    others = np.array([0.01, 0.02, 0.03])  # attention per other visual token, by head
    mass[..., 0], norms[..., 0], added[..., 0] = 8 * others, 2.0, 2.0 * others
    for layer in layers:
        counts[layer, :2] = 8 - sinks, sinks
        mass[layer, :, 0], mass[layer, :, 1] = (8 - sinks) * others, sinks * attention * others
        norms[layer, :, 1] = 2.0 * value
        added[layer, :, 1] = 2.0 * value * attention * others
    return record(
        index, key_class_count=counts, key_class_mass=mass, class_value_norm=norms, contribution=added
    )


def test_sinks_that_get_much_and_add_little() -> None:
    trace = made([measured(0, 10.0, 0.02), measured(1, 10.0, 0.02, sinks=1)])
    finding = ContributionNorm().analyze(trace)
    assert finding.status is Status.FOUND
    assert [row["layer"] for row in finding.rows] == [2, 3]
    row = finding.rows[0]
    assert row["attention_ratio"] == pytest.approx(10.0, rel=1e-5)
    assert row["value_ratio"] == pytest.approx(0.02, rel=1e-5)
    assert row["contribution_ratio"] == pytest.approx(0.2, rel=1e-5)
    assert (row["less"], row["visual_sinks"], row["n_prompts"]) == (1.0, 1.5, 2)
    assert "in 100 % of the heads of 2 layers with visual sinks" in finding.verdict
    assert (
        "in the median 10 times as much; its value is 0.02 times as long, and it adds 0.2 times"
        in finding.verdict
    )


def test_sinks_that_add_as_much_as_they_get() -> None:
    finding = ContributionNorm().analyze(made([measured(0, 10.0, 1.0)]))
    assert finding.status is Status.NOT_FOUND
    assert finding.summary["contribution_ratio"] == pytest.approx(10.0, rel=1e-5)


def test_only_prompts_with_sinks_count_and_the_median_is_over_prompts_and_heads() -> None:
    trace = made([measured(0, 4.0, 0.1), measured(1, 8.0, 0.1), measured(2, 9.0, 0.1, layers=())])
    finding = ContributionNorm().analyze(trace)
    assert finding.summary["attention_ratio"] == pytest.approx(6.0, rel=1e-5)
    assert finding.rows[0]["n_prompts"] == 2


def test_heads_that_do_not_attend_to_sinks_have_no_say() -> None:
    item = measured(0, 10.0, 0.02)
    for name in ("key_class_mass", "contribution"):
        item.arrays[name][:, 2, 1] /= 100
    finding = ContributionNorm().analyze(made([item]))
    assert finding.summary["attending"] == pytest.approx(2 / 3)
    assert finding.summary["contribution_ratio"] == pytest.approx(0.2, rel=1e-5)
    nowhere = ContributionNorm().analyze(made([measured(0, 0.5, 0.02)]))
    assert nowhere.status is Status.NOT_FOUND
    assert nowhere.summary["contribution_ratio"] is None
    assert "no more attention than other visual tokens in any head of 2 layers" in nowhere.verdict


def test_what_is_drawn() -> None:
    lines, heat = ContributionNorm().analyze(made([measured(0, 10.0, 0.02)])).figures
    assert isinstance(lines, Lines)
    assert lines.series[0].x.tolist() == [2, 3]
    assert isinstance(heat, Heatmap)
    assert heat.values[2] == pytest.approx([0.2] * HEADS, rel=1e-4)
    assert np.isnan(heat.values[0]).all()


def test_it_says_why_it_does_not_apply() -> None:
    none = ContributionNorm().analyze(made([measured(0, 1.0, 1.0, layers=())]))
    assert none.status is Status.NOT_APPLICABLE
    assert "no prompt has a visual sink" in (none.reason or "")
    bare = ContributionNorm().analyze(made([record(0)]))
    assert "does not show values" in (bare.reason or "")
    dims = SinkDims((), 64, "discovered", "8 text prompts", "measured", "no dim stands out.", False)
    assert "no sink dims" in (ContributionNorm().analyze(made([measured(0, 2.0, 1.0)], dims)).reason or "")
