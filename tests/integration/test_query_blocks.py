"""How many query rows are taken at once follows from cache and memory, changes no result, and is written down."""

from __future__ import annotations

import numpy as np
import pytest

import sinklens as sl
from sinklens.kernels.spec import BlockPlan
from sinklens.pipeline import prepare
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.plan import plan_document, predict
from sinklens.pipeline.query_blocks import LEAST_SCORES, fitting_blocks, last_cache

GB = 1_000_000_000


def test_blocks_shrink_with_the_cache_and_with_the_memory_and_not_below_what_is_worth_walking() -> None:
    usual = BlockPlan().scores
    assert fitting_blocks(BlockPlan(), cache=10 * GB, memory=100 * GB).scores == usual
    assert fitting_blocks(BlockPlan(), cache=4_000_000, memory=100 * GB).scores == 1_000_000
    assert fitting_blocks(BlockPlan(), cache=10 * GB, memory=GB // 2).scores == 1_562_500
    assert fitting_blocks(BlockPlan(), cache=1000, memory=1000).scores == LEAST_SCORES
    cache = last_cache()
    assert cache is None or cache > 10_000


def test_the_manifest_states_the_blocks_and_results_do_not_depend_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {"n": 3, "verify": False, "analyzers": ("primary-sinks",)}
    one = sl.profile(**asked)
    small = BlockPlan(scores=1500)
    monkeypatch.setattr(prepare, "fitting_blocks", lambda _: small)
    other = sl.profile(**asked)
    said = other.document["manifest"]["query_blocks"]
    assert said["scores"] == 1500
    assert 1 <= said["rows"] < one.document["manifest"]["query_blocks"]["rows"] <= 128
    assert said["at_tokens"] == 64
    for mine, theirs in zip(one.trace, other.trace, strict=True):
        for name in ("attention_received", "attention_top1"):
            np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5)


def test_the_plan_states_blocks_and_sample_before_anything_is_run() -> None:
    asked = ProfileOptions(prompts="corpus:mixed", pack=True, n=3, seq_len=256, sample_queries="50%")
    described, prompts, predicted = predict("bundled:dense-ind", asked)
    document = plan_document(described, prompts, predicted)["prediction"]
    assert document["query_blocks"]["at_tokens"] == 256
    assert document["query_blocks"]["rows"] >= 32
    assert document["sampling"]["share"] == 0.5
    assert "attention_self" not in document["signals"]
    assert "attention_received" in document["signals"]
    assert plan_document(*predict(None, ProfileOptions()))["prediction"]["sampling"] is None
