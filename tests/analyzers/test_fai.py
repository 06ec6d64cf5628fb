"""FAI: golden values, the unknown end, and coupling with peaks of looking back."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.fai import Fai, follows
from sinklens.analyzers.waad import peaks
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace
from .made_heads import head_record, look_back_groups, softmax_maps

T = 131


def test_numbers_equal_the_plainest_code_and_the_end_is_unknown() -> None:
    weights = softmax_maps(4, 2, 5, T)
    _, far = look_back_groups(weights)
    mean_map = weights.reshape(-1, T, T)[far].mean(0)
    expected = []
    for s in range(T):
        later = [mean_map[t, s] for t in range(s + 10, min(T - 1, s + 100) + 1)]
        expected.append(np.mean(later) if later else np.nan)
    finding = Fai().analyze(trace([head_record(weights)]))
    line = finding.figures[0].series[0].y  # type: ignore[union-attr]
    np.testing.assert_allclose(line, expected, rtol=1e-6)
    assert np.isnan(line[-10:]).all()
    assert not np.isnan(line[:-10]).any()
    marked = {row["position"] for row in finding.rows if row["peak"]}
    assert marked == set(np.flatnonzero(peaks(np.array(expected), 0.8)).tolist())
    assert all(row["fai"] == pytest.approx(expected[row["position"]], rel=1e-6) for row in finding.rows)


def test_a_token_that_all_later_ones_look_at_is_the_anchor() -> None:
    weights = causal_uniform(1, 3, T)
    weights[0, 2] = 0
    for query in range(T):
        weights[0, 2, query, 20 if query > 20 else query] = 1
    finding = Fai().analyze(trace([head_record(weights)]))
    # The head that always looks at token 20 looks back farther than the uniform ones beyond token 40.
    assert finding.rows[0]["position"] == 20
    assert finding.rows[0]["fai"] == pytest.approx(1)
    assert finding.status is Status.FOUND


def test_the_first_token_tops_the_list_unless_it_is_left_out() -> None:
    weights = softmax_maps(1, 1, 4, T)
    weights *= 0.2
    weights[..., 0] += 0.8
    made = head_record(weights)
    made.arrays["future_influence"][1, 0] = np.nan
    assert Fai().analyze(trace([made])).rows[0]["position"] == 0
    without = Fai(exclude_first=True).analyze(trace([made]))
    assert without.rows[0]["position"] != 0
    assert without.rows[0]["fai_without_first"] == max(row["fai_without_first"] for row in without.rows)


def planted(gap: int, prompts: int = 3) -> list:
    """Peaks of looking back at random places; a FAI peak `gap` tokens after each."""
    rng = np.random.default_rng(gap)
    records = []
    for index in range(prompts):
        made = head_record(causal_uniform(1, 2, T), index=index)
        looks, influence = np.zeros(T), np.zeros(T)
        places = np.sort(rng.choice(np.arange(5, T - 25, 12), 6, replace=False)) + rng.integers(0, 4, 6)
        looks[places] = 5
        influence[places + gap] = 1
        influence[-10:] = np.nan
        made.arrays["local_distance"] = np.stack([looks, looks])
        made.arrays["future_influence"] = np.stack([influence, influence])
        records.append(made)
    return records


def test_planted_coupling_is_found_and_beyond_the_window_it_is_not() -> None:
    finding = Fai().analyze(trace(planted(2)))
    assert finding.summary["follows_waad_peak"] == 1
    assert finding.summary["n_waad_peaks"] == 18
    # One peak counts for the 4 places from 3 before it: 6 peaks in the 117 places of each prompt that are judged.
    assert finding.summary["follows_any_token"] == pytest.approx(6 * 4 / 116)
    assert finding.summary["coupling_p"] < 0.05
    late = Fai().analyze(trace(planted(6)))
    assert late.summary["follows_waad_peak"] == 0
    assert late.summary["coupling_p"] == 1
    assert Fai(window=6).analyze(trace(planted(6))).summary["follows_waad_peak"] == 1


def test_follows() -> None:
    marks = np.array([False, False, False, True, False])
    assert follows(marks, 0).tolist() == marks.tolist()
    assert follows(marks, 2).tolist() == [False, True, True, True, False]


def test_short_prompts_have_no_coupling_but_no_error() -> None:
    finding = Fai().analyze(trace([head_record(causal_uniform(1, 2, 33))]))
    assert finding.status is not Status.NOT_APPLICABLE
    assert finding.summary["follows_waad_peak"] is None or finding.summary["n_waad_peaks"] > 0


def test_not_applicable_and_settings() -> None:
    assert "at least 32" in str(Fai().analyze(trace([head_record(causal_uniform(1, 2, 20))])).reason)
    assert "future_influence" in str(Fai().analyze(trace([record(causal_uniform(1, 2, T))])).reason)
    with pytest.raises(UsageError):
        Fai(window=-1)
    with pytest.raises(UsageError):
        Fai(quantile=0)
