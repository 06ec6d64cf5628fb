"""`mitigate` on pictures: sink dims are searched for, VAR is calibrated with them, and its recipe holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.cli.main import main
from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.evaluation.tasks import task_from_rows
from sinklens.inputs.vision import load_pictures
from sinklens.mitigations import VAR, load
from sinklens.mitigations.calibration import Scored, Trials
from sinklens.mitigations.recipes import load_recipe
from sinklens.mitigations.var_search import VarSearch
from sinklens.models.anatomy import find_anatomy
from sinklens.pipeline import judging
from sinklens.testbeds import plant_testbed
from sinklens.testbeds.planting.pictures import covered, painted, plant_visual
from sinklens.tracers.sink_dims import SinkDims
from tests.inputs.vision.painting import noise
from tests.vlms import build, processor

DIM = 11
HEADS = tuple((layer, head) for layer in (1, 2) for head in range(4))
SMALL = {"question": "how many ?", "analyzers": ("visual-sinks",)}


@cache
def planted() -> tuple[Any, Any, list[np.ndarray]]:
    """A tiny model whose marked patches are visual sinks, its processor, and pictures with a mark."""
    model, made = build("llava"), processor("llava")
    rng, marked, calibration = np.random.default_rng(0), [], []
    for i in range(10):
        picture = noise(80, 80, seed=i)
        prompt = prompts(model, made, [picture])[0]
        grid = prompt.visual.spans.grids[0]
        left, top, right, bottom = grid.cell_box(*(int(rng.integers(n)) for n in grid.shape))
        box = (round(left), round(top), round(right), round(bottom))
        marked.append(painted(picture, box))
        calibration.append(covered(prompts(model, made, [marked[-1]])[0], [(0, box)]))
    calibration += [covered(prompts(model, made, [noise(80, 80, seed=90 + i)])[0], []) for i in range(3)]
    plant_visual(model, calibration, heads=HEADS, dim=DIM, layer_in=0, strength=3.0)
    return model, made, marked


def prompts(model: Any, made: Any, pictures: list[Any]) -> Any:
    return load_pictures(pictures, made, model.config, question="how many ?").prompts


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """What a mitigation costs is timed in one round of two tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "ROUNDS", 1)
        patch.setattr(judging, "NEW_TOKENS", 2)
        yield


def yes_no(pictures: list[np.ndarray], name: str = "things") -> Any:
    words = ("a dog ?", "red things ?")
    rows = [
        {"prompt": words[i % 2], "image": picture, "answer": ("yes", "no")[i // 2 % 2]}
        for i, picture in enumerate(pictures)
    ]
    return task_from_rows(rows, name=name, kind="yes-no")


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Any:
    model, made, pictures = planted()
    return sl.mitigate(
        model,
        "var:floor=0.05",
        tasks=yes_no(pictures[:8]),
        tokenizer=made.tokenizer,
        processor=made,
        images=pictures[:2],
        calibrate=True,
        search={"p_ladder": (0.6,), "rho_ladder": (0.0, 0.5), "budgets": "visual+all"},
        out=tmp_path_factory.mktemp("var") / "run",
        **SMALL,
    )


def test_var_is_calibrated_with_the_dims_of_the_run(run: Any) -> None:
    entry = run.entries[0]
    assert run.findings["visual-sinks"].summary["dims"] == str(DIM)
    searched = entry["calibration"]["searched"]
    assert searched["budget"] == ["visual", "all"]
    assert entry["calibration"]["passes"] == 1 + 2 * 2
    assert entry["acted"] == (not entry["kept_unchanged"])
    trials = [row for row in entry["calibration"]["log"] if row["what"] != "unchanged"]
    assert any(row["acted"] for row in trials)
    assert len({json.dumps(row["parameters"], sort_keys=True) for row in trials}) == 4


def test_the_recipe_has_the_dims_and_acts_as_the_method_did(run: Any, tmp_path: Path) -> None:
    model, made, pictures = planted()
    given = sl.mitigate(
        model, VAR(floor=0.05, rho=0.0), tasks=yes_no(pictures[:8]), tokenizer=made.tokenizer, processor=made,
        images=pictures[:2], **SMALL,
    )  # fmt: skip
    entry = given.entries[0]
    assert entry["acted"], entry["verdict"]
    recipe = load_recipe(given.recipes[entry["label"]].save(tmp_path / "var.json"))
    method = recipe.mitigation
    assert isinstance(method, VAR)
    assert isinstance(method.dims, SinkDims)
    assert method.dims.indices == (DIM,)
    assert method.dims.provenance == "discovered"
    again = sl.mitigate(
        model, recipes=str(tmp_path / "var.json"), tasks=yes_no(pictures[:8]), tokenizer=made.tokenizer,
        processor=made, images=pictures[:2], **SMALL,
    )  # fmt: skip
    assert again.entries[0]["effect"]["rows_edited"] == entry["effect"]["rows_edited"] > 0
    assert again.entries[0]["effect"]["kl_mean"] == entry["effect"]["kl_mean"] > 0
    one = prompts(model, made, pictures[:1])[0]
    with torch.no_grad(), load(tmp_path / "var.json")(model) as effect:
        model(input_ids=torch.tensor([one.token_ids]), **one.visual.inputs)
    assert effect.acted


def test_dims_can_be_named_and_a_damaged_recipe_is_told(run: Any, tmp_path: Path) -> None:
    model, made, pictures = planted()
    common: dict[str, Any] = {
        "tasks": yes_no(pictures[:8]),
        "tokenizer": made.tokenizer,
        "processor": made,
        **SMALL,
    }
    found = sl.mitigate(model, VAR(rho=0.0, floor=0.05), images=pictures[:2], sink_dims="5+7", **common)
    assert found.entries[0]["verdict"]["judgement"] == "did not act"
    assert "no token is a sink by its state" in found.entries[0]["verdict"]["text"]
    with pytest.raises(UsageError, match="There is no dim 999"):
        sl.mitigate(model, "var", images=pictures[:2], sink_dims="999", **common)
    data = {
        "schema": "sinklens/recipe/1",
        "method": "var",
        "parameters": {"dims": {"hidden_size": 3}},
        "model": {},
    }
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="not those of var"):
        load_recipe(tmp_path / "bad.json")


def test_a_task_with_pictures_needs_the_processor(run: Any) -> None:
    model, made, pictures = planted()
    with pytest.raises(ModelError, match="task has pictures, and no processor") as error:
        sl.mitigate(
            model,
            "act",
            tasks=yes_no(pictures[:8]),
            tokenizer=made.tokenizer,
            n=1,
        )
    assert "processor=" in str(error.value.hint)


def test_values_of_the_search_mean_what_the_paper_means_by_them() -> None:
    tower = find_anatomy(build("llava")).main
    method = VAR(recipe="code", dims=(1,))
    search = VarSearch(p_ladder=(0.3, 0.9), rho_ladder=(0.8,), budgets="visual")
    tried = search.candidates(method)
    assert [one.moved for one in tried] == pytest.approx([0.3, 0.9])
    assert [one.least_rest for one in tried] == pytest.approx([0.8, 0.8])
    assert [(one.p, one.rho) for one in tried] == [(0.7, 0.2), (0.1, 0.2)]
    assert VarSearch().passes(VAR(), tower) == 1 + 3 * 3 * 3

    class Made:
        items, tokens = 9, 9

        def __call__(self, method: Any) -> Scored:
            score = 0.0 if method is None else method.p - abs(method.rho - 0.5) - (method.budget != "text")
            return Scored(score, 0.0, -score, method is not None and method.p < 0.9)

        def surely_better(self, method: Any) -> bool:
            return False

    choice = VarSearch().run(VAR(dims=(1,)), Trials(Made()), tower)
    assert isinstance(choice.method, VAR)
    # 0.9 scores higher and edited nothing.
    assert (choice.method.p, choice.method.rho, choice.method.budget) == (0.6, 0.5, "text")
    assert "18 edited anything" in choice.text
    blind = VarSearch(objective="unsupervised").run(VAR(dims=(1,)), Trials(Made()), tower)
    assert blind.method == choice.method
    for wrong in ({"p_ladder": (1.2,)}, {"rho_ladder": ()}, {"budgets": "visual+none"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            VarSearch(**wrong)  # pyright: ignore[reportArgumentType]


def test_var_frees_planted_attention_with_the_dims_that_it_searches_for(tmp_path: Path) -> None:
    truth: Any = plant_testbed("retrieval-visual", tmp_path / "bed")
    run = sl.mitigate(
        str(tmp_path / "bed"), "var", tasks=f"task:{tmp_path / 'bed' / 'task.jsonl'}", n=4, n_items=20, calibrate=True,
        search={"p_ladder": (0.6,), "rho_ladder": (0.5,), "budgets": "visual+text"},
    )  # fmt: skip
    assert run.recipe is not None
    method = run.recipe.mitigation
    assert isinstance(method, VAR)
    assert isinstance(method.dims, SinkDims)
    assert method.dims.indices == (truth.sink_dim,)
    assert method.budget == "visual"
    entry = run.entries[0]
    assert entry["verdict"]["judgement"] == "helpful"
    total = entry["ledger"]["total"]
    assert entry["ledger"]["rule"] == "states"
    assert total["visual_sink"]["change"] < 0 < total["visual_nonsink"]["change"]
    assert sum(shares["change"] for shares in total.values()) == pytest.approx(0.0, abs=1e-6)
    assert sum(shares["mitigated"] for shares in total.values()) == pytest.approx(1.0, abs=1e-6)


def test_a_model_without_sink_dims_has_nothing_to_edit(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    arguments = ["-m", "vlm-shapes", "--with", "var", "--task", "shapes-yes-no", "-n", "4", "--n-items", "12"]
    assert main(["mitigate", "-q", *arguments, "--calibrate", "--out", str(out)]) == 5
    said = capsys.readouterr().err
    assert "there is nothing to edit: the model has no sink dims" in said
    assert "Not reported as neutral" in said
    document = json.loads((out / "summary.json").read_text())
    assert document["mitigations"][0]["verdict"]["judgement"] == "did not act"
    assert document["evaluation"] == []
    assert main(["mitigate", "-q", "--resume", str(out)]) == 5


def test_a_text_model_is_told_that_var_needs_pictures(tmp_path: Path, capsys: Any) -> None:
    assert (
        main(["mitigate", "-q", "-n", "4", "--n-items", "12", "--with", "var", "--out", str(tmp_path / "x")])
        == 3
    )
    assert "needs a model that reads pictures" in capsys.readouterr().err
