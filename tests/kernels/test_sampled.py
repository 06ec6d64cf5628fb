"""Statistics from a sample of the query rows: unbiased, with standard errors that hold, and exact for all rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.kernels.blocked import attention_sweep
from sinklens.kernels.sample import LEADING, LEAST_ROWS, TAIL, RowSample, Stratum, draw_rows
from sinklens.kernels.sampled import ESTIMABLE, row_mean, sampled_sweep
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want

LENGTH, DRAWN, SEEDS = 397, 160, 60
WANT = Want(ESTIMABLE)


def call_of(kind: str, length: int = LENGTH, batch: int = 1) -> AttentionCall:
    """Random attention with a sink-like first key, so that rows differ."""
    torch.manual_seed(7)
    query, key = torch.randn(batch, 4, length, 8), torch.randn(batch, 2, length, 8)
    key[:, :, 0] *= 2.5
    call = AttentionCall(query, key, torch.randn(batch, 2, length, 5), 0.5)
    if kind == "window":
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(-90)[None, None]
        return replace(call, mask=mask)
    if kind == "learned sinks":
        return replace(call, learned_sinks=torch.randn(4))
    return replace(call, causal=kind != "bidirectional")


KINDS = ("causal", "bidirectional", "window", "learned sinks")


def counts_agree(found: AttentionStatistics, exact: AttentionStatistics) -> bool:
    """How many rows see a key is counted, not estimated."""
    assert found.visible is not None
    assert exact.visible is not None
    return torch.equal(found.visible, exact.visible)


def every_sample(length: int) -> list[RowSample]:
    """All samples of 2 of 5 rows and 2 of 4 rows, the other rows being taken."""
    head, middle, tail = np.arange(11), np.arange(16, 22), np.arange(26, length)
    return [
        RowSample(
            (
                Stratum(head, 11),
                Stratum(np.array(some), 5),
                Stratum(middle, 6),
                Stratum(np.array(others), 4),
                Stratum(tail, length - 26),
            )
        )
        for some in combinations(range(11, 16), 2)
        for others in combinations(range(22, 26), 2)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_over_all_samples_estimates_average_to_the_truth_and_variances_to_theirs(kind: str) -> None:
    call = call_of(kind, 41)
    want = Want(ESTIMABLE - {Stat.RECEIVED_TAIL})  # which is of the last 64 rows
    exact = attention_sweep(call, want)
    found: dict[Stat, list[torch.Tensor]] = {}
    squared: dict[Stat, list[torch.Tensor]] = {}
    for sample in every_sample(41):
        estimate = sampled_sweep(call, want, [sample])
        assert counts_agree(estimate, exact)
        for stat in (Stat.RECEIVED, Stat.TOP1):
            found.setdefault(stat, []).append(estimate[stat][0].double())
            squared.setdefault(stat, []).append(estimate.variances[stat][0].double())
        for stat in (Stat.ENTROPY, Stat.DISTANCE, Stat.ROW_MAX, Stat.ENTROPY_NORMALISED):
            mean, error = row_mean(estimate[stat][0], sample)
            found.setdefault(stat, []).append(mean.double())
            squared.setdefault(stat, []).append(error.double().square())
    for stat, values in found.items():
        truth = exact[stat][0] if stat in (Stat.RECEIVED, Stat.TOP1) else exact[stat][0].mean(-1)
        estimates = torch.stack(values)
        assert torch.allclose(estimates.mean(0), truth.double(), atol=2e-5, rtol=1e-5), stat
        spread = estimates.var(0, correction=0)
        assert torch.allclose(torch.stack(squared[stat]).mean(0), spread, atol=2e-6, rtol=1e-3), stat
        assert bool((spread > 1e-6).any()) or stat is Stat.TOP1


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    # Logits of a standard deviation of about 0.6. Where a few rows alone look at a key its estimates are skewed, and
    # a normal interval is too short for them: at 1.4 it holds the truth 88 times in 100.
    call = replace(call_of("causal"), scale=0.2)
    want = Want(frozenset({Stat.RECEIVED, Stat.ENTROPY}))
    exact = attention_sweep(call, want)
    keys, rows, deviations = [], [], []
    for seed in range(SEEDS):
        sample = draw_rows(LENGTH, DRAWN, [seed])
        assert sample is not None
        estimate = sampled_sweep(call, want, [sample])
        error = estimate.variances[Stat.RECEIVED].sqrt()
        # Keys that a few rows see get one or none of those drawn; a normal interval is none for them.
        seen = slice(0, LENGTH // 2)
        off = (estimate[Stat.RECEIVED] - exact[Stat.RECEIVED])[..., seen]
        deviations.append((off / error[..., seen]).double())
        keys.append((off.abs() <= 1.96 * error[..., seen]).double().mean())
        mean, error = row_mean(estimate[Stat.ENTROPY][0], sample)
        rows.append(((mean - exact[Stat.ENTROPY][0].mean(-1)).abs() <= 1.96 * error).double().mean())
    assert 0.92 < float(torch.stack(keys).mean()) < 0.97
    assert 0.90 < float(torch.stack(rows).mean()) < 0.99
    # Deviations are spread as their standard errors say.
    assert 0.9 < float(torch.stack(deviations).square().mean().sqrt()) < 1.15


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_give_the_sweep_bit_for_bit(kind: str) -> None:
    call = call_of(kind)
    assert draw_rows(LENGTH, LENGTH, [0]) is None
    found, exact = sampled_sweep(call, WANT, [None]), attention_sweep(call, WANT)
    for stat in ESTIMABLE:
        assert torch.equal(found[stat], exact[stat]), stat
    assert not found.variances


@pytest.mark.parametrize("kind", KINDS)
def test_strata_that_are_whole_give_the_sweep_to_rounding_without_error(kind: str) -> None:
    call = call_of(kind)
    bounds = [0, LEADING, 101, 214, LENGTH - TAIL, LENGTH]
    sample = RowSample(tuple(Stratum(np.arange(a, b), b - a) for a, b in pairwise(bounds)))
    found, exact = sampled_sweep(call, WANT, [sample]), attention_sweep(call, WANT)
    for stat in ESTIMABLE:
        atol = 1e-3 if stat is Stat.DISTANCE else 1e-4  # a distance is a difference of positions
        assert torch.allclose(found[stat], exact[stat], atol=atol, rtol=1e-5), stat
    assert not any(bool(v.any()) for v in found.variances.values())


def test_prompts_of_a_padded_batch_are_sampled_one_by_one() -> None:
    length = 300
    call = call_of("causal", length, batch=2)
    counted = torch.ones(2, length, dtype=torch.bool)
    counted[1, :50] = False
    counted[0, 200:] = False
    mask = (torch.ones(length, length).tril().bool()[None] & counted[:, None])[:, None]
    call = replace(call, mask=mask, counted=counted)
    sample = draw_rows(250, 120, [3])
    assert sample is not None
    found = sampled_sweep(call, WANT, [None, sample.at(np.arange(50, 300))])
    exact = attention_sweep(call, WANT)
    for stat in ESTIMABLE:
        assert torch.equal(found[stat][0], exact[stat][0]), stat
    alone = replace(
        call, query=call.query[1:, :, 50:], key=call.key[1:, :, 50:], value=call.value[1:, :, 50:], mask=None,
        counted=None,
    )  # fmt: skip
    expected = sampled_sweep(alone, WANT, [sample])
    for stat in ESTIMABLE:
        assert torch.allclose(found[stat][1, :, 50:], expected[stat][0], atol=1e-3), stat
        assert not found[stat][1, :, :50].any()
    assert counts_agree(found, exact)


def test_a_sample_has_its_size_and_each_row_at_most_once() -> None:
    for length, drawn in ((97, 96), (4099, 512), (131072, 8192), (1000, 999), (5000, 4990)):
        sample = draw_rows(length, drawn, [1, 2])
        assert sample is not None
        assert len(sample.rows) == drawn == len(set(sample.rows.tolist()))
        assert sum(stratum.size for stratum in sample.strata) == length
        assert all(2 <= len(stratum.rows) <= stratum.size for stratum in sample.strata)
        assert set(range(LEADING)) | set(range(length - TAIL, length)) <= set(sample.rows.tolist())
        again = draw_rows(length, drawn, [1, 2])
        assert again is not None
        assert (again.rows == sample.rows).all()


def test_what_cannot_be_had_from_a_sample_is_refused() -> None:
    sample = draw_rows(LENGTH, DRAWN, [0])
    with pytest.raises(UsageError, match="diagonal, received_log cannot be had from a sample"):
        sampled_sweep(call_of("causal"), Want(frozenset({Stat.DIAGONAL, Stat.RECEIVED_LOG})), [sample])
    with pytest.raises(UsageError, match=f"it takes at least {LEAST_ROWS}"):
        draw_rows(LENGTH, 40, [0])
