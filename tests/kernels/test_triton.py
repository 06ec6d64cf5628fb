"""The Triton kernels: in Triton's interpreter here, on a CUDA device where there is one, and where they are chosen."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sinklens.kernels import triton_pass
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, BlockPlan, Stat, Want

from .calls import Case, build

ROOT = Path(__file__).parent.parent.parent
CASE = Case(1, 2, 3, 37, 37, 8, 5, "causal", None, False, False, False, "few", 5_000, 1)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def alone(file: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tests without the type checks of shapes: those wrap functions, and Triton reads their source."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=--import-mode=importlib", *options]
    # numpy warns of infinities that are masked afterwards.
    command += ["-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider", f"tests/kernels/{file}"]
    given = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter() -> None:
    ran = alone("interpreted.py", TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


@pytest.mark.slow
@needs_triton
def test_they_compile_for_devices(tmp_path: Path) -> None:
    ran = alone("compiles.py", TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


@pytest.mark.gpu
@needs_triton
def test_on_a_device() -> None:
    ran = alone("on_device.py")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_calls_that_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    call, want, _ = build(CASE)
    want = replace(want, stats=triton_pass.SERVED)
    assert triton_pass.fits(call, want)
    assert not triton_pass.fits(call, replace(want, stats=frozenset({Stat.GROUP_OUTPUT})))
    assert not triton_pass.fits(replace(call, query=call.query.double()), want)
    assert not triton_pass.fits(replace(call, value=call.value.bfloat16()), want)
    many = torch.zeros(40, 1, 37, dtype=torch.bool)
    assert not triton_pass.fits(call, replace(want, groups=many))
    assert not triton_pass.serves(call, want)  # on the CPU
    monkeypatch.setenv("SINKLENS_TRITON", "0")
    assert not triton_pass.installed()


def test_a_kernel_that_does_not_run_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the driver is too old for this Triton, or its compiler is missing."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(triton_pass, "fused", fails)
    kind = (torch.device("cpu"), torch.float32, 12, 12)
    triton_pass.trusted.cache_clear()
    assert not triton_pass.trusted(kind)
    assert not triton_pass.trusted(kind)
    triton_pass.trusted.cache_clear()
    assert caplog.text.count("no compiler") == 1


def test_the_passes_hand_their_calls_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `attention_fused` and `attention_sweep` do on a device, seen without one."""
    call, want, _ = build(CASE)
    want = replace(want, stats=frozenset({Stat.RECEIVED}))
    statistics, asked = AttentionStatistics(), []

    def fused(call: AttentionCall, want: Want) -> tuple[torch.Tensor, AttentionStatistics]:
        asked.append("fused")
        return call.query, statistics

    def sweep(call: AttentionCall, want: Want, lse: torch.Tensor | None) -> AttentionStatistics:
        asked.append("sweep" if lse is None else "known")
        return statistics

    monkeypatch.setattr(triton_pass, "serves", lambda *_: True)
    monkeypatch.setattr(triton_pass, "fused", fused)
    monkeypatch.setattr(triton_pass, "sweep", sweep)
    assert attention_fused(call, want) == (call.query, statistics)
    assert attention_sweep(call, want) is statistics
    assert attention_sweep(call, want, torch.zeros(1, 6, 37)) is statistics
    assert asked == ["fused", "sweep", "known"]
    attention_sweep(call, want, None, BlockPlan(native=False))
    assert len(asked) == 3
