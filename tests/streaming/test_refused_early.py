"""What cannot be streamed is refused by the plan in the words of the run; where memory is short, streaming is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sinklens
from sinklens.cli.main import main
from sinklens.core.errors import ModelError, UsageError
from sinklens.models.catalog import locate
from sinklens.models.loading import load_config, without_weights
from sinklens.models.opening import describe_model, open_model
from sinklens.models.quantised import dequantising, planned_shapes, refuse_ragged
from sinklens.models.streaming import opening as streamed_opening
from sinklens.pipeline.memory import can_stream
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.plan import predict
from sinklens.pipeline.streamed_blocks import refuse_streaming
from tests.families import build

from .cases import saved
from .test_quantised import edit, quantise

FEW: dict[str, Any] = {"n": 2, "seq_len": 16, "analyzers": ("massive-activations",), "verify": False}


def _hqq(folder: Path) -> Path:
    saved("llama", folder)
    edit(folder, quantization_config={"quant_method": "hqq"})
    return folder


def _pickled(folder: Path) -> Path:
    saved("llama", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def _ragged(folder: Path) -> Path:
    saved("llama", folder, torch.bfloat16)
    quantise(folder, "fp8")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.2.mlp.up_proj.weight_scale_inv"] = torch.ones(23, 32)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CASES = [
    (_hqq, "cannot be streamed block by block"),
    (_pickled, "pytorch_model.bin, which cannot be read block by block"),
    (_ragged, "the blocks of model.layers.2.mlp.up_proj.weight are not all of one size"),
]


@pytest.mark.parametrize(("made", "said"), CASES, ids=["format", "pickles", "ragged"])
def test_plan_and_run_refuse_in_the_same_words(
    made: Any, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = str(made(tmp_path / "model"))
    monkeypatch.setattr(streamed_opening, "put", None)  # where the first weight would be read
    out = ("--out", str(tmp_path / "run"))
    told: list[str] = []
    capsys.readouterr()
    for more in (("--dry-run",), out):
        assert main(["profile", "-q", "-m", folder, "--stream", "on", "-n", "2", *more]) == 3
        told.append(capsys.readouterr().err)
    assert said in told[0]
    assert told[0] == told[1]


def test_a_plan_that_would_stream_by_itself_is_refused_too(tmp_path: Path, monkeypatch: Any) -> None:
    from sinklens.pipeline import plan

    folder = str(_hqq(tmp_path))
    monkeypatch.setattr(plan, "available_memory", lambda *_: 50_000_000)
    with pytest.raises(ModelError, match="cannot be streamed block by block"):
        predict(folder, ProfileOptions(**FEW))
    assert predict(folder, ProfileOptions(stream="off", **FEW))[2].stream is None
    assert predict(str(_held(tmp_path / "held")), ProfileOptions(device_map="auto", **FEW))[2].stream is None


def _held(folder: Path) -> Path:
    return saved("llama", folder)


def test_a_plan_refuses_what_is_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a device map decides"):
        predict(str(_held(tmp_path)), ProfileOptions(stream="on", device_map="auto", **FEW))
    spread = ProfileOptions(stream="on", tensor_parallel=True, **FEW)
    with pytest.raises(UsageError, match="a tensor-parallel plan spreads"):
        refuse_streaming(str(tmp_path), spread)
    assert not can_stream(str(tmp_path), replace(spread, stream="auto"))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_ragged_blocks_are_told_from_the_config_alone(family: str, tmp_path: Path) -> None:
    """Which weights have scales, and how many, as in the files that transformers reads."""
    folder = saved(family, tmp_path, torch.bfloat16)
    quantise(folder, "fp8")
    source = locate(folder)

    def planned() -> dict[str, tuple[int, ...]]:
        config = load_config(source, False)
        return planned_shapes(without_weights(config), config, dequantising(source, config, "auto"))

    stored = {key: tuple(t.shape) for key, t in load_file(folder / "model.safetensors").items()}
    found = planned()
    scales = [key for key in found if key.endswith(".weight_scale_inv") and ".experts." not in key]
    assert scales
    assert {key: found[key] for key in scales} == {key: stored[key] for key in scales}
    config = json.loads((folder / "config.json").read_text())
    refuse_ragged("m", found, load_config(source, False))
    edit(folder, quantization_config={**config["quantization_config"], "weight_block_size": [48, 48]})
    with pytest.raises(ModelError, match="are not all of one size"):
        refuse_ragged("m", planned(), load_config(source, False))


def test_a_smaller_last_block_that_divides_evenly_is_no_even_grid(tmp_path: Path) -> None:
    """96 values in blocks of 64 and 32 have two scales; halves of 48 would be other numbers."""
    folder = saved("llama", tmp_path, torch.bfloat16)
    quantise(folder, "fp8")
    stored = load_file(folder / "model.safetensors")
    for key in [key for key in stored if key.endswith("_scale_inv")]:
        rows, columns = stored[key.removesuffix("_scale_inv")].shape
        stored[key] = torch.ones(-(-rows // 64), -(-columns // 64))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    edit(folder, quantization_config={**config["quantization_config"], "weight_block_size": [64, 64]})
    for stream in (True, False):
        with pytest.raises(ModelError, match=r"\[64, 96\] values have \[1, 2\] scales"):
            open_model(str(folder), stream=stream)
    with pytest.raises(ModelError, match="are not all of one size"):
        describe_model(str(folder))


@pytest.mark.parametrize(
    "command",
    [("mitigate", "--with", "act"), ("probe", "quantisation"), ("probe", "streaming"), ("probe", "pruning")],
)
def test_commands_that_change_weights_do_not_stream(command: tuple[str, ...], capsys: Any) -> None:
    assert main([*command, "--stream", "on", "-m", "nowhere/at-all"]) == 2
    said = capsys.readouterr().err
    assert "Only a profile can be streamed" in said
    assert "Leave out --stream" in said


def test_nor_do_they_from_python() -> None:
    with pytest.raises(UsageError, match="Only a profile can be streamed"):
        sinklens.mitigate(build("llama"), methods=("act",), stream="on")


def test_several_processes_refuse_to_plan_what_they_would_refuse_to_run(
    monkeypatch: Any, capsys: Any
) -> None:
    from contextlib import nullcontext
    from types import SimpleNamespace

    from sinklens.cli import profile, together

    monkeypatch.setattr(profile, "several", lambda: True)
    monkeypatch.setattr(together, "one_voice", lambda **_: nullcontext(SimpleNamespace(size=2, leads=True)))
    for more in ((), ("--dry-run",)):
        assert main(["profile", "--device-map", "auto", *more]) == 2
        said = capsys.readouterr().err
        assert "each of the 2 processes would do so" in said
        assert "Leave out either --device-map or torchrun." in said
