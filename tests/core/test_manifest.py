"""The record of a run is complete, plain and private."""

from __future__ import annotations

import getpass
import json
import platform
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sinklens.core.manifest import (
    Clock,
    build_manifest,
    command_line,
    cpu_model,
    device_facts,
    git_state,
    manifest_diff,
    peak_memory,
    required_versions,
)


def test_everything_is_there_and_plain():
    clock = Clock()
    time.sleep(0.02)
    manifest = build_manifest(
        clock=clock,
        argv=["/opt/x/bin/sinklens", "profile"],
        seeds={"sample": np.int64(3)},  # pyright: ignore[reportArgumentType]
        device="cpu",
        model={"id": "tiny", "parameters": np.int64(7)},
        inputs={"mean": float("nan")},
    )
    assert json.loads(json.dumps(manifest, allow_nan=False)) == manifest
    assert manifest["schema"] == "sinklens/manifest/1"
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["python"] == platform.python_version()
    assert manifest["command"] == ["sinklens", "profile"]
    assert manifest["seeds"] == {"sample": 3}
    assert manifest["model"] == {"id": "tiny", "parameters": 7}
    assert manifest["inputs"] == {"mean": None}
    assert manifest["time"]["wall_s"] >= 0.02
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest["time"]["start_utc"])
    assert manifest["device"]["threads"] == 1
    assert manifest["memory"]["peak_rss_bytes"] > 10 << 20
    assert manifest["memory"]["peak_cuda_bytes"] is None or torch.cuda.is_available()


def test_outside_the_command_line():
    manifest = build_manifest()
    assert manifest["command"] is None
    assert manifest["time"] is None
    assert manifest["device"]["name"] is None


def test_own_sections_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"\['versions'\]"):
        build_manifest(versions={})


def test_nothing_tells_who_or_where():
    argv = ["/usr/local/bin/sinklens", "profile", "-m", str(Path.home() / "models" / "tiny")]
    text = json.dumps(build_manifest(clock=Clock(), argv=argv, device="cpu"))
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    user = getpass.getuser()
    assert not re.search(rf"(?<![\w.]){re.escape(user)}(?![\w.])", text)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], []),
        (["C:\\Tools\\sinklens.exe", "ls"], ["sinklens", "ls"]),
        (["sinklens", "-m", "org/model@main"], ["sinklens", "-m", "org/model@main"]),
        (["sinklens", "--prompts=/data/me/a.jsonl:body"], ["sinklens", "--prompts=a.jsonl:body"]),
        (["sinklens", "--out", "~/runs/a"], ["sinklens", "--out", "a"]),
        (["sinklens", "hf:/data/me/set:v2:test"], ["sinklens", "hf:set:v2:test"]),
        (["sinklens", "D:\\me\\a.txt", "runs/b", "--fail-if", "sink_rate>=0.3"],
         ["sinklens", "a.txt", "runs/b", "--fail-if", "sink_rate>=0.3"]),
    ],
)  # fmt: skip
def test_command_line(argv, expected):
    assert command_line(argv) == expected


def test_git_state(tmp_path):
    nothing = {"commit": None, "modified": None}
    assert git_state(tmp_path) == nothing

    def git(*command):
        config = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *config, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) == nothing
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = git_state(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", clean["commit"])
    assert clean["modified"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": clean["commit"], "modified": True}


def test_git_state_without_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"commit": None, "modified": None}


def test_cpu_model(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t: x\n")
    assert cpu_model(info) == "Some CPU @ 2.00GHz"
    assert cpu_model(tmp_path / "none") == (platform.processor() or None)


def test_peak_memory_grows():
    before = peak_memory()
    assert before is not None
    block = np.ones(before // 8 + (64 << 20) // 8)
    after = peak_memory()
    assert after is not None
    assert after - before > 32 << 20
    del block


@pytest.mark.gpu
def test_device_facts_name_the_gpu():
    facts = device_facts("cuda:0")
    assert facts["gpu"] == torch.cuda.get_device_name(0)
    assert facts["gpu_bytes"] > 1 << 30


def test_diff():
    a = {
        "time": {"wall_s": 1},
        "versions": {"torch": "2.13.0", "numpy": "2"},
        "inputs": {"n": [1, 2]},
        "x": {},
    }
    b = {
        "time": {"wall_s": 2},
        "versions": {"torch": "2.14.0", "numpy": "2"},
        "inputs": {"n": [1, 3]},
        "y": 1,
    }
    expected = {
        "versions.torch": ("2.13.0", "2.14.0"),
        "inputs.n": ([1, 2], [1, 3]),
        "x": ({}, None),
        "y": (None, 1),
    }
    assert manifest_diff(a, b) == expected
    assert manifest_diff(a, a) == {}
    assert "time.wall_s" in manifest_diff(a, b, ignore=())
    assert "versions.torch" not in manifest_diff(a, b, ignore=("versions",))
    first, second = build_manifest(clock=Clock(), argv=["a"]), build_manifest(clock=Clock(), argv=["b"])
    assert manifest_diff(first, second) == {}


def test_versions_asked_for_are_read_from_the_package():
    wanted = required_versions("transformer_lens")
    assert wanted is not None
    assert wanted.contains("4.3.1")
    assert not wanted.contains("3.9.0")
    assert required_versions("no-such-package") is None
