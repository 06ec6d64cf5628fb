"""compressed-tensors: against what the library wrote and read, and against the format written out.

The golden files are of compressed-tensors 0.20.1, and of 0.9.4 for groups in the order of activations
(`tests/packed/golden/make.py` says how they were made). The library reads in the type of the scales.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sinklens.core.errors import ModelError
from tests.streaming.cases import opened

from .compressed_writer import compressed
from .golden import golden
from .golden.compressed import COMPRESSED
from .memory_store import weight_of
from .writers import CASES, packed, set_config, set_tensors

GOLDEN = {**golden("compressed"), **golden("compressed_order")}


def _config(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {"format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize("case", GOLDEN)
def test_as_the_library_does(case: str) -> None:
    parts, expected = GOLDEN[case]
    layout, weights, *_ = COMPRESSED[case.removesuffix("-order")]
    found = weight_of("compressed-tensors", parts, _config(layout, weights))
    assert torch.equal(found.to(expected.dtype), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("packed_", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "shuffled"])
def test_integers_as_the_format_is_written_out(
    bits: int, packed_: bool, symmetric: bool, strategy: str
) -> None:
    of, shuffled = ("group", True) if strategy == "shuffled" else (strategy, False)
    size = 9 if of == "group" else None
    parts, meant = compressed(
        (13, 45), torch.Generator().manual_seed(3), bits, of, size=size or 0, symmetric=symmetric, packed=packed_,
        shuffled=shuffled,
    )  # fmt: skip
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": of, "group_size": size}
    layout = "pack-quantized" if packed_ else "int-quantized"
    assert torch.equal(weight_of("compressed-tensors", parts, _config(layout, weights)), meant)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_float8_as_the_format_is_written_out(strategy: str) -> None:
    more: dict[str, Any] = {"group_size": 9} if strategy == "group" else {}
    if strategy == "block":
        more = {"block_structure": [5, 8]}
    parts, meant = compressed(
        (13, 45), torch.Generator().manual_seed(3), 8, strategy, size=more.get("group_size", 0),
        block=tuple(more.get("block_structure", (0, 0))), packed=False, kind="float", dtype=torch.float32,
    )  # fmt: skip
    parts["input_scale"] = torch.ones(1)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}
    assert torch.equal(weight_of("compressed-tensors", parts, _config("float-quantized", weights)), meant)


LAYER = "model.layers.2.mlp.up_proj"
SCALE, PACKED = f"{LAYER}.weight_scale", f"{LAYER}.weight_packed"
BAD = [
    ("ct-pack", {SCALE: None}, f"{PACKED} in model.safetensors of .* has no weight_scale beside it"),
    ("ct-pack", {f"{LAYER}.weight_shape": None}, "has no weight_shape beside it"),
    ("ct-pack", {f"{LAYER}.weight_shape": torch.tensor([96, 72])}, rf"{PACKED} in .* has the shape \[96, 8\]"),
    ("ct-pack", {SCALE: torch.ones(96, 7)}, rf"{SCALE} in .* has the shape \[96, 7\]"),
    ("ct-pack", {SCALE: torch.ones(96, 8, dtype=torch.int64)}, "is stored as int64"),
    ("ct-pack", {f"{LAYER}.weight_global_scale": torch.ones(1)}, "weight_global_scale in .* is not known"),
    ("ct-pack", {f"{LAYER}.weight_zero_point": torch.ones(96, 8)}, "is not zero"),
    ("ct-pack", {PACKED: None}, "has no weight beside it"),
    ("ct-pack-asymmetric", {f"{LAYER}.weight_zero_point": None}, "has no weight_zero_point beside it"),
    ("ct-pack-asymmetric", {f"{LAYER}.weight_g_idx": torch.full((64,), 8)}, "names groups 8 to 8"),
    ("ct-int8", {SCALE: None}, f"{LAYER}.weight in .* is stored as int8, and no scales belong to it"),
    ("ct-int8", {SCALE: torch.ones(95, 1)}, r"has the shape \[95, 1\]"),
    ("ct-fp8-block", {SCALE: torch.full((4, 2), torch.inf)}, f"{LAYER}.weight in .* holds NaN or infinity"),
    ("ct-fp8-block", {f"{LAYER}.weight": torch.zeros(96, 64).to(torch.int8)}, "is stored as int8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "said"), BAD)
def test_bad_files_are_refused_by_tensor(name: str, changed: Any, said: str, tmp_path: Path) -> None:
    whole, _ = packed(name, "llama", tmp_path)
    set_tensors(whole, **changed)
    with pytest.raises(ModelError, match=said):
        opened(whole).blocks.recipes.make(2)


SETTINGS = [
    ({"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized'"),
    ({"format": "marlin-24"}, "format = 'marlin-24'"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format = 'sparse-24-bitmask'"),
    ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ({"quantization_status": "frozen"}, "quantization_status = 'frozen'"),
    ({"config_groups": ["W4A16"]}, "config_groups = "),
    ({"twist": 3}, "twist = 3"),
]
OF_WEIGHTS = [
    ({"num_bits": 9}, "int9"),
    ({"type": "float", "num_bits": 4}, "float4"),
    ({"strategy": "tensor_group"}, "strategy = 'tensor_group'"),
    ({"dynamic": True}, "dynamic = True"),
    ({"group_size": None}, "group_size = None"),
    ({"twist": 3}, "twist = 3"),
]


@pytest.mark.parametrize(("changed", "said"), SETTINGS + OF_WEIGHTS)
def test_settings_that_are_not_known_are_refused(changed: Any, said: str, tmp_path: Path) -> None:
    whole, _ = packed("ct-pack", "llama", tmp_path)
    config = CASES["ct-pack"].config
    group = config["config_groups"]["group_0"]
    if (changed, said) in OF_WEIGHTS:
        changed = {"config_groups": {"group_0": {**group, "weights": {**group["weights"], **changed}}}}
    set_config(whole, quantization_config={**config, **changed})
    with pytest.raises(ModelError, match=said):
        opened(whole)


def test_two_schemes_for_one_module_are_refused(tmp_path: Path) -> None:
    whole, _ = packed("ct-pack", "llama", tmp_path)
    config = CASES["ct-pack"].config
    group = config["config_groups"]["group_0"]
    other = {**group, "weights": {**group["weights"], "num_bits": 8}}
    set_config(whole, quantization_config={**config, "config_groups": {"a": group, "b": other}})
    with pytest.raises(ModelError, match=r"2 groups of quantization_config\.config_groups are for"):
        opened(whole)


def test_activations_stay_as_they_are(tmp_path: Path) -> None:
    """Scales of activations and of the cache are left alone, whatever the config says of them."""
    whole, plain = packed("ct-int8", "llama", tmp_path)
    config = CASES["ct-int8"].config
    group = {**config["config_groups"]["group_0"], "input_activations": {"num_bits": 8, "dynamic": True}}
    scheme = {"num_bits": 8, "type": "float"}
    set_config(
        whole, quantization_config={**config, "config_groups": {"g": group}, "kv_cache_scheme": scheme}
    )
    set_tensors(
        whole,
        **{f"{LAYER}.input_scale": torch.ones(1), "model.layers.2.self_attn.k_scale": torch.ones(1)},
    )
    a, b = opened(whole).blocks.recipes.make(2), opened(plain).blocks.recipes.make(2)
    assert all(torch.equal(a[key], b[key]) for key in b)
