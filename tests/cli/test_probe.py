"""`sinklens probe` as its users meet it: documents, folders, and what is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinklens.cli.main import main
from sinklens.evaluation.streaming_cache import BLOCK, streaming_comparison, streaming_losses
from sinklens.mitigations.protection import Protection
from sinklens.models.opening import open_model
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.probe_quantisation import halves
from sinklens.pipeline.probe_streaming import long_texts, streaming_verdict


def fails(capsys: Any, code: int, *arguments: str) -> str:
    assert main(["probe", *arguments, "-q"]) == code
    found = capsys.readouterr()
    said = "\n".join(line for line in found.err.strip().splitlines() if "Loading weights" not in line)
    assert "Traceback" not in said
    assert "bug in sinklens" not in said
    assert found.out == ""
    assert 1 <= len(said.splitlines()) <= 3, said
    return said


def test_quantisation_finds_on_one_half_and_measures_on_the_other(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "probe"
    grids = ["--grid", "weights=4:experts=4:weights-by=tensor", "--grid", "weights=8"]
    common = ["-m", "moe-ind", "-n", "8", "--draws", "1", "-q", "--json"]
    assert main(["probe", "quantisation", *common, *grids, "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert (document["schema"], document["probe"]) == ("sinklens/probe/1", "quantisation")
    assert (document["found_on"], document["measured_on"]) == (4, 4)
    four, eight = document["results"]
    assert four["method"]["experts"] == 4
    assert eight["method"]["experts"] is None
    assert four["protection"]["experts"] == [[2, 2]]
    assert four["n_prompts"] == 4
    assert four["variants"]["quantised"]["added"]["mean"] > eight["variants"]["quantised"]["added"]["mean"]
    kept = Protection.load(out / "protect.json", open_model("bundled:moe-ind"))
    assert kept.experts == ((2, 2),)
    again = ["--protect", str(out / "protect.json"), "--grid", "weights=8", "--out", str(tmp_path / "b")]
    assert main(["probe", "quantisation", *common, *again]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["found_on"], document["measured_on"]) == (0, 8)
    assert document["results"][0]["protection"]["experts"] == [[2, 2]]
    other = ["-m", "dense-ind", "--protect", str(out / "protect.json"), "--out", str(tmp_path / "c")]
    assert "made for another model" in fails(capsys, 3, "quantisation", *other)
    assert "already holds a probe" in fails(capsys, 2, "quantisation", "--out", str(out))


def test_halves_share_no_prompt() -> None:
    from sinklens.inputs import load_prompts

    prompts = load_prompts([[1, 2, i] for i in range(9)], None, bos="off")
    finding, measured = halves(prompts, 3)
    assert (len(finding), len(measured)) == (4, 5)
    assert [prompt.index for prompt in finding.prompts] == [0, 1, 2, 3]
    assert not {p.token_ids for p in finding.prompts} & {p.token_ids for p in measured}
    assert finding.description["n_prompts"] == 4


def test_streaming_says_what_the_first_tokens_are_worth(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "probe"
    settings = ["-n", "2", "--tokens", "300", "--cache", "4+60", "--cache", "1+31", "--chunk", "15"]
    assert main(["probe", "streaming", *settings, "-q", "--json", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert document["trained_on"] == 64
    first, second = document["results"]
    assert (first["start"], first["recent"], second["start"], second["recent"]) == (4, 60, 1, 31)
    assert first["full"]["after_full"] > 2 * first["kept"]["after_full"]
    assert "a text has 300 tokens, and this model was trained on 64." in first["verdict"]
    assert main(["probe", "streaming", *settings, "-q", "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "first tokens kept, positions of the text" in said
    assert "probe.json" in said


@pytest.mark.parametrize("texts", [2, 5])
def test_differences_are_of_what_comes_after_the_cache_was_full(texts: int) -> None:
    opened = open_model("bundled:dense-ind", dtype="float32")
    ids, said = long_texts(opened, ProfileOptions(n=texts), 210)
    assert ids.shape == (texts, 210)
    assert said["n_tokens"] == texts * 210
    found = streaming_comparison(opened, ids, start=2, recent=30, chunk=7)
    kept = np.array([streaming_losses(opened, row, start=2, recent=30, chunk=7)[0] for row in ids])[:, 32:]
    dropped = np.array([streaming_losses(opened, row, start=0, recent=32, chunk=7)[0] for row in ids])[:, 32:]
    whole = 177 if texts >= 4 else 2 * BLOCK
    assert found["dropped"]["added"]["n"] == (texts if texts >= 4 else 2 * texts)
    assert found["unit"] == ("text" if texts >= 4 else "block of 64 tokens")
    assert found["dropped"]["added"]["mean"] == pytest.approx((dropped - kept)[:, :whole].mean(), abs=1e-6)
    assert found["kept"]["added"] is None
    assert found["kept"]["after_full"] == pytest.approx(np.exp(kept.mean()))


def test_verdicts_of_streaming() -> None:
    def told(mean: float, low: float | None, high: float | None, full: float = 3.0) -> str:
        added = {"mean": mean, "low": low, "high": high, "n": 9}
        sides = {"kept": {"after_full": 3.0}, "dropped": {"after_full": 3.5, "added": added}}
        found = {"start": 4, "recent": 60, "tokens": 1999, **sides, "full": {"after_full": full}}
        return streaming_verdict(found, None, 512)

    assert told(0.2, 0.1, 0.3).endswith("dropping the first ones costs.")
    assert told(-0.2, -0.3, -0.1).endswith("dropping the first ones helps.")
    assert told(0.2, -0.1, 0.3).endswith("no difference can be told.")
    assert told(0.2, None, None).endswith("too little text for an interval.")
    assert "2000 tokens, and the config names 512 positions." in told(0.2, 0.1, 0.3, full=40.0)


def test_texts_are_joined_to_long_ones(tmp_path: Path) -> None:
    opened = open_model("bundled:dense-ind")
    path = tmp_path / "long.txt"
    path.write_text("river again river Anna street\n" * 30, encoding="utf-8")
    ids, said = long_texts(opened, ProfileOptions(prompts=str(path)), None)
    assert len(ids) == 1
    assert 100 < ids.shape[1] == said["n_tokens"]
    assert said["packed"]
    assert long_texts(opened, ProfileOptions(prompts=str(path), n=2), 77)[0].shape == (2, 77)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["quantisation", "--grid", "bits=3"], 2, "no parameter 'bits'"),
        (["quantisation", "--grid", "weights=1"], 2, "give 2 to 16"),
        (["quantisation", "--grid", "protect-dims=3"], 2, "found by the probe"),
        (["quantisation", "--grid", "experts=4"], 3, "no fused experts"),
        (["quantisation", "-n", "3"], 3, "needs 4 prompts"),
        (["quantisation", "--draws", "0"], 2, "--draws must be at least 1"),
        (["quantisation", "--protect", "nowhere.json"], 3, "cannot be read"),
        (["streaming", "--cache", "4x5"], 2, "For instance: --cache 4+508"),
        (["streaming", "--cache", "0+64"], 2, "both numbers must be at least 1"),
        (["streaming", "--cache", "4+9", "--chunk", "10"], 2, "--chunk 10 does not fit"),
        (["streaming", "--tokens", "100"], 3, "needs 193 to drop and measure some"),
        (["streaming", "--prompts", "nowhere.txt"], 3, "nowhere.txt"),
        (["streaming", "-m", "vlm-shape"], 3, "vlm-shapes"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, capsys: Any, arguments: list[str], code: int, said: str) -> None:
    assert said in fails(capsys, code, *arguments, "--out", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_models_without_rotary_positions_are_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["testbed", "plant", "gpt2", "--out", str(tmp_path / "bed")]) == 0
    capsys.readouterr()
    said = fails(capsys, 3, "streaming", "-m", str(tmp_path / "bed"), "--out", str(tmp_path / "x"))
    assert "It has no rotary positions" in said


def test_a_model_with_nothing_to_keep_is_no_neutral_result(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from sinklens.pipeline import probe_quantisation as job

    monkeypatch.setattr(job, "protection_of", lambda *_: Protection())
    said = fails(capsys, 5, "quantisation", "-n", "4", "--out", str(tmp_path / "x"))
    assert "which is not the same as no effect" in said
    assert "sinklens mitigate --with fake-quantisation" in said
