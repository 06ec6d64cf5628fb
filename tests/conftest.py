"""One thread per test process, no network, and no GPU test without a GPU."""

from __future__ import annotations

import os

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


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global generator, in whatever order tests run."""
    torch.manual_seed(0)
