"""GPTQ and AWQ: against what AutoGPTQ 0.7.1 and AutoAWQ 0.2.9 wrote and read, and against the formats written out.

`tests/packed/golden/make.py` says how the golden files were made. The libraries read in float16, where the product of
a scale and an integer is rounded once, as the values here are when they become float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sinklens.core.errors import ModelError
from sinklens.models.packed.bits import unpack, words_for
from tests.streaming.cases import opened

from .golden import golden
from .gptq_writer import awq, gptq
from .memory_store import weight_of
from .naive import drawn, packed_columns, packed_rows, values
from .writers import CASES, packed, set_config, set_tensors

GPTQ, AWQ = golden("gptq"), golden("awq")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 45, 96])
def test_bits_out_of_words(bits: int, count: int) -> None:
    codes = drawn((3, count), 0, 2**bits - 1, torch.Generator().manual_seed(bits))
    rows = packed_rows(codes, bits)
    assert rows.shape[1] == words_for(count, bits)
    assert [values(row, bits, count) for row in rows.tolist()] == codes.tolist()
    assert unpack(rows, bits, count, 1).tolist() == codes.tolist()
    assert unpack(packed_columns(codes.T, bits), bits, count, 0).tolist() == codes.T.tolist()


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_as_the_library_does(case: str) -> None:
    parts, expected = GPTQ[case]
    bits, size = case.removesuffix("-act").split("-", 1)
    found = weight_of("gptq", parts, {"bits": int(bits), "group_size": int(size), "desc_act": True})
    assert expected.dtype == torch.float16
    assert torch.equal(found.half(), expected)


@pytest.mark.parametrize("case", AWQ)
def test_awq_as_the_library_does(case: str) -> None:
    parts, expected = AWQ[case]
    settings = {"bits": 4, "group_size": int(case.rpartition("-")[2]), "version": "GEMM", "zero_point": True}
    assert torch.equal(weight_of("awq", parts, settings).half(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("index", ["plain", "shuffled", "absent"])
@pytest.mark.parametrize("size", [20, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gptq_as_the_format_is_written_out(
    bits: int, less_one: bool, index: str, size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (32, 96) if bits == 3 else (48, 80)
    parts, meant = gptq(shape, generator, bits, size=size, less_one=less_one, index=index, dtype=dtype)
    layout = "gptq" if less_one else "gptq_v2"
    settings = {"bits": bits, "group_size": size, "checkpoint_format": layout}
    assert torch.equal(weight_of("gptq", parts, settings), meant)


@pytest.mark.parametrize("size", [12, -1])
def test_awq_as_the_format_is_written_out(size: int) -> None:
    parts, meant = awq((24, 60), torch.Generator().manual_seed(3), size=size)
    assert torch.equal(weight_of("awq", parts, {"w_bit": 4, "q_group_size": size}), meant)


LAYER = "model.layers.2.mlp.up_proj"
INT, HALF = torch.int32, torch.float16
BAD = [
    ("gptq-4", {f"{LAYER}.scales": None}, f"{LAYER}.qweight in model.safetensors of .* has no scales beside it"),
    ("gptq-4", {f"{LAYER}.qzeros": None}, "has no qzeros beside it"),
    ("gptq-4", {f"{LAYER}.qweight": None}, "has no qweight beside it"),
    ("gptq-4", {f"{LAYER}.scales": torch.ones(7, 96).half()}, rf"{LAYER}.scales in .* has the shape \[7, 96\]"),
    ("gptq-4", {f"{LAYER}.qzeros": torch.zeros(8, 11, dtype=INT)}, r"has the shape \[8, 11\]"),
    ("gptq-4", {f"{LAYER}.qweight": torch.zeros(7, 96, dtype=INT)}, "has 7 rows"),
    ("gptq-4", {f"{LAYER}.qweight": torch.zeros(8, 96)}, "is stored as float32"),
    ("gptq-4", {f"{LAYER}.qzeros": torch.full((8, 12), -1, dtype=INT)}, "holds 15, which readers take for 16 or for 0"),
    ("gptq-4", {f"{LAYER}.g_idx": torch.full((64,), 8, dtype=INT)}, "names groups 8 to 8"),
    ("gptq-4", {f"{LAYER}.scales": torch.full((8, 96), torch.nan).half()}, "holds NaN or infinity"),
    ("gptq-4", {f"{LAYER}.perm": torch.zeros(64, dtype=INT)}, f"{LAYER}.perm in .* is not known in this format"),
    ("awq", {f"{LAYER}.scales": None}, "has no scales beside it"),
    ("awq", {f"{LAYER}.qweight": None}, "has no qweight beside it"),
    ("awq", {f"{LAYER}.scales": torch.ones(7, 96).half()}, r"has the shape \[7, 96\]"),
    ("awq", {f"{LAYER}.qweight": torch.zeros(60, 12, dtype=INT)}, "has 60 inputs"),
    ("awq", {"model.layers.1.mlp.act.scales": torch.ones(96).half()}, "act.scales in .* scales what no packed"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "said"), BAD)
def test_bad_files_are_refused_by_tensor(name: str, changed: Any, said: str, tmp_path: Path) -> None:
    whole, _ = packed(name, "llama", tmp_path)
    set_tensors(whole, **changed)
    with pytest.raises(ModelError, match=said):
        opened(whole).blocks.recipes.make(2)


SETTINGS = [
    ("gptq-4", {"bits": 5}, "bits = 5"),
    ("gptq-4", {"bits": "4"}, "bits = '4'"),
    ("gptq-4", {"group_size": 0}, "group_size = 0"),
    ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    ("gptq-4", {"is_marlin_format": True}, "is_marlin_format = True"),
    ("gptq-4", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic = "),
    ("gptq-4", {"pack_dtype": "int16"}, "pack_dtype = 'int16'"),
    ("gptq-4", {"twist": 3}, "twist = 3"),
    ("awq", {"bits": 8}, "bits = 8"),
    ("awq", {"version": "gemv"}, "version = 'gemv'"),
    ("awq", {"zero_point": False}, "zero_point = False"),
    ("awq", {"twist": 3}, "twist = 3"),
]


@pytest.mark.parametrize(("name", "changed", "said"), SETTINGS)
def test_settings_that_are_not_known_are_refused(name: str, changed: Any, said: str, tmp_path: Path) -> None:
    whole, _ = packed(name, "llama", tmp_path)
    set_config(whole, quantization_config={**CASES[name].config, **changed})
    with pytest.raises(ModelError, match=said):
        opened(whole)


def test_modules_that_are_left_out_by_dynamic_are_read_as_they_are(tmp_path: Path) -> None:
    whole, _ = packed("gptq-4", "llama", tmp_path)
    set_config(whole, quantization_config={**CASES["gptq-4"].config, "dynamic": {"-:.*lm_head.*": {}}})
    assert opened(whole).dequantised == "gptq"


def test_a_bias_that_the_model_has_no_place_for_is_zero(tmp_path: Path) -> None:
    """AutoGPTQ stores zeros for maps that have no bias."""
    whole, _ = packed("gptq-4", "llama", tmp_path)
    set_tensors(whole, **{f"{LAYER}.bias": torch.zeros(96)})
    assert opened(whole).dequantised == "gptq"
    set_tensors(whole, **{f"{LAYER}.bias": torch.full((96,), 0.25)})
    with pytest.raises(
        ModelError, match=f"{LAYER}.bias in model.safetensors of .* has no place in the model"
    ):
        opened(whole)
