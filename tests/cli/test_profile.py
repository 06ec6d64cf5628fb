"""`sinklens profile` as its users meet it: results, exit codes, messages, interruption."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sinklens
import sinklens.core.errors
from sinklens.analyzers import chosen_analyzers
from sinklens.cli.main import main
from sinklens.models.catalog import bundled, default_model

CHECKPOINT = bundled()[default_model().partition(":")[2]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint that a test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that must fail with this exit code; its message, which is no traceback and at most 4 lines."""
    assert main(["profile", "-q", *arguments]) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    message = shown.err.strip()
    assert message
    assert len(message.splitlines()) <= 4, message
    return message


def test_the_default_run_gives_a_verdict_a_folder_and_a_report(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert main(["profile", "--out", str(out), "-q"]) == 0
    assert "attention sink on position 0" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "manifest.json",
        "prompts.jsonl",
        "arrays.safetensors",
        "tables",
        "summary.json",
        "report.html",
    }
    assert "shards" not in names
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")


def test_json_is_one_document_of_the_promised_shape(tmp_path: Path, capsys: Any) -> None:
    assert main(["profile", "--json", "--out", str(tmp_path / "run")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "sinklens/run/1"
    assert document["verdict"]["status"] == "sink"
    of_text = [analyzer.name for analyzer in chosen_analyzers(()) if not analyzer.of_pictures]
    assert list(document["findings"]) == of_text
    assert {"primary-sinks", "massive-activations", "super-experts"} < document["findings"].keys()
    finding = document["findings"]["primary-sinks"]
    assert {"status", "reason", "verdict", "parameters", "summary", "rows"} <= finding.keys()
    row = finding["rows"][0]
    assert {"position", "token", "token_id", "share", "lift", "rate", "n_prompts"} <= row.keys()
    assert (row["position"], row["token"]) == (0, "<s>")
    assert {"sink_rate", "epsilon", "seq_len"} <= finding["summary"].keys()
    assert all(check["passed"] for check in document["checks"])
    assert document == json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(document)


def test_a_saved_run_is_the_run(tmp_path: Path) -> None:
    run = sinklens.profile(out=tmp_path / "run", n=9)
    back = sinklens.load(tmp_path / "run")
    assert isinstance(back, sinklens.Run)
    assert back.document == run.document
    assert sinklens.load(tmp_path / "run" / "report.html") == run.document
    strict = back.analyze("primary-sinks:epsilon=0.9")
    assert strict.primary_sinks.summary["sink_rate"] == 0
    assert back.primary_sinks.summary["sink_rate"] > 0


STOPPED_AFTER_FIVE = """
import signal, sys
from sinklens.cli.console import ConsoleListener
from sinklens.cli.main import main

def progress(self, done, total):
    if done == 5:
        signal.raise_signal(signal.SIGINT)

ConsoleListener.progress = progress
# A shell that runs the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
"""The command line, with a Ctrl-C that comes when five prompts are finished: not sooner or later on any machine."""


def test_interruption_keeps_finished_prompts_and_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-c", STOPPED_AFTER_FIVE, "profile", "--batch-size", "1", "-q", "--out"]
    process = subprocess.run([*command, str(stopped)], stderr=subprocess.PIPE, text=True, timeout=300)
    assert process.returncode == 130, process.stderr
    assert f"Continue: sinklens profile --resume {stopped}" in process.stderr
    assert "Stopped. 5/64 prompts saved." in process.stderr
    assert len(list(stopped.glob("shards/*.safetensors"))) == 5
    assert main(["profile", "-q", "--resume", str(stopped)]) == 0
    assert main(["profile", "-q", "--batch-size", "1", "--out", str(whole)]) == 0
    resumed, straight = sinklens.load(stopped), sinklens.load(whole)
    assert isinstance(resumed, sinklens.Run)
    assert isinstance(straight, sinklens.Run)
    for mine, other in zip(resumed.trace, straight.trace, strict=True):
        assert mine.arrays.keys() == other.arrays.keys()
        for name, array in mine.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])
    assert resumed.document["findings"] == straight.document["findings"]


def test_resume_refuses_a_changed_model(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from sinklens.tracers import store

    out = tmp_path / "run"
    monkeypatch.setattr(store.RunStore, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["profile", "-q", "-m", str(folder), "--out", str(out)]) == 130
    monkeypatch.undo()
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v * 1.01 for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    message = fails(capsys, 3, "--resume", str(out))
    assert "the model changed" in message
    assert re.search(
        r"files_sha256\.model\.safetensors was [0-9a-f]{12}\.\.\. and is [0-9a-f]{12}\.\.\.", message
    )


def stopped_run(out: Path, monkeypatch: Any, *arguments: str) -> None:
    """A run stopped when its prompts are done."""
    from sinklens.tracers import store

    monkeypatch.setattr(store.RunStore, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["profile", "-q", *arguments, "--out", str(out)]) == 130
    monkeypatch.undo()


def test_resume_refuses_changed_prompts_and_names_what_differs(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("one line of words here\nanother line of words there\n", encoding="utf-8")
    stopped_run(out, monkeypatch, "--prompts", str(prompts), "--analyzers", "massive-activations")
    prompts.write_text("one line of words here\n", encoding="utf-8")
    message = fails(capsys, 3, "--resume", str(out))
    assert "the prompts changed" in message
    assert "n_prompts was 2 and is 1" in message
    prompts.unlink()
    assert str(prompts.name) in fails(capsys, 3, "--resume", str(out))


def test_resume_refuses_another_way_of_tracing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "run"
    stopped_run(out, monkeypatch)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    manifest["tracing"]["batch_tokens"] = 77
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    message = fails(capsys, 3, "--resume", str(out))
    assert "the tracing changed" in message
    assert "batch_tokens was 77 and is 4096" in message


def test_a_disk_without_room_is_told_before_anything_is_run(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    message = fails(capsys, 4, "--out", str(tmp_path / "run"))
    assert "not enough disk for this run: 1 kB are free" in message
    assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out, written = tmp_path / "run", []
    real = os.fsync

    def full(descriptor: int) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = fails(capsys, 4, "--batch-size", "4", "--out", str(out))
    assert "is full" in message
    assert f"--resume {out}" in message
    monkeypatch.undo()
    assert len(list(out.glob("shards/*.safetensors"))) == 3
    assert main(["profile", "-q", "--resume", str(out)]) == 0


def test_running_out_of_memory_keeps_what_was_finished(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from sinklens.tracers import executor

    real, calls = executor.trace_batch, []

    def small(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 2 and not options.get("logits", True):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **options)

    monkeypatch.setattr(executor, "trace_batch", small)
    message = fails(capsys, 4, "--out", str(tmp_path / "run"))
    assert "Out of memory after" in message
    assert "--batch-size 1" in message


def test_an_unwritable_output_folder(tmp_path: Path, capsys: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    message = fails(capsys, 2, "--out", str(blocked / "run"))
    assert "cannot be written" in message
    assert "--out" in message


def test_an_existing_run_is_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert main(["profile", "-q", "-n", "4", "--out", str(out)]) == 0
    assert "--force" in fails(capsys, 2, "-n", "4", "--out", str(out))
    assert main(["profile", "-q", "-n", "4", "--out", str(out), "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-m", "qwen3-30b"), 3, "qwen3-30b-a3b"),
        (("--analyzers", "super-expert"), 2, "super-experts"),
        (("--analyzers", "primary-sinks:epsilonn=0.2"), 2, "epsilon"),
        (("--analyzers", "primary-sinks:epsilon=high"), 2, "epsilon"),
        (("--preset", "gu2023"), 2, "gu2024"),
        (("--mode", "quick"), 2, "faithful"),
        (("--fail-if", "sink_rate"), 2, "path operator value"),
        (("--seq-len", "0"), 2, "at least 1"),
        (("--prompts", "nowhere.txt"), 3, "nowhere.txt"),
        (("--prompts", "corpus:prosee"), 3, "prose"),
        (("--resume", "nowhere"), 3, "not a run folder"),
    ],
)
def test_wrong_names_and_values(
    arguments: tuple[str, ...], code: int, says: str, tmp_path: Path, capsys: Any
) -> None:
    out = () if "--resume" in arguments else ("--out", str(tmp_path / "run"))
    assert says in fails(capsys, code, *arguments, *out)


def test_fail_if_prints_the_value_and_exits_with_six(tmp_path: Path, capsys: Any) -> None:
    message = fails(
        capsys, 6, "-n", "4", "--fail-if", "primary-sinks.sink_rate > 1", "--out", str(tmp_path / "a")
    )
    assert "primary-sinks.sink_rate is" in message
    assert (
        main(
            [
                "profile",
                "-q",
                "-n",
                "4",
                "--fail-if",
                "verdict.status == no-sink",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    said = fails(
        capsys, 2, "-n", "4", "--fail-if", "primary-sinks.sink_rat > 1", "--out", str(tmp_path / "c")
    )
    assert "sink_rate" in said


def test_a_folder_without_config(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(capsys, 3, "-m", str(tmp_path / "empty"), "--out", str(tmp_path / "run"))


def test_truncated_weights_are_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    message = fails(capsys, 3, "-m", str(folder), "--out", str(tmp_path / "run"))
    assert "model.safetensors" in message


def test_a_missing_tokenizer(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in fails(capsys, 3, "-m", str(folder), "--out", str(tmp_path / "run")).lower()


def test_nan_weights_are_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "down_proj" in key)
    weights[name][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = fails(capsys, 3, "-m", str(folder), "--out", str(tmp_path / "run"))
    assert "NaN" in message
    assert name in message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", "", "empty"),
        ("blank.txt", "\n  \n", "no"),
        ("bad.jsonl", '{"text": "oak"}\n{"text": \n', "bad.jsonl:2"),
        ("field.jsonl", '{"text": "oak"}\n{"prompt": "pine", "id": 3}\n', "field.jsonl:2"),
    ],
)
def test_unusable_prompt_files(name: str, content: str, says: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / name).write_text(content)
    message = fails(capsys, 3, "--prompts", str(tmp_path / name), "--out", str(tmp_path / "run"))
    assert says in message


def test_prompts_shorter_than_the_metric_needs(tmp_path: Path, capsys: Any) -> None:
    """Who names the metric is refused; who does not is told in the verdict."""
    (tmp_path / "short.txt").write_text("oak pine\nfox\n")
    short = ("--prompts", str(tmp_path / "short.txt"))
    named = fails(capsys, 3, *short, "--analyzers", "primary-sinks", "--out", str(tmp_path / "named"))
    assert "primary-sinks needs prompts of at least 32 tokens; the longest has 3." in named
    assert not (tmp_path / "named").exists()
    assert main(["profile", "-q", *short, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "Attention sinks were not measured: sink rates need prompts of at least 32 tokens" in said


def test_hostile_tokens_do_not_reach_the_report_as_markup(folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    hostile = "</script><script>alert(1)</script>"
    word = next(word for word in vocabulary if word.isalpha())
    vocabulary[hostile] = vocabulary.pop(word)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    prompts = (
        (folder / "sinklens_prompts.jsonl").read_text(encoding="utf-8").replace(f"{word} ", f"{hostile} ")
    )
    (folder / "sinklens_prompts.jsonl").write_text(prompts, encoding="utf-8")
    run = sinklens.profile(str(folder), out=tmp_path / "run", n=8)
    assert any(hostile in record.pieces for record in run.trace)
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in html
    assert "<script>alert" not in html


def test_help_needs_no_heavy_import() -> None:
    listing = "print(sorted(sys.modules), file=sys.stderr)"
    code = f"import sys; from sinklens.cli.main import main; main(['--help']); {listing}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "pandas",
        "plotly",
        "matplotlib",
        "transformer_lens",
        "nnsight",
    }
    assert not heavy & set(done.stderr.strip("[]\n").replace("'", "").split(", "))


@pytest.mark.parametrize(
    "extra", [("-n", "7"), ("-m", "bundled:moe-ind"), ("--preset", "gu2024"), ("--out", "x")]
)
def test_resume_refuses_options_it_would_ignore(extra: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    assert main(["profile", "-q", "-n", "4", "--out", str(out)]) == 0
    assert "would be ignored" in fails(capsys, 2, "--resume", str(out), *extra)
    assert main(["profile", "-q", "--resume", str(out)]) == 0


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: Any) -> None:
    from sinklens.tracers.store import RunStore

    store = RunStore(tmp_path / "run")
    store.create()
    with store.locked():
        run = f"sys.exit(main(['profile', '--out', {str(store.folder)!r}]))"
        code = f"import sys; from sinklens.cli.main import main; {run}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Another run is writing" in done.stderr


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path, capsys: Any) -> None:
    fails(capsys, 3, "-m", "nowhere", "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_token_ids_and_positions_the_model_does_not_have(tmp_path: Path, capsys: Any) -> None:
    from tests.families import build, save_with_tokenizer

    save_with_tokenizer(build("gpt2"), str(tmp_path / "gpt2"))
    out = ("--out", str(tmp_path / "run"))
    text = ("--prompts", "corpus:prose", "-n", "2", "-m", str(tmp_path / "gpt2"))
    message = fails(capsys, 3, *text, "--seq-len", "600", *out)
    assert "learned positions for 512" in message
    assert main(["profile", "-q", *text, "--seq-len", "64", *out]) == 0
    with pytest.raises(sinklens.core.errors.DataError, match="token id 999"):
        sinklens.profile(build("llama"), prompts=[[1, *[999] * 40]])


def test_a_misspelt_gate_is_told_before_anything_is_run(tmp_path: Path, capsys: Any) -> None:
    assert "primary-sinks" in fails(
        capsys, 2, "--fail-if", "primary-sink.rate > 3", "--out", str(tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written_is_no_bug() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    code = "import sys; from sinklens.cli.main import main; sys.exit(main(['ls', 'models']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4
    assert "disk is full" in done.stderr


def test_the_registries_of_transformers_are_as_before() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    registries = (AttentionInterface, AttentionMaskInterface, ExpertsInterface)
    before = [dict(registry._global_mapping) for registry in registries]
    sinklens.profile("bundled:moe-ind", n=4)
    assert [dict(registry._global_mapping) for registry in registries] == before
