"""`--sensitivity` end to end: planted and trained models whose answer is known, and a model that is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sinklens
from sinklens.cli.main import main
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.prepare import copied
from sinklens.testbeds import plant_testbed
from tests.families import build, save_with_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sensitivity") / "run"
    return sinklens.profile(n=6, sensitivity=True, verify=False, out=folder)


def row(run: Any, label: str) -> dict[str, Any]:
    return next(row for row in run.sensitivity.rows if row["variant"] == label)


def test_the_bundled_sink_needs_its_bos(trained: Any) -> None:
    """The card says so: it was not trained for a sink on another first token."""
    found = trained.sensitivity
    assert found.summary["kind"] == "prompt-dependent"
    assert "without BOS" in found.summary["depends_on"]
    gone = row(trained, "without BOS")
    assert gone["delta_high"] < -20
    assert gone["paired"]
    assert "without BOS it is gone" in found.verdict


def test_precisions_and_short_prompts_keep_it(trained: Any) -> None:
    for label in ("in float32", "with random tokens"):
        same = row(trained, label)
        assert same["skipped"] is None
        assert same["found"]
        assert same["position"] == 0
    assert abs(row(trained, "in float32")["delta"]) < 3


def test_longer_prompts_keep_it() -> None:
    """One BOS at the start: an independent pass over such prompts has 25, 25 and 16 % at 128, 256 and 510 tokens."""
    run = sinklens.profile("bundled:moe-ind", sensitivity=True, verify=False, analyzers=("primary-sinks",))
    expected = {"at 128 tokens": 25.0, "at 256 tokens": 25.0, "at 512 tokens": 16.0}
    for label, rate in expected.items():
        longer = row(run, label)
        assert (longer["found"], longer["position"]) == (True, 0)
        assert longer["rate"] == pytest.approx(rate, abs=4)
    assert run.sensitivity.summary["depends_on"] == ["without BOS"]


def test_a_length_at_which_the_rule_finds_none_is_told_with_its_lift(trained: Any) -> None:
    longer = row(trained, "at 512 tokens")
    assert not longer["found"]
    assert longer["lift"] > 5
    assert "at 512 tokens the same rule finds no sink" in trained.sensitivity.verdict
    assert any(note.startswith("At 512 tokens position 0 receives") for note in trained.sensitivity.notes)


def test_what_cannot_be_run_says_why(trained: Any) -> None:
    assert "no chat template" in row(trained, "with chat template")["skipped"]
    assert "at most 512 tokens" in row(trained, "at 1024 tokens")["skipped"]


def test_the_base_is_the_run(trained: Any) -> None:
    """Six prompts are fewer than a variant has, so the base is the run itself."""
    sinks = trained.primary_sinks.summary
    assert trained.sensitivity.summary["sink_rate"] == pytest.approx(sinks["sink_rate"])
    assert trained.sensitivity.summary["position"] == sinks["strongest_position"]


def test_it_is_saved_and_read_again(trained: Any) -> None:
    back = sinklens.load(trained.folder)
    assert isinstance(back, sinklens.Run)
    assert back.document == trained.document
    assert back.document["manifest"]["experiments"]["run"] == ["sensitivity"]
    assert "switched off" in back.document["manifest"]["experiments"]["skipped"]["effects"]


def test_a_planted_sink_is_found_again_in_every_variant_that_keeps_its_token(tmp_path: Path) -> None:
    truth = plant_testbed("llama", tmp_path / "planted", seed=3)
    run = sinklens.profile(str(tmp_path / "planted"), n=4, sensitivity=True, verify=False)
    ran = [row for row in run.sensitivity.rows if row["skipped"] is None]
    assert {"text", "dtype"} <= {row["group"] for row in ran}
    assert truth.to_json()
    assert [row["position"] for row in ran if row["group"] == "dtype"] == [
        run.primary_sinks.summary["strongest_position"]
    ] * sum(row["group"] == "dtype" for row in ran)


def test_random_weights_have_no_sink_under_any_variant(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), str(tmp_path / "random"))
    run = sinklens.profile(
        str(tmp_path / "random"), prompts="corpus:prose", n=3, seq_len=96, sensitivity=True, verify=False
    )
    assert run.sensitivity.summary["kind"] == "no sink"
    assert "No sink under any" in run.sensitivity.verdict


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = build("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = [[1, *range(5, 60)], [1, *range(9, 64)], [1, *range(3, 50)]]
    run = sinklens.profile(model, prompts=prompts, sensitivity=True, verify=False)
    ran = {row["variant"] for row in run.sensitivity.rows if row["skipped"] is None}
    assert {"in bfloat16", "with random tokens"} <= ran
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_a_copy_has_the_dtype_of_a_loaded_model() -> None:
    """Weights change, computed rotary frequencies do not, as in a model that is loaded in that dtype."""
    from sinklens.models.opening import open_model

    opened = open_model(build("llama"))
    copy = copied(opened, "bfloat16")
    assert copy.info.dtype == "bfloat16"
    assert {p.dtype for p in copy.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in opened.module.parameters()} == {torch.float32}
    frequencies = [b for name, b in copy.module.named_buffers() if name.endswith("inv_freq")]
    assert frequencies
    assert all(b.dtype == torch.float32 for b in frequencies)


def test_the_command_adds_the_analyzer_to_those_that_are_named(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    arguments = ["-q", "-n", "3", "--analyzers", "primary-sinks", "--sensitivity", "--json"]
    assert main(["profile", *arguments, "--out", str(out), "--fail-if", "sensitivity.variants_run < 1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["findings"]) == ["primary-sinks", "sensitivity"]
    assert main(["profile", "-q", "--resume", str(out)]) == 0


def test_a_dry_run_counts_the_experiments(capsys: Any) -> None:
    assert main(["profile", "--dry-run", "--sensitivity", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["prediction"]["experiments"]
    assert found["sensitivity"]["passes"] >= 10
    assert found["effects"]["if_short"] is True
    assert main(["profile", "--dry-run", "--no-verify"]) == 0
    shown = capsys.readouterr().out
    assert "Verify" not in shown
    assert "Sensitivity" not in shown


def test_options_hold_the_experiments() -> None:
    assert ProfileOptions().verify is None
    assert ProfileOptions().sensitivity is False
