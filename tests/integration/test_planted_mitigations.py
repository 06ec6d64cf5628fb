"""A planted sink in the way of a task: judged through `mitigate`, the mitigation for it wins and the others do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sinklens as sl
from sinklens.cli.main import main
from sinklens.mitigations import ACT, VAR, KnockOut, ZeroTuning
from sinklens.pipeline import judging
from sinklens.testbeds import plant_testbed

ITEMS = 64


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds are not what this is about."""
    monkeypatch.setattr(judging, "ROUNDS", 1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sink", ["first", "inner"])
def test_the_mitigation_for_the_sink_is_helpful_and_no_other_is(sink: str, seed: int, tmp_path: Path) -> None:
    truth: Any = plant_testbed(f"retrieval-{sink}", tmp_path / "bed", seed=seed)
    other_head = f"L{truth.layer}H{(truth.head + 1) % 4}"
    methods = [
        "zero-tuning:gamma=0.25",
        "act:beta=0.4",
        "zero-tuning:gamma=4",
        f"zero-tuning:gamma=0.25:heads={other_head}",
    ]
    run = sl.mitigate(
        str(tmp_path / "bed"),
        methods,
        tasks=f"task:{tmp_path / 'bed' / 'task.jsonl'}",
        n_items=ITEMS,
        n=2,
        seed=seed,
    )
    verdicts = dict(zip(methods, (e["verdict"]["judgement"] for e in run.entries), strict=True))
    remedy = f"{truth.remedy}:" + ":".join(f"{k}={v}" for k, v in truth.remedy_parameters.items())
    expected = {method: "no measurable change" for method in methods} | {remedy: "helpful"}
    if sink == "first":
        expected["act:beta=0.4"] = "did not act"  # its sinks are those behind the first token
    assert verdicts == expected
    best = next(entry for entry in run.entries if entry["recommended"])
    assert best["name"] == truth.remedy
    row = next(r for r in run.rows if r["mitigation"] == best["label"] and r["role"] == "primary")
    assert row["baseline"] < 0.4
    assert row["mitigated"] == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_of_visual_sinks_var_alone_is_helpful(seed: int, tmp_path: Path) -> None:
    """Questions about pictures: what takes the text sink away, or VAR in other heads, acts and does not help."""
    bed = tmp_path / "bed"
    truth: Any = plant_testbed("retrieval-visual", bed, seed=seed)
    rng = np.random.default_rng(seed)
    free = [(0, head) for head in range(4)]  # block 0 attends evenly, so VAR chooses its heads
    heads = [*(free[i] for i in rng.permutation(4)[:2]), (truth.layer, (truth.head + 1) % 4)]
    dims = (truth.sink_dim,)
    methods: dict[str, Any] = {
        "var": VAR(dims=dims, **truth.remedy_parameters),
        "var elsewhere": VAR(dims=dims, rho=0.5, heads=heads),
        "zero-tuning": ZeroTuning(gamma=0.25),
        "act": ACT(beta=0.4),
        "knock-out": KnockOut(positions=(0,)),
    }
    run = sl.mitigate(
        str(bed), list(methods.values()), tasks=f"task:{bed / 'task.jsonl'}", n_items=16, n=2, seed=seed
    )
    verdicts = dict(zip(methods, (e["verdict"]["judgement"] for e in run.entries), strict=True))
    assert verdicts == dict.fromkeys(methods, "no measurable change") | {"var": "helpful"}
    rows = {row["mitigation"]: row for row in run.rows if row["role"] == "primary"}
    best = next(entry for entry in run.entries if entry["recommended"])
    assert best["name"] == "var"
    assert rows[best["label"]]["baseline"] < 0.5
    assert rows[best["label"]]["mitigated"] == 1.0


def test_calibration_finds_it_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """The head is not told: ZeroTuning finds it on one part of the questions and is judged on the rest."""
    bed, out = tmp_path / "bed", tmp_path / "run"
    assert main(["testbed", "plant", "retrieval-first", "--seed", "1", "--out", str(bed)]) == 0
    truth = json.loads((bed / "truth.json").read_text())
    capsys.readouterr()
    asked = ["-m", str(bed), "--task", f"task:{bed / 'task.jsonl'}", "--with", "zero-tuning", "--calibrate"]
    assert main(["mitigate", "-q", "-n", "2", "--n-items", "80", *asked, "--json", "--out", str(out)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["mitigations"]
    assert entry["verdict"]["judgement"] == "helpful"
    assert entry["parameters"]["gamma"] < 1
    assert [truth["layer"], truth["head"]] in entry["parameters"]["heads"]


def test_calibration_finds_var_without_being_told_the_sinks(tmp_path: Path, capsys: Any) -> None:
    """Neither sink dims nor parameters are given: both are found, and judged on other questions."""
    bed, out = tmp_path / "bed", tmp_path / "run"
    assert main(["testbed", "plant", "retrieval-visual", "--seed", "1", "--out", str(bed)]) == 0
    truth = json.loads((bed / "truth.json").read_text())
    capsys.readouterr()
    asked = ["-m", str(bed), "--task", f"task:{bed / 'task.jsonl'}", "--with", "var", "--calibrate"]
    assert main(["mitigate", "-q", "-n", "2", "--n-items", "22", *asked, "--json", "--out", str(out)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["mitigations"]
    assert entry["verdict"]["judgement"] == "helpful"
    assert entry["parameters"]["rho"] == 0.5
    assert entry["parameters"]["p"] >= 0.5
    assert [item["dim"] for item in entry["parameters"]["dims"]["dims"]] == [truth["sink_dim"]]
