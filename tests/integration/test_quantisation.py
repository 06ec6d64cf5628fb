"""The quantisation probe: on models of which it is known what is hard to quantise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.inputs.spec import Prompt
from sinklens.mitigations import FakeQuantisation
from sinklens.mitigations.protection import Protection
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel
from sinklens.pipeline.profile import profile
from sinklens.pipeline.quantisation import protection_of, quantisation_probe
from sinklens.testbeds import MassivePlant, plant
from sinklens.testbeds.recipe import recipes
from sinklens.testbeds.train import held_out

from ..families import build

DIM, BLOCK = 3, 1


def prompts(count: int = 24, length: int | None = None) -> list[Prompt]:
    ids = held_out(recipes["dense-ind"], count)[:, :length].tolist()
    return [Prompt(i, tuple(row), tuple(map(str, row)), "made") for i, row in enumerate(ids)]


@pytest.fixture(scope="module")
def planted() -> OpenedModel:
    """The trained model with a massive activation on BOS that it did not need before."""
    opened = open_model("bundled:dense-ind", dtype="fp32")
    module: Any = opened.module
    plant(
        module,
        massive=[MassivePlant(DIM, BLOCK, magnitude=2000.0)],
        calibration=held_out(recipes["dense-ind"], 8),
    )
    return opened


FOUND = Protection(layers=(BLOCK,), dims=(DIM,), positions=(0,))


def test_what_was_planted_explains_the_loss_and_as_many_others_do_not(planted: OpenedModel) -> None:
    method = FakeQuantisation(
        weights=8, weights_by="tensor", activations=8, activations_by="tensor", symmetric=True
    )
    found = quantisation_probe(planted, prompts(), method, FOUND)
    assert json.loads(json.dumps(found)) == found
    assert found["variants"]["quantised"]["added"]["low"] > 0.005
    assert found["explained"]["protected"] > 0.8
    assert found["explained"]["control"] < 0.2
    assert found["recovered"]["beyond"]["low"] > 0
    assert "more than chance" in found["verdict"]
    error, kept = (found["variants"][name]["error"] for name in ("quantised", "protected"))
    assert len(error) == 4
    assert kept[BLOCK] < 0.5 * error[BLOCK]
    assert found["variants"]["full"]["error"] == []
    assert found["draws"] == 5


def test_numbers_are_those_of_the_plain_loss(planted: OpenedModel) -> None:
    """Each prompt by itself, with the model's own loss, against the batched probe."""
    few = prompts(5)
    few[2] = Prompt(2, few[2].token_ids[:31], few[2].pieces[:31], "made")
    method, module = FakeQuantisation(weights=4, activations=8), planted.module

    def losses() -> np.ndarray:
        with torch.no_grad():
            ids = [torch.tensor([prompt.token_ids]) for prompt in few]
            return np.array([float(module(input_ids=i, labels=i, use_cache=False).loss) for i in ids])

    plain = losses()
    with method(planted):
        rounded = losses()
    with FOUND.applied(method)(planted):
        kept = losses()
    found = quantisation_probe(planted, few, method, FOUND, draws=2)["variants"]
    assert found["full"]["loss"]["mean"] == pytest.approx(plain.mean(), abs=1e-5)
    assert found["quantised"]["added"]["mean"] == pytest.approx((rounded - plain).mean(), abs=1e-5)
    assert found["protected"]["added"]["mean"] == pytest.approx((kept - plain).mean(), abs=1e-5)
    assert found["full"]["perplexity"] == pytest.approx(np.exp(plain.mean()), rel=1e-5)


def test_a_loss_that_is_none_leaves_nothing_to_explain(planted: OpenedModel) -> None:
    found = quantisation_probe(planted, prompts(8), FakeQuantisation(weights=16), FOUND, draws=1)
    assert found["explained"] == {"protected": None, "control": None}
    assert "nothing for protection to explain" in found["verdict"]


def test_a_run_says_what_to_protect_and_the_file_says_it_to_others(tmp_path: Any) -> None:
    result = profile("bundled:moe-ind", n=16, verify=False)
    trace, findings = result.trace, result.findings
    assert trace is not None
    found = protection_of(trace, findings)
    assert found == Protection(dims=(40,), positions=(0,), experts=((2, 2),))
    opened = open_model("bundled:moe-ind")
    data = json.loads(found.save(tmp_path / "protect.json", opened).read_text())
    assert data["ignore"] == [r"re:^model\.layers\.2\.mlp\.experts\.2\..*"]
    rows = {(row["path"], row["parameter"]): row for row in data["modules"]}
    assert rows["model.layers.2.mlp.experts", "down_proj"]["experts"] == [2]
    assert rows["model.layers.2.mlp.experts", "down_proj"]["outputs"] == [40]
    assert rows["model.layers.1.self_attn.q_proj", "weight"]["inputs"] == [40]
    assert rows["model.layers.3.self_attn.o_proj", "weight"]["outputs"] == [40]
    for (path, name), row in rows.items():
        weight = getattr(opened.module.get_submodule(path), name)
        assert weight.ndim == 2 + bool(path.endswith("experts"))
        assert not row["whole"]
    assert Protection.load(tmp_path / "protect.json", opened) == found
    with pytest.raises(DataError, match=r"another model .*\nfamily qwen3_moe there, llama here"):
        Protection.load(tmp_path / "protect.json", open_model("bundled:dense-ind"))


def test_whole_projections_are_named_for_quantisers(planted: OpenedModel) -> None:
    data = FOUND.to_json(planted)
    assert data["ignore"] == ["model.layers.1.mlp.down_proj"]
    assert [row["path"] for row in data["modules"] if row["whole"]] == ["model.layers.1.mlp.down_proj"]
    method = replace(FakeQuantisation(weights=4, activations=4), protect_layers=FOUND.layers)
    module: Any = planted.module
    own = module.model.layers[BLOCK].mlp.down_proj.weight
    with method(planted):
        assert module.model.layers[BLOCK].mlp.down_proj.weight is own
        assert module.model.layers[BLOCK].mlp.up_proj.weight is not own


def test_controls_are_as_many_others(planted: OpenedModel) -> None:
    moe = open_model("bundled:moe-ind")
    wanted = Protection(dims=(40, 41), positions=(0,), experts=((2, 2), (2, 3), (3, 1)))
    for control in wanted.controls(moe, tokens=20, draws=4, seed=1):
        assert len(control.dims) == 2
        assert not {40, 41} & set(control.dims)
        assert control.positions[0] in range(1, 20)
        assert [layer for layer, _ in control.experts] == [2, 2, 3]
        assert not set(control.experts) & set(wanted.experts)
    assert all(BLOCK not in control.layers for control in FOUND.controls(planted, tokens=9))


def test_what_cannot_be_probed_is_refused(planted: OpenedModel, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="Nothing was found that a quantiser could protect"):
        quantisation_probe(planted, prompts(2), FakeQuantisation(), Protection())
    with pytest.raises(DataError, match="No prompt has two tokens"):
        quantisation_probe(planted, prompts(2, length=1), FakeQuantisation(), FOUND)
    with pytest.raises(ModelError, match="predicts no next tokens"):
        quantisation_probe(open_model(build("bert")), prompts(2), FakeQuantisation(), FOUND)
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match="cannot be read"):
        Protection.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Protection.load(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="does not say what to protect"):
        Protection.load(path)
