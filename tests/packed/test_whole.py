"""Packed checkpoints streamed: the model that is traced is the one with the weights that are stood for, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import sinklens
from sinklens.cli.dry_run import print_plan
from sinklens.core.errors import ModelError
from sinklens.models.opening import open_model
from sinklens.models.packed import PACKED
from sinklens.models.quantised import LIBRARIES
from sinklens.pipeline import streamed_blocks
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.plan import plan_document, predict
from sinklens.tracers.executor import trace
from tests.streaming.cases import PLAN, differences, opened, prompts

from .writers import CASES, PAIRS, packed, set_config

LENGTHS = (23, 9)
FEW: dict[str, Any] = {"n": 2, "seq_len": 16, "analyzers": ("massive-activations",), "verify": False}
FIRST = {case.config["quant_method"]: name for name, case in reversed(CASES.items())}
"""The first case of each format."""


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_weights_are_those_that_are_stood_for(name: str, family: str, tmp_path: Path) -> None:
    whole, plain = packed(name, family, tmp_path)
    a, b = opened(whole), opened(plain)
    assert a.dequantised == CASES[name].config["quant_method"]
    assert not hasattr(a.module.config, "quantization_config")
    for index in range(len(a.blocks)):
        left, right = a.blocks.recipes.make(index), b.blocks.recipes.make(index)
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype == torch.bfloat16
            assert torch.equal(left[key], right[key]), key
    stored = a.blocks.recipes.stored
    read = {key: header.nbytes for key, (_, header) in stored.where.items()}
    assert stored.bytes_read == read


@pytest.mark.parametrize(("method", "name"), FIRST.items())
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_traces_are_those_of_an_unquantised_model(
    method: str, name: str, family: str, tmp_path: Path
) -> None:
    """Streamed from packed weights, streamed from plain ones, and in memory by transformers from plain ones."""
    whole, plain = packed(name, family, tmp_path)
    streamed, held = opened(whole), opened(plain, stream=False)
    assert streamed.dequantised == method
    assert streamed.info.dtype == held.info.dtype == "bfloat16"
    assert streamed.info.parameters == held.info.parameters
    found = trace(streamed, prompts(LENGTHS), PLAN)
    assert not differences(trace(held, prompts(LENGTHS), PLAN), found)


@pytest.mark.parametrize("method", PACKED)
def test_plan_and_manifest_say_it(method: str, tmp_path: Path, capsys: Any) -> None:
    whole, _ = packed(FIRST[method], "qwen3_moe", tmp_path)
    options = ProfileOptions(stream="on", **FEW)
    described, held, predicted = predict(str(whole), options)
    assert plan_document(described, held, predicted)["prediction"]["dequantised"] == method
    assert predicted.stream is not None
    assert predicted.stream.scratch >= PACKED[method].scratch * 64 * 96
    print_plan(str(whole), options, as_json=False)
    printed = capsys.readouterr().out
    assert f"dequantised from {method}" in printed
    assert "to dequantise" in printed
    run = sinklens.profile(str(whole), options=options)
    assert run.trace.manifest["dequantised"] == {"from": method, "to": "bfloat16"}
    assert run.trace.manifest["stream"]["block_bytes"] == predicted.stream.block
    assert run.trace.manifest["stream"]["bytes_stored"] < (whole / "model.safetensors").stat().st_size


@pytest.mark.parametrize("method", PACKED)
def test_streaming_is_chosen_where_the_library_is_not_installed(
    method: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from sinklens.models import quantised

    whole, _ = packed(FIRST[method], "llama", tmp_path)
    library = LIBRARIES[method]
    options = ProfileOptions(**FEW)
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    choice = streamed_blocks.choose(str(whole), options)
    assert choice.on
    assert choice.why == f"{method} needs {library} in memory, which is not installed"
    described, _, predicted = predict(str(whole), options)
    assert described.dequantised == method
    assert predicted.stream is not None
    assert predicted.stream.why == choice.why
    monkeypatch.setattr(quantised, "find_spec", lambda name: name)
    assert not streamed_blocks.choose(str(whole), options).on
    described, _, predicted = predict(str(whole), options)
    assert described.dequantised is predicted.stream is None
    if all(find_spec(name.replace("-", "_")) is None for name in library.split()):
        with pytest.raises(ModelError, match="needs a library that is not installed to be held") as caught:
            opened(whole, stream=False)
        assert "--stream on" in str(caught.value)


def test_any_dtype_may_be_asked_for_and_one_must_be_known(tmp_path: Path) -> None:
    """In float32 nothing is rounded after it was computed."""
    name = FIRST["bitsandbytes"]
    whole, _ = packed(name, "llama", tmp_path / "a")
    _, plain = packed(name, "llama", tmp_path / "b", torch.float32)
    a, b = open_model(str(whole), dtype="fp32", stream=True), opened(plain)
    assert {p.dtype for p in a.module.parameters()} == {torch.float32}
    key = "model.layers.1.mlp.up_proj.weight"
    assert a.blocks is not None
    assert torch.equal(a.blocks.recipes.make(1)[key], b.blocks.recipes.make(1)[key])
    set_config(whole, dtype=None)
    with pytest.raises(ModelError, match="does not say which dtype") as caught:
        opened(whole)
    assert "--dtype bf16" in str(caught.value)
    assert open_model(str(whole), dtype="bf16", stream=True).info.dtype == "bfloat16"
