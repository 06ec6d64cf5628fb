"""Published values: the data keeps its own rules, and a run stands beside those of its model."""

from __future__ import annotations

import json
from typing import Any

import pytest

import sinklens
from sinklens.cli.main import main
from sinklens.core.errors import UsageError
from sinklens.pipeline.references import (
    FAMILY,
    FAMILY_QUANTITIES,
    SAME,
    STATUS,
    about,
    differences,
    of_model,
    published,
)

EVERY = published(unverified=True)
PROTOCOL = {"epsilon": float, "seq_len": int, "bos": bool, "dtype": str, "n_prompts": int, "data": str}


def test_every_value_has_a_source_a_place_and_a_status() -> None:
    assert len(EVERY) > 100
    for value in EVERY:
        assert value.status in STATUS
        assert value.source
        assert value.where
        assert value.unit
        assert value.words
        assert value.url.startswith("https://") or value.status == "measured"
        assert all(isinstance(given, PROTOCOL[key]) for key, given in value.protocol.items())
        assert set(value.protocol) <= set(PROTOCOL)


@pytest.mark.parametrize(
    ("model", "quantity", "protocol"),
    [
        ("GPT-2", "massive_blocks", {"bos": False, "seq_len": 1024, "n_prompts": 10}),
        ("GPT-2", "massive_dims", {"bos": False, "seq_len": 1024, "n_prompts": 50}),
        ("GPT-2", "loss_zeroed", {"bos": False, "seq_len": 1024, "data": "WikiText"}),
        ("OPT-6.7B", "massive_blocks", {"bos": False, "seq_len": 2048, "n_prompts": 10}),
        ("OPT-6.7B", "massive_max", {"bos": False, "seq_len": 2048, "n_prompts": 10}),
        ("Falcon-7B", "massive_dims", {"seq_len": 4096, "n_prompts": 50}),
        ("Phi-2", "massive_max", {"seq_len": 4096, "n_prompts": 10}),
        ("Phi-4", "massive_blocks", {"seq_len": 4096, "n_prompts": 10}),
        ("Gemma-7B", "massive_blocks", {"bos": True, "seq_len": 4096, "n_prompts": 10}),
        ("Llama-2-7B", "loss_zeroed", {"bos": False, "seq_len": 4096, "data": "WikiText"}),
    ],
)
def test_a_protocol_is_that_of_the_model_and_says_no_more_than_is_known(
    model: str, quantity: str, protocol: dict[str, Any]
) -> None:
    """GPT-2 and OPT take shorter texts; whether Falcon-7B and Phi had a BOS was not written down."""
    (value,) = [
        value
        for value in EVERY
        if (value.model, value.quantity) == (model, quantity) and value.source.startswith("A Refined")
    ]
    assert value.protocol == {"dtype": "bfloat16", **protocol}
    assert "tokens" not in value.remark


def test_no_two_models_share_a_name() -> None:
    names: dict[str, str] = {}
    for value in EVERY:
        for name in value.ids:
            assert names.setdefault(name.lower(), value.model) == value.model


def test_what_is_only_remembered_is_left_out_unless_asked_for() -> None:
    remembered = [value for value in EVERY if value.status == "memory"]
    assert remembered
    assert not any(value.status == "memory" for value in published())
    assert len(published()) == len(EVERY) - len(remembered)
    assert {v.status for v in of_model("Llama-3.1-70B", unverified=True)} == {"memory"}
    with pytest.raises(UsageError, match="No published value"):
        of_model("Llama-3.1-70B")


@pytest.mark.parametrize(
    ("model_id", "family", "match", "model"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama", SAME, "Llama-2-7B"),
        ("META-LLAMA/llama-2-7b-HF", "llama", SAME, "Llama-2-7B"),
        ("./models/Llama-2-7b-hf", "llama", SAME, "Llama-2-7B"),
        ("gpt2", "gpt2", SAME, "GPT-2"),
        ("bundled:dense-ind", "llama", SAME, "dense-ind"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3_moe", SAME, "Qwen3-30B-A3B"),
        # Another organisation's model of the same last name is not the same model.
        ("someone/Llama-2-7b-hf", "llama", FAMILY, None),
        ("example/mine", "mixtral", FAMILY, None),
        ("example/mine", "no-such-family", None, None),
    ],
)
def test_a_model_is_matched(model_id: str, family: str, match: str | None, model: str | None) -> None:
    found, values = about(model_id, family)
    assert found == match
    assert bool(values) == (match is not None)
    if model is not None:
        assert {value.model for value in values} == {model}
    else:
        assert all(value.quantity in FAMILY_QUANTITIES for value in values)
        assert not any(value.model in ("dense-ind", "moe-ind") for value in values)


@pytest.fixture(scope="module")
def run() -> Any:
    return sinklens.profile(n=64, verify=False, analyzers=("primary-sinks",))


def test_the_bundled_checkpoint_has_the_value_of_its_card(run: Any) -> None:
    section = run.document["references"]
    assert section["match"] == SAME
    (row,) = [row for row in section["rows"] if row["quantity"] == "sink_rate"]
    assert row["status"] == "measured"
    assert row["here"] == pytest.approx(row["published"], abs=0.1)
    assert row["differences"] == []


def test_differences_of_protocol_are_named(run: Any) -> None:
    said = differences(
        {"epsilon": 0.8, "seq_len": 2048, "bos": False, "dtype": "float32", "n_prompts": 5, "data": "C4"}, run
    )
    assert said == [
        "prompts of 2048 tokens there, of up to 64 here",
        "epsilon 0.8 there, 0.3 here",
        "without BOS there, with BOS here",
        "float32 there, bfloat16 here",
        "5 prompts there, 64 here",
        "other texts: C4 there, prompts that came with the checkpoint here",
    ]
    assert differences({"epsilon": 0.3, "seq_len": 64, "bos": True}, run) == []
    assert differences({}, run) == ["how it was measured is not known to us"]


def test_super_experts_stand_beside_the_run() -> None:
    from sinklens.pipeline.references import measured_here

    run = sinklens.profile("bundled:moe-ind", n=4, verify=False)
    assert measured_here("super_experts", run) == ["L2E2"]
    assert measured_here("massive_blocks", run) == "none"
    assert measured_here("loss_zeroed", run) is None
    assert run.document["references"]["match"] == SAME


def test_the_list_says_how_sure_each_value_is(capsys: Any) -> None:
    assert main(["ls", "references", "-m", "llama-2-7b", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["references"]
    assert {row["model"] for row in rows} == {"Llama-2-7B"}
    assert {row["status"] for row in rows} >= {"third party", "read in the paper"}
    assert not any("2622" in row["value"] for row in rows)
    zeroed = next(row for row in rows if row["value"] == "5.12, 8115, 5.13")
    assert zeroed["unit"] == "perplexity"
    assert zeroed["meaning"].startswith("Perplexity on WikiText: as it is, massive activations zeroed")
    assert main(["ls", "references", "-m", "llama-2-7b", "--unverified"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "2622" in line)
    assert "unverified" in line
    assert main(["ls", "references", "-m", "llama-2-77b"]) == 2
    assert "Llama-2-7B" in capsys.readouterr().err
    assert main(["ls", "models", "--unverified"]) == 2
