"""One thread per test process, no network, and no GPU test without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import wraps
from typing import Any

# Before torch or a tokenizer is imported anywhere: both read these once.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

# Shared machines are slow at odd moments: a time limit per example would make tests fail by chance.
settings.register_profile("sinklens", deadline=None, max_examples=30, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sinklens")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _summaries_are_said() -> Iterator[None]:
    """No analyzer summarises, in any test, what its class does not say; `--fail-if` would refuse to be asked for it."""
    from sinklens.analyzers.base import Analyzer, Finding

    made = Analyzer.finding

    @wraps(made)
    def finding(self: Analyzer, *given: Any, **named: Any) -> Finding:
        found = made(self, *given, **named)
        unsaid = [] if self.summarises is None else found.summary.keys() - {*self.summarises}
        assert not unsaid, f"{type(self).__name__}.summarises lacks {sorted(unsaid)}"
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Analyzer, "finding", finding)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global generator, in whatever order tests run."""
    torch.manual_seed(0)
