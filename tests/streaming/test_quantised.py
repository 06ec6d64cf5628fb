"""Checkpoints stored as fp8 or mxfp4 are dequantised as they are read, block by block as transformers does at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sinklens
from sinklens.cli.dry_run import print_plan
from sinklens.core.errors import ModelError
from sinklens.models.opening import describe_model, open_model
from sinklens.models.packed import PACKED
from sinklens.models.quantised import FORMATS, LIBRARIES, scratch_bytes
from sinklens.pipeline.options import ProfileOptions
from sinklens.pipeline.plan import plan_document, predict
from sinklens.tracers.executor import trace

from .cases import PLAN, differences, opened, prompts, saved

LENGTHS = (23, 17, 9)
BLOCK = (4, 2)
FAMILY = {"fp8": ("llama", "qwen3_moe", "deepseek_v3"), "mxfp4": ("gpt_oss",)}
CASES = [(method, family) for method, families in FAMILY.items() for family in families]
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _fp8(tensors):
    """All maps of the blocks but routers as float8, a scale for each 4 x 2 values; and the weights they stand for."""
    stored, meant = dict(tensors), dict(tensors)
    for key, weight in tensors.items():
        if weight.ndim != 2 or ".layers." not in key or key.endswith("mlp.gate.weight"):
            continue
        rows, columns = weight.shape
        cut = weight.float().reshape(rows // BLOCK[0], BLOCK[0], columns // BLOCK[1], BLOCK[1])
        scales = cut.abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        stored[key] = (weight.float() / spread).to(torch.float8_e4m3fn)
        stored[f"{key}_scale_inv"] = scales
        meant[key] = (stored[key].float() * spread).to(weight.dtype)
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": BLOCK,
    }
    return stored, meant, config


def _mxfp4(tensors):
    """The experts' maps as pairs of four-bit floats with an exponent for each 32 inputs; and what they stand for."""
    stored, meant, generator = dict(tensors), dict(tensors), torch.Generator().manual_seed(7)
    for key, weight in tensors.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // 32)
        codes = torch.randint(0, 16, (*shape, 32), generator=generator)
        scales = torch.randint(119, 124, shape, generator=generator)
        del stored[key]
        stored[f"{key}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{key}_scales"] = scales.to(torch.uint8)
        values = FP4[codes] * torch.exp2(scales.float() - 127)[..., None]
        meant[key] = values.reshape(experts, outputs, inputs).transpose(1, 2).to(weight.dtype).contiguous()
    names = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return stored, meant, {"quant_method": "mxfp4", "modules_to_not_convert": names}


QUANTISERS = {"fp8": _fp8, "mxfp4": _mxfp4}


def quantise(folder: Path, method: str) -> dict[str, torch.Tensor]:
    """Store a saved model quantised; returns the weights that are stored then."""
    stored, meant, config = QUANTISERS[method](load_file(folder / "model.safetensors"))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config=config)
    return meant


def edit(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def in_transformers(folder: Path, method: str):
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    config = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method](dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="auto")


@pytest.mark.parametrize(("method", "family"), CASES)
def test_traces_are_those_of_transformers(method, family, tmp_path):
    """Streamed, in memory, and loaded by transformers with dequantize=True: one model, to the last bit."""
    folder = saved(family, tmp_path, torch.bfloat16)
    quantise(folder, method)
    streamed, held = opened(folder), opened(folder, stream=False)
    assert streamed.dequantised == held.dequantised == method
    assert streamed.info == held.info
    found = trace(streamed, prompts(LENGTHS), PLAN)
    reference = open_model(in_transformers(folder, method))
    assert not differences(trace(held, prompts(LENGTHS), PLAN), found)
    assert not differences(trace(reference, prompts(LENGTHS), PLAN), found)
    assert {name: p.dtype for name, p in streamed.module.named_parameters()} == {
        name: p.dtype for name, p in reference.module.named_parameters()
    }
    blocks, stored = streamed.blocks, streamed.blocks.recipes.stored
    assert blocks.loads == [1] * len(blocks)
    assert stored.bytes_read == {key: header.nbytes for key, (_, header) in stored.where.items()}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_the_weights_are_those_that_are_stored(method, family, tmp_path):
    """Against the values written out from the format: a model saved with them is the same model."""
    folder, plain = (
        saved(family, tmp_path / "q", torch.bfloat16),
        saved(family, tmp_path / "p", torch.bfloat16),
    )
    meant = quantise(folder, method)
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    a, b = opened(folder), opened(plain)
    assert (a.dequantised, b.dequantised) == (method, None)
    for index in range(len(a.blocks)):
        left, right = a.blocks.recipes.make(index), b.blocks.recipes.make(index)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", FORMATS)
def test_plan_and_manifest_say_it(method, tmp_path, capsys):
    """The plan counts dequantised blocks, and what dequantising takes; the manifest names the format."""
    folder = saved(FAMILY[method][-1], tmp_path, torch.bfloat16)
    quantise(folder, method)
    options = ProfileOptions(n=2, seq_len=16, stream="on", analyzers=("massive-activations",), verify=False)
    described, held, predicted = predict(str(folder), options)
    assert plan_document(described, held, predicted)["prediction"]["dequantised"] == method
    stream = predicted.stream
    assert stream is not None
    assert stream.scratch > 0
    assert predicted.weights == stream.shell + 2 * stream.block + stream.scratch
    print_plan(str(folder), options, as_json=False)
    printed = capsys.readouterr().out
    assert f"dequantised from {method}" in printed
    assert "to dequantise" in printed
    run = sinklens.profile(str(folder), options=options)
    assert run.trace.manifest["dequantised"] == {"from": method, "to": "bfloat16"}
    assert run.trace.manifest["stream"]["block_bytes"] == stream.block
    blocks = opened(folder).blocks
    parameters = dict(blocks.module.named_parameters()).keys()
    made = [blocks.recipes.make(index) for index in range(len(blocks))]
    assert stream.block == max(sum(one[name].nbytes for name in one.keys() & parameters) for one in made)
    off = sinklens.profile(
        str(folder), n=2, seq_len=16, stream="off", analyzers=("massive-activations",), verify=False
    )
    assert off.trace.manifest["dequantised"] == run.trace.manifest["dequantised"]
    assert not differences(off.trace, run.trace)
    assert off.document["findings"] == run.document["findings"]


def test_what_dequantising_takes():
    shapes = [(3, 40, 64), (50, 60), (7,)]
    unquantised, fp8, mxfp4 = ({"quant_method": name} if name else None for name in (None, "fp8", "mxfp4"))

    def taken(found):
        return scratch_bytes(type("Config", (), {"quantization_config": found})(), shapes, 2)

    assert taken(unquantised) == 0
    assert taken(fp8) == max(9 * 40 * 64 + 3 * 3 * 40 * 64, 9 * 50 * 60)
    assert taken(mxfp4) == 9 * 3 * 40 * 64


def test_four_bit_weights_take_the_dtype_asked_for(tmp_path):
    folder = saved("gpt_oss", tmp_path, torch.bfloat16)
    quantise(folder, "mxfp4")
    streamed, held = (open_model(str(folder), dtype="fp32", stream=on) for on in (True, False))
    assert {p.dtype for p in held.module.parameters()} == {torch.float32}
    assert not differences(trace(held, prompts((9,)), PLAN), trace(streamed, prompts((9,)), PLAN))


@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_dequantised_says_so(stream, tmp_path):
    """Another dtype, none at all, blocks of several sizes, tables that stay quantised, an unknown format."""
    folder = saved("llama", tmp_path, torch.bfloat16)
    quantise(folder, "fp8")
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    with pytest.raises(ModelError, match="dequantised to bfloat16 alone"):
        open_model(str(folder), dtype="fp32", stream=stream)
    with pytest.raises(ModelError, match="dequantised to bfloat16 alone"):
        describe_model(str(folder), dtype="fp32")
    edit(folder, dtype=None)
    with pytest.raises(ModelError, match="does not say which dtype"):
        opened(folder, stream=stream)
    edit(
        folder,
        dtype="bfloat16",
        quantization_config={**config["quantization_config"], "modules_to_convert": ["x"]},
    )
    with pytest.raises(ModelError, match="keeps x quantised in memory"):
        opened(folder, stream=stream)
    edit(folder, quantization_config={"quant_method": "modelopt"})
    with pytest.raises(ModelError, match=r"quantised \(modelopt\), which this transformers does not know"):
        opened(folder, stream=stream)
    edit(folder, quantization_config=config["quantization_config"])
    key = "model.layers.2.mlp.up_proj.weight"
    scales = f"{key}_scale_inv"
    save_file({**stored, scales: torch.ones(23, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"the blocks of {key} are not all of one size"):
        opened(folder, stream=stream)
    stored[key].view(torch.uint8)[3, 5] = 0x7F  # NaN in float8
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN or infinity") as caught:
        trace(opened(folder, stream=stream), prompts((9,)), PLAN)
    assert key in str(caught.value)


@pytest.mark.parametrize("method", [name for name in LIBRARIES if name not in PACKED])
def test_other_formats_are_refused_by_name(method, tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert any(name.startswith(method) for name in AUTO_QUANTIZER_MAPPING)
    folder = saved("llama", tmp_path)
    edit(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"quantised \\({method}\\), which cannot be streamed") as caught:
        opened(folder)
    assert LIBRARIES[method] in str(caught.value)
    assert f"Dequantised while they are read: fp8, mxfp4, {', '.join(PACKED)}." in str(caught.value)
