"""Sampled query rows in real models: windows, soft caps, learned sinks, bidirectional attention, padded batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.inputs.spec import Prompt
from sinklens.tracers import check_sampling
from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.sampling import ESTIMATED, Sampling, not_estimable
from sinklens.tracers.selfcheck import self_check

from .test_families import opened

FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss", "bert", "deepseek_v3")
SIGNALS = frozenset(
    {
        sig.ATTENTION_RECEIVED,
        sig.ATTENTION_RECEIVED_MEAN,
        sig.ATTENTION_RECEIVED_PEAK,
        sig.ATTENTION_ENTROPY,
        sig.ATTENTION_DISTANCE,
        sig.ATTENTION_SELF,
        sig.ATTENTION_TAIL,
        sig.LEARNED_SINK_MASS,
        sig.VISIBLE_QUERIES,
        sig.KEPT_POSITIONS,
    }
)


def prompts(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(lengths):
        ids = [1, *torch.randint(5, 300, (length - 1,), generator=generator).tolist()]
        made.append(Prompt(index, tuple(ids), ("x",) * length, "made"))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_a_padded_batch_lie_where_their_errors_say(family: str) -> None:
    model, batch = opened(family), prompts(211, 180, 90)
    plan = TracePlan(SIGNALS, sampling=Sampling(0.7))
    found, exact = trace(model, batch, plan), trace(model, batch, TracePlan(SIGNALS))
    for mine, truth in zip(found, exact, strict=True):
        if len(truth) == 90:  # fewer rows than the smallest sample
            assert sig.SAMPLED_ROWS not in mine.arrays
            for name in mine.arrays.keys() & truth.arrays.keys():
                np.testing.assert_allclose(mine.arrays[name], truth.arrays[name], atol=1e-5, err_msg=name)
            assert not mine.arrays["attention_received_mean_se"].any()
            continue
        assert len(mine.arrays[sig.SAMPLED_ROWS]) == Sampling(0.7).count(len(truth))
        assert "attention_self" not in mine.arrays
        np.testing.assert_array_equal(mine["visible_queries"], truth["visible_queries"])
        for signal in (sig.ATTENTION_ENTROPY, sig.ATTENTION_DISTANCE, sig.LEARNED_SINK_MASS):
            if signal.name in truth.arrays:
                off = np.abs(mine[signal] - truth[signal])
                assert (off <= 5 * mine.arrays[signal.name + sig.ERROR] + 2e-3).mean() > 0.98, signal.name
        one = 1 / np.maximum(truth["visible_queries"], 1)
        off = np.abs(mine["attention_received_mean"] - truth["attention_received_mean"])
        assert (off <= 5 * mine.arrays["attention_received_mean_se"] + one).mean() > 0.98


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_of_halves_passes_on_every_kind_of_attention(family: str) -> None:
    checks = self_check(opened(family), prompts(40, 31), TracePlan(SIGNALS, sampling=Sampling(0.5)))
    (check,) = [check for check in checks if check.name.startswith("sampled rows")]
    assert check.passed, check
    assert all(other.passed for other in checks)


def test_the_check_of_halves_fails_where_weights_of_rows_are_wrong(monkeypatch: Any) -> None:
    real = check_sampling.sampled_sweep

    def wrong(call: Any, want: Any, samples: Any, *rest: Any) -> Any:
        found = real(call, want, samples, *rest)
        for stat in found.variances:
            found.values[stat] *= 1.01
        return found

    monkeypatch.setattr(check_sampling, "sampled_sweep", wrong)
    checks = self_check(opened("llama"), prompts(40, 31), TracePlan(SIGNALS, sampling=Sampling(0.5)))
    assert [check.name for check in checks if not check.passed] == [
        "sampled rows, both halves together = all rows"
    ]


def test_every_attention_signal_is_estimated_exact_or_left_out_with_a_reason() -> None:
    assert not set(not_estimable()) & ESTIMATED
    assert all(reason.startswith(("it ", "a ", "the ")) for reason in not_estimable().values())


def test_a_mitigated_map_is_not_sampled() -> None:
    from sinklens.mitigations import ZeroTuning

    model = opened("llama")
    with ZeroTuning(gamma=2.0)(model), pytest.raises(UsageError, match="edited is not estimated"):
        trace(model, prompts(150), TracePlan(SIGNALS, sampling=Sampling(0.7)))
