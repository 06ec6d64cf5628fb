"""FAI: golden values, the unknown end, and coupling with peaks of looking back."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.fai import Fai, follows, times_usual
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


def test_peaks_that_any_curve_has_are_not_a_finding() -> None:
    """Nearly uniform attention: local maxima there are, and early tokens get more, but none stands out."""
    weights = np.tril(np.exp(np.random.default_rng(3).normal(size=(2, 5, T, T)) * 0.3))
    weights /= weights.sum(-1, keepdims=True)
    finding = Fai().analyze(trace([head_record(weights)]))
    assert finding.status is Status.NOT_FOUND
    assert finding.summary["n_peaks"] > 0
    assert finding.summary["n_anchors"] == 0
    assert finding.verdict.startswith("No token draws 3 times the usual attention")
    assert all(row["times_usual"] < 3 for row in finding.rows)
    assert Fai(anchor=1.01).analyze(trace([head_record(weights)])).status is Status.FOUND


def test_the_usual_is_that_of_uniform_attention_at_the_same_place() -> None:
    weights = causal_uniform(1, 3, T)
    weights[:, :, 60:, 40] += 0.5
    weights /= weights.sum(-1, keepdims=True)
    value = head_record(weights).arrays["future_influence"][0]
    found = times_usual(value)
    uniform = [np.mean([1 / (t + 1) for t in range(s + 10, min(T - 1, s + 100) + 1)]) for s in range(T - 10)]
    ratio = value[: T - 10] / np.array(uniform)
    np.testing.assert_allclose(found[: T - 10], ratio / np.median(ratio))
    assert np.isnan(found[T - 10 :]).all()
    assert np.isnan(times_usual(np.full(7, np.nan))).all()
    finding = Fai().analyze(trace([head_record(weights)]))
    assert finding.summary["n_anchors"] == 1
    assert "1 token draws at least 3 times the usual attention" in finding.verdict
    assert "on position 40 of prompt 0" in finding.verdict


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
    with pytest.raises(UsageError):
        Fai(anchor=1)
