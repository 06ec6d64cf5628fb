"""Models that a tensor-parallel plan of transformers spreads over two processes show what one process shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sinklens.cli.dry_run import print_plan
from sinklens.cli.main import main
from sinklens.core.canonical import plain
from sinklens.core.errors import ModelError, UsageError
from sinklens.models.fingerprint import weights_hash
from sinklens.models.opening import describe_model, open_model
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.plan import predict
from sinklens.pipeline.profile import profile
from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.selfcheck import self_check
from sinklens.tracers.store import unpacked
from tests.testbeds.families import tiny

from .spread_cases import ANALYZERS, BUNDLED, CASES, TEXTS, plan_of, prompts

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-4
"""Largest difference relative to the largest value of a signal: row-parallel sums are added in another order, and where
an entry of 700 is erased its rounding is left over."""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes, with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: Any) -> Path:
    """Checkpoints, and what two processes found on them."""
    folder = tmp_path_factory.mktemp("spread")
    for name, made in CASES.items():
        made().save_pretrained(folder / name)
    done = torchrun(str(Path(__file__).with_name("spread_worker.py")), str(folder))
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite where one has a value and the other none."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    if not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        return float("inf")
    size = np.nanmax(np.abs(expected), initial=0.0)
    return float(np.nanmax(np.abs(found - expected), initial=0.0) / max(1.0, size))


def ordered(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Strongest entries by place and not by size: rounding may swap two that are all but equal."""
    found = dict(arrays)
    entries = [signal.name for signal in sig.ALL_SIGNALS if "entry" in signal.axes]
    half = sig.ENTRIES // 2
    lists = [(name, [name], slice(None)) for name in (sig.RESIDUAL_TOP.name, sig.DOWN_PROJ_TOP.name)] + [
        (sig.RESIDUAL_AFTER.name, entries, part) for part in (slice(half), slice(half, None))
    ]
    for lead, names, part in lists:
        if lead not in arrays:
            continue
        order = np.lexsort((arrays[f"{lead}_dim"][:, part], arrays[f"{lead}_pos"][:, part]))
        for key in [*names, f"{lead}_pos", f"{lead}_dim"]:
            found[key] = found[key].copy()
            found[key][:, part] = np.take_along_axis(arrays[key][:, part], order, 1)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_signal_is_that_of_one_process(name: str, spread: Path) -> None:
    opened = open_model(str(spread / name), dtype="fp32", tokenizer=object())
    expected = trace(opened, prompts(), plan_of(name)).records
    found = unpacked((spread / f"{name}.records").read_bytes())
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.arrays.keys() == other.arrays.keys()
        mine, theirs = ordered(one.arrays), ordered(other.arrays)
        for key, array in theirs.items():
            assert mine[key].shape == array.shape, key
            if array.dtype.kind == "f":
                # Some signals are stored in half precision.
                assert worst(mine[key], array) <= max(LIMIT, np.finfo(array.dtype).eps), key
            else:
                np.testing.assert_array_equal(mine[key], array, err_msg=key)
    first = expected[0]
    assert first[sig.ATTENTION_RECEIVED].shape[1] == 4
    assert (first[sig.WRITE_NEURON] >= 0).any()  # so that there is something to be wrong about
    assert first[sig.WRITE_NEURON].max() >= 40 or "moe" in name  # neurons of both processes
    if name in ("llama", "qwen3_moe"):
        assert (first[sig.BIRTH_LAYER] >= 0).any()
        assert np.isfinite(first[sig.BIRTH_COSINE][0]).all()
    if "moe" in name:
        assert (first[sig.WRITE_EXPERT] >= 0).any()
        assert (first[sig.EXPERT_NEURON] >= 20).any()


@pytest.mark.parametrize("name", CASES)
def test_processes_agree_and_their_self_check_passes(name: str, spread: Path) -> None:
    said = json.loads((spread / "found.json").read_text(encoding="utf-8"))[name]
    opened = open_model(str(spread / name), dtype="fp32", tokenizer=object())
    assert said["failed"] == []
    assert said["checks"] == [check.name for check in self_check(opened, prompts(), TracePlan())]
    assert said["same_everywhere"]
    assert said["weights"] == weights_hash(opened.module)
    assert "over 2 processes" in said["tracing"]["weights"]
    assert "its own heads" in said["tracing"]["attention_path"]
    assert "spread over 2 processes" in said["for_one"]


def close(found: Any, expected: Any, where: str = "") -> None:
    """Two documents whose numbers agree to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            close(one, other, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), where
    else:
        assert found == expected, where


def test_a_model_of_the_caller_is_profiled_by_all_processes_and_written_by_the_first(spread: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second = json.loads((spread / "found.json").read_text(encoding="utf-8"))["profiled"]
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    alone = profile(model, tokenizer=tokenizer, prompts=TEXTS, analyzers=ANALYZERS, verify=False)
    assert first["findings"] == second["findings"]
    assert (first["folder"], second["folder"]) == (str(spread / "run"), None)
    assert first["processes"] == {"count": 2, "plan": "tensor-parallel"}
    effects, expected = first["findings"], plain(alone.document["findings"])
    assert isinstance(expected, dict)
    assert "spread over processes" in effects.pop("causal-effects")["verdict"]
    expected.pop("causal-effects")
    close(effects, expected)
    stored = json.loads((spread / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert stored["weights"] == alone.trace.manifest["weights"]
    assert "over 2 processes" in stored["tracing"]["weights"]


def test_processes_with_other_prompts_are_told_so(spread: Path) -> None:
    said = json.loads((spread / "found.json").read_text(encoding="utf-8"))["profiled"]
    for process in said:
        assert process["different"].startswith("Process 1 does not have the prompts of process 0.")


def test_what_does_not_go_with_a_plan_is_refused() -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"device_map": "auto"},
        {"stream": "on"},
        {"verify": True},
        {"backend": "nnsight"},
    )
    for options in refused:
        with pytest.raises(UsageError, match=r"--tensor-parallel|needs one process"):
            predict(BUNDLED, ProfileOptions(tensor_parallel=True, **options), 2)


def test_the_plan_says_what_each_process_holds(capsys: Any) -> None:
    options = ProfileOptions(tensor_parallel=True, n=2)
    described, _, predicted = predict(BUNDLED, options, 2)
    assert predicted.spread == {"processes": 2, "weights_each": described.loaded_bytes // 2}
    assert predicted.experiments == {}
    print_plan(BUNDLED, options, as_json=False, processes=2)
    assert "Parallel    tensor parallel: 2 processes hold about" in capsys.readouterr().out


def test_one_process_alone_is_told_how_to_start_several(tmp_path: Path, capsys: Any) -> None:
    for more in (["--dry-run"], ["--out", str(tmp_path / "run")]):
        assert main(["profile", "-m", BUNDLED, "--tensor-parallel", *more]) == 2
        assert "torchrun --nproc-per-node N -m sinklens profile" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def refused(folder: Path, model: Any, size: int) -> str:
    model.save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        describe_model(str(folder), spread=size)
    return f"{caught.value} {caught.value.hint}"


def test_heads_that_cannot_be_shared_evenly_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    said = refused(tmp_path / "kv", tiny("llama"), 2)
    assert "6 heads and 3 key-value heads, which 2 processes cannot share evenly" in said
    assert "Start 3 processes." in said
    said = refused(tmp_path / "one", tiny("llama", num_key_value_heads=1), 2)
    assert "1 key-value head," in said
    assert "Start" not in said


def test_models_without_a_plan_or_with_attention_of_their_own_are_refused(tmp_path: Path) -> None:
    assert "no tensor-parallel plan for 'gpt2'" in refused(tmp_path / "gpt2", tiny("gpt2"), 2)


@pytest.mark.slow
def test_a_killed_process_is_named_and_as_many_go_on(tmp_path: Path) -> None:
    given = ["profile", "-q", "-m", "bundled:dense-ind", "-n", "5", "--batch-size", "2", "--dtype", "fp32"]
    given += ["--analyzers", "primary-sinks", "--no-verify"]
    script, folder = str(Path(__file__).with_name("one_of_spread_dies.py")), tmp_path / "run"
    done = torchrun(script, "1", *given, "--tensor-parallel", "--out", str(folder))
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    named = [line for line in lines if "without a word" in line]
    assert named == ["Process 1 of 2 ended without a word."]
    assert [line for line in lines if "/5 prompts saved." in line]
    assert [line for line in lines if line.startswith("Continue, with as many processes: torchrun")]
    assert main(["profile", "-q", "--resume", str(folder)]) == 2  # one process alone
    again = torchrun("-m", "sinklens", "profile", "-q", "--resume", str(folder))
    assert again.returncode == 0, again.stderr
    assert main([*given, "--out", str(tmp_path / "alone")]) == 0
    found, expected = (load_file(run / "arrays.safetensors") for run in (folder, tmp_path / "alone"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype.kind == "f":
            assert worst(found[name], array) <= LIMIT, name
