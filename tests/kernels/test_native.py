"""The compiled row pass: the same results, and no harm where it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from sinklens.kernels import native, rowpass
from sinklens.kernels.blocked import attention_fused, attention_sweep
from sinklens.kernels.rowpass import native_serves
from sinklens.kernels.spec import BlockPlan

from .calls import ALL, Case, assert_close, build, cases, expected, near_ties, output_error, true_lse

compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C compiler")

# Weights, their product with the values, and that less a learned sink's share are each rounded to 8 bits.
HALF_BOUND = 2**-7


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a library that is not loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def compare(case: Case, output_bound: float = 2e-6) -> None:
    call, want, plan = build(case)
    assert native_serves(call, plan)
    true_output, truth = expected(call, want)
    ties = near_ties(call)
    output, fused = attention_fused(call, want, plan)
    assert output_error(output, true_output, call) <= output_bound
    assert_close(fused, truth, ties=ties)
    assert_close(attention_sweep(call, want, None, plan), truth, ties=ties)
    assert_close(attention_sweep(call, want, true_lse(call), plan), truth, ties=ties, bound=3e-6)


@needs_compiler
@settings(max_examples=100)
@given(cases())
def test_compiled_pass_equals_the_definition(case: Case) -> None:
    compare(case)


@needs_compiler
@settings(max_examples=25)
@given(cases(dtype=torch.bfloat16))
def test_compiled_pass_in_bfloat16(case: Case) -> None:
    compare(case, HALF_BOUND)


@needs_compiler
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 63, 64, 65, 129, 701])
def test_every_row_end(keys: int) -> None:
    compare(Case(1, 2, 3, keys, keys, 8, 5, "causal", None, True, True, False, "few", 90_000, keys))


@needs_compiler
def test_threads_change_nothing() -> None:
    call, want, plan = build(
        Case(2, 3, 2, 101, 101, 8, 5, "window", None, True, True, True, "few", 50_000, 4)
    )
    _, one = attention_fused(call, want, plan)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        _, three = attention_fused(call, want, plan)
    finally:
        torch.set_num_threads(before)
    for stat in ALL:
        torch.testing.assert_close(three[stat], one[stat], atol=1e-6, rtol=1e-6)


@needs_compiler
def test_underflow_is_exactly_zero() -> None:
    logits = torch.tensor([0.0, -80.0, -87.0, -88.0, -200.0, -1e30]).view(1, 1, 1, 6)
    weights = logits.clone()
    rowpass.pass_rows(weights, rowpass.RowRequest())
    assert weights[..., 3:].eq(0).all()
    assert weights[..., 1] > 0
    torch.testing.assert_close(weights, logits.softmax(-1), atol=1e-37, rtol=2e-6)


@needs_compiler
def test_library_is_built_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available()
    built = list((fresh / "sinklens").iterdir())
    assert len(built) == 1
    native.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert native.available()
    assert list((fresh / "sinklens").iterdir()) == built


def test_a_single_threaded_build_leaves_several_threads_to_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = native._loaded

    def without_openmp(flags: tuple[str, ...]) -> native.Library:
        if "-fopenmp" in flags:
            raise OSError("no OpenMP")
        return loaded(flags)

    monkeypatch.setattr(native, "_loaded", without_openmp)
    assert native.available() == (compiler is not None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert not native.available()


def test_off_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINKLENS_NATIVE", "0")
    assert not native.available()


def _no_compiler(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)


def _failing_compiler(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setenv("CC", "false")


def _wrong_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("void sinklens_rows(float *x) { x[0] = 0.5f; }\n")
    monkeypatch.setattr(native, "_SOURCE", source)


@pytest.mark.parametrize("spoil", [_no_compiler, _failing_compiler, _wrong_library])
def test_torch_takes_over(spoil: Any, monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    spoil(monkeypatch, fresh)
    assert not native.available()
    call, want, plan = build(
        Case(1, 2, 3, 37, 37, 8, 5, "causal", None, False, False, False, "few", 5_000, 1)
    )
    assert not native_serves(call, plan)
    assert_close(attention_fused(call, want, plan)[1], expected(call, want)[1], ties=near_ties(call))


def test_where_the_compiled_pass_does_not_serve() -> None:
    call, _, plan = build(Case(1, 2, 3, 37, 37, 8, 5, "causal", None, False, False, False, "few", 5_000, 1))
    assert native_serves(call, plan) == native.available()
    assert not native_serves(call, BlockPlan(native=False))
    double = replace(call, query=call.query.double(), key=call.key.double(), value=call.value.double())
    assert not native_serves(double, plan)


def kept_in(fresh: Path) -> list[Path]:
    return sorted((fresh / "sinklens").glob("kernels-*.so"))


@needs_compiler
@pytest.mark.parametrize(
    "spoil", [lambda data: data[: len(data) // 2], lambda _: b"", lambda data: data[::-1]]
)
def test_a_damaged_library_is_not_loaded_but_made_again(fresh: Path, spoil: Any) -> None:
    assert native.available()
    (kept,) = kept_in(fresh)
    whole = kept.read_bytes()
    native.library.cache_clear()
    kept.unlink()  # the mapped file itself must stay as it is
    kept.write_bytes(spoil(whole))
    kept.chmod(0o600)
    assert native.available()
    (library,) = kept_in(fresh)
    assert native._intact(library)
    assert native.built().threaded


@needs_compiler
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_to_is_not_loaded(
    fresh: Path, what: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.available()
    (kept,) = kept_in(fresh)
    target = kept if what == "file" else kept.parent
    target.chmod(target.stat().st_mode | mode)
    native.library.cache_clear()
    opened: list[str] = []
    monkeypatch.setattr(native, "Library", spy_on(native.Library, opened))
    assert native.available()
    assert len(opened) == 1
    if what == "folder":
        assert Path(opened[0]).parent.parent != fresh
    assert target.stat().st_mode & mode == (
        mode if what == "folder" else 0
    )  # a file is replaced by one's own


def spy_on(kind: type[native.Library], opened: list[str]) -> Any:
    def load(name: str) -> native.Library:
        opened.append(name)
        return kind(name)

    return load


@needs_compiler
def test_a_library_of_somebody_else_is_not_loaded(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available()
    (kept,) = kept_in(fresh)
    assert native._intact(kept)
    monkeypatch.setattr(os, "geteuid", lambda: kept.stat().st_uid + 1)
    assert not native._intact(kept)
    assert native._cache() is None


@needs_compiler
@pytest.mark.parametrize("spoil", ["no home", "a file in its place", "relative"])
def test_without_a_cache_each_process_builds_its_own(
    spoil: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil == "a file in its place":
        (fresh / "sinklens").write_text("")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "" if spoil == "no home" else "here")
        monkeypatch.chdir(fresh)

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    left = sorted(fresh.iterdir())
    assert native.available()
    assert sorted(fresh.iterdir()) == left


@needs_compiler
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_check_does_not_depend_on_the_callers_settings(fresh: Path, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert native.available()
    finally:
        torch.set_default_dtype(before)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_hang(fresh: Path) -> None:
    """Threads of OpenMP do not survive a fork, and the child would wait for them forever."""
    script = """
import os, signal, torch
from sinklens.kernels.blocked import attention_fused
from sinklens.kernels.spec import AttentionCall, Stat, Want
torch.set_num_threads(2)
query = torch.randn(1, 4, 64, 8)
call, want = AttentionCall(query, query, query, 0.3), Want(frozenset({Stat.RECEIVED}))
expected = attention_fused(call, want)[1][Stat.RECEIVED]
child = os.fork()
if not child:
    signal.alarm(20)
    os._exit(0 if torch.allclose(attention_fused(call, want)[1][Stat.RECEIVED], expected) else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@needs_compiler
def test_processes_that_build_at_once_agree(fresh: Path) -> None:
    script = "from sinklens.kernels import native; assert native.available() and native.built().threaded"
    both = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [each.wait(60) for each in both] == [0, 0]
    assert kept_in(fresh)
    assert all(map(native._intact, kept_in(fresh)))
    assert [path for path in (fresh / "sinklens").iterdir() if path.is_dir()] == []
