"""What a manifest says of the kernels that took the statistics, and why not of the faster ones."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import pytest
import torch

from sinklens.kernels import native
from sinklens.kernels.choice import statistics_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def _unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("_unbuilt")
def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cache", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert statistics_kernel(CPU) == "torch row pass, without the compiled one: no C compiler was found"


@pytest.mark.usefixtures("_unbuilt")
def test_a_build_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cache", lambda: None)
    monkeypatch.setenv("CC", "false")
    assert statistics_kernel(CPU).endswith("it could not be built, or was wrong")


def test_switches_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINKLENS_NATIVE", "0")
    assert statistics_kernel(CPU).endswith("SINKLENS_NATIVE=0")
    monkeypatch.setenv("SINKLENS_TRITON", "0")
    assert statistics_kernel(CUDA) == "torch, without the Triton kernels: SINKLENS_TRITON=0"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    assert statistics_kernel(CUDA).endswith("Triton is not installed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert statistics_kernel(CUDA) == "Triton kernels"
    assert statistics_kernel(torch.device("mps")) == "torch, there are no other kernels for mps"
