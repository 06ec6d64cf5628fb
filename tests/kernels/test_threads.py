"""Calls from several Python threads: each gets its own results, and no setting of the process is in their way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sinklens.kernels import scores
from sinklens.kernels.blocked import attention_fused
from sinklens.kernels.spec import AttentionCall, Stat, Want

STATS = frozenset({Stat.RECEIVED, Stat.ENTROPY, Stat.RECEIVED_LOG, Stat.LSE})


@pytest.mark.parametrize("stats", [STATS, STATS | {Stat.RECEIVED_MAX}])
def test_threads_with_models_of_different_precision(stats: frozenset[Stat]) -> None:
    """Products of bfloat16 numbers are made under a setting that would round those of float32 numbers."""

    before = torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]

    def call_of(seed: int) -> AttentionCall:
        generator = torch.Generator().manual_seed(seed)
        heads, dtype = (6, 2, 2), torch.bfloat16 if seed % 2 else torch.float32
        shapes = [(1, each, 101 + 37 * seed, 20) for each in heads]
        return AttentionCall(*(torch.randn(s, generator=generator).to(dtype) for s in shapes), scale=0.25)

    calls, want = [call_of(seed) for seed in range(4)], Want(stats)
    alone = [attention_fused(call, want)[1] for call in calls]

    def again(which: int) -> float:
        errors = []
        for _ in range(40):
            found = attention_fused(calls[which], want)[1]
            errors += [float((found[stat] - alone[which][stat]).abs().max()) for stat in stats]
        return max(errors)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(again, range(4))) < 1e-4
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # pyright: ignore[reportAttributeAccessIssue]


def test_the_setting_is_touched_only_where_no_other_thread_can_notice() -> None:
    stop, inside = threading.Event(), []
    assert scores._alone()
    for daemon in (True, False):
        other = threading.Thread(
            target=lambda: (inside.append(scores._alone()), stop.wait(20)), daemon=daemon
        )
        other.start()
        assert scores._alone() is daemon
        stop.set()
        other.join()
        stop.clear()
    assert inside == [False, False]
    assert scores._alone()
