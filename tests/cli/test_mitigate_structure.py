"""Structural methods through `sinklens mitigate`: what carries the sink is taken out, and as much elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sinklens as sl
from sinklens.cli.main import main
from sinklens.evaluation.effects import decay
from sinklens.mitigations import ExpertPruning, FakeQuantisation, MassiveActivations
from sinklens.mitigations.asking import label_of, make_method
from sinklens.pipeline.mitigation_run import MitigationRun
from sinklens.tracers import signals as sig

FAST = ["-m", "moe-ind", "-q", "-n", "4", "--n-items", "24", "--task", "ppl", "--controls", "1"]


def document(capsys: Any, out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["mitigate", *FAST, "--json", "--out", str(out), *arguments]) == code
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return found


def test_pruning_the_causal_expert_collapses_the_sink_and_its_controls_do_not(
    tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    found = document(capsys, out, "--with", "expert-pruning", "--controls", "2")
    entry = found["mitigations"][0]
    assert entry["label"] == "expert-pruning:experts=found"
    assert entry["parameters"]["experts"] == [[2, 2]]
    assert found["findings"]["super-experts"]["rows"][0]["expert"] == 2
    sink = entry["sink"]
    assert sink["position"] == 0
    assert sink["lost"] > 0.8
    assert sink["rate_before"] > 20
    assert sink["rate"] == 0
    assert entry["findings"]["primary-sinks"]["status"] == "not-found"
    assert entry["verdict"]["judgement"] == "harmful"
    kinds = {control["kind"]: control for control in entry["controls"]}
    assert set(kinds) == {"random", "layer-matched"}
    for control in kinds.values():
        assert control["acted"] == control["draws"] == 2
        assert abs(control["sink"]["lost"]) < 0.1
        assert control["sink"]["rate"] == pytest.approx(control["sink"]["rate_before"], abs=1)
        change, beyond = control["metrics"][0]["change"], control["metrics"][0]["beyond"]
        assert change["from"] == pytest.approx(found["evaluation"][0]["baseline"])
        assert beyond["ci_low"] > 0  # the perplexity rises by more than under a control
        assert change["delta"] + beyond["delta"] == pytest.approx(found["evaluation"][0]["delta"])
    assert all(e["experts"][0][0] == 2 for e in kinds["layer-matched"]["parameters"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "mitigations--sink-map-random-control-of" in page
    assert "control (layer-matched)" in page
    loaded = sl.load(out)
    assert isinstance(loaded, MitigationRun)
    assert loaded.document["mitigations"] == found["mitigations"]
    assert len(loaded.figures["mitigations"]) == 1 + 1 + 4  # change, ledger, maps


def test_what_is_lost_is_the_papers_decay(tmp_path: Path) -> None:
    """Against attention that is read again, row by row, with the model's own eager weights."""
    import torch

    from sinklens.models.opening import open_model

    run = sl.mitigate(
        "bundled:moe-ind", ExpertPruning(experts=[(2, 2)]), tasks="ppl", n=4, n_items=4, controls=0
    )
    opened = open_model("bundled:moe-ind")
    module: Any = opened.module
    module.set_attn_implementation("eager")

    def later() -> np.ndarray:
        maps = []
        for record in run.trace:
            ids = torch.tensor(np.asarray(record.token_ids)[None])
            with torch.no_grad():
                attention = module(ids, output_attentions=True).attentions
            maps.append([layer[0, :, 1:, 0].float().mean(1).numpy() for layer in attention])
        return np.mean(maps, 0)

    before = later()
    with ExpertPruning(experts=[(2, 2)])(opened):
        after = later()
    truth = decay(before, after).by_layer
    sink = run.entries[0]["sink"]
    np.testing.assert_allclose(np.array(sink["lost_by_layer"], dtype=float), truth, atol=2e-2)
    assert sig.ATTENTION_RECEIVED.name in run.trace.records[0].arrays
    assert run.entries[0]["controls"] == []


def test_massive_activations_and_quantisation_are_judged_with_their_controls(
    tmp_path: Path, capsys: Any
) -> None:
    rule, grid = "absolute=5:relative=50", "fake-quantisation:weights=4:experts=4:weights-by=tensor"
    methods = [
        f"massive-activations:{rule}:to=zero",
        f"massive-activations:{rule}",
        grid,
        f"{grid}:protect=found",
    ]
    out = tmp_path / "run"
    found = document(capsys, out, "--with", ",".join(methods), "--n-items", "12")
    zero, mean, plain, kept = found["mitigations"]
    assert zero["sink"]["lost"] > 0.3
    assert abs(zero["controls"][0]["sink"]["lost"]) < 0.05
    assert zero["controls"][0]["kind"] == "median"
    assert mean["sink"]["lost"] == pytest.approx(0, abs=0.01)
    assert mean["parameters"]["means"][0][:3] == [2, True, 40]
    assert mean["parameters"]["means"][0][3] != 0
    assert plain["controls"] == []
    assert kept["parameters"]["protect_experts"] == [[2, 2]]
    assert kept["parameters"]["protect"] == "named"
    assert kept["controls"][0]["parameters"][0]["protect_experts"] != [[2, 2]]
    assert kept["effect"]["kl_mean"] < plain["effect"]["kl_mean"]
    recipes = sorted(path.name for path in (out / "recipes").glob("*.json"))
    assert len(recipes) == 4
    for name in recipes:
        recipe = sl.recipe(out / "recipes" / name)
        again = sl.recipe(recipe.save(tmp_path / "again.json"))
        assert again == recipe
        entry = next(e for e in found["mitigations"] if e["name"] == recipe.method and
                     e["parameters"] == recipe.to_json()["parameters"])  # fmt: skip
        assert entry["acted"]
    file = next(out.glob("recipes/*protect*.json"))
    again = document(capsys, tmp_path / "again", "--recipe", str(file), "--controls", "0", "--n-items", "12")
    assert again["evaluation"][0]["mitigated"] == pytest.approx(
        next(r["mitigated"] for r in found["evaluation"] if "protect" in r["mitigation"])
    )


def test_the_command_line_names_experts_and_what_is_found() -> None:
    pruning = make_method("expert-pruning:experts=2/2+3/7")
    assert pruning == ExpertPruning(experts=[(2, 2), (3, 7)])
    assert make_method("expert-pruning:experts=L2E2+3.7") == pruning
    assert label_of(pruning) == "expert-pruning:experts=L2E2+L3E7"
    assert make_method("expert-pruning") == make_method("expert-pruning:experts=found")
    assert make_method("expert-pruning:projections=1") == ExpertPruning(projections=[1])
    assert make_method("fake-quantisation:weights=none:activations=8") == FakeQuantisation(
        weights=None, activations=8
    )
    assert make_method("massive-activations:layers=2-3") == MassiveActivations(layers=[2, 3])
    assert make_method("fake-quantisation:protect-experts=2/2:experts=4").parameters["experts"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-m", "dense-ind", "--with", "expert-pruning"], 3, "this model has no experts"),
        (["--with", "expert-pruning:experts=9/0"], 2, "there is no layer 9"),
        (["--with", "expert-pruning:experts=two"], 2, "names no expert"),
        (["--with", "fake-quantisation:weights=1"], 2, "give 2 to 16"),
        (["--with", "fake-quantisation:protect=found:protect-dims=3"], 2, "leave one out"),
        (["-m", "dense-ind", "--with", "fake-quantisation:experts=4:protect=found"], 3, "no fused experts"),
        (["--with", "massive-activations"], 5, "Not reported as neutral"),
        (["--with", "expert-pruning", "--controls", "99"], 2, "--controls must be from 0 to 50"),
        (["--with", "massive-activations:absolute=5:relative=50", "--task", "task:same.jsonl"], 3, "shares text"),
        (["--with", "expert-pruning", "--fail-if", "expert-pruning.sink_lost > 0.5"], 6, "sink_lost"),
    ],
)  # fmt: skip
def test_mistakes_and_conditions_are_told(
    tmp_path: Path, capsys: Any, monkeypatch: Any, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    from sinklens.models.catalog import bundled

    prompts = (bundled()["moe-ind"] / "sinklens_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "same.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    without = FAST if "--task" not in arguments else ["-m", "moe-ind", "-q", "-n", "4", "--controls", "1"]
    assert main(["mitigate", *without, *arguments, "--out", "x"]) == code
    told = "\n".join(x for x in capsys.readouterr().err.strip().splitlines() if "Loading weights" not in x)
    assert "Traceback" not in told
    assert said in told


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["--task", "hf:nobody/nothing:cfg:test"], "--task task:FILE.jsonl"),
        (["--task", "ppl", "--prompts", "hf:nobody/nothing"], "--prompts mixed"),
    ],
)
@pytest.mark.parametrize("planned", [[], ["--dry-run"]])
def test_datasets_of_the_hub_need_a_network(
    tmp_path: Path, capsys: Any, arguments: list[str], typed: str, planned: list[str]
) -> None:
    out = ["--out", str(tmp_path / "x")]
    assert main(["mitigate", "--offline", "-q", "--with", "act", *arguments, *planned, *out]) == 3
    told = [x for x in capsys.readouterr().err.strip().splitlines() if "Loading weights" not in x]
    assert len(told) == 2
    assert told[0].startswith("The dataset 'nobody/nothing' is not in the local cache")
    assert told[1].startswith("Leave --offline out and unset HF_HUB_OFFLINE, or ")
    assert told[1].endswith(typed)


def test_open_methods_are_not_put_on_a_model() -> None:
    from sinklens.core.errors import UsageError
    from sinklens.models.opening import open_model

    opened = open_model("bundled:moe-ind")
    with pytest.raises(UsageError, match="Super Experts are not named"), ExpertPruning()(opened):
        pass
    with pytest.raises(UsageError, match="parts to protect are not named"):
        FakeQuantisation(protect="found")(opened).__enter__()
    with pytest.raises(UsageError, match="not named"):
        ExpertPruning().random_controls(opened)
