"""Tiny checkpoints in every packed format, and the same with the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.streaming.cases import saved

from . import bitsandbytes_writer as bnb
from .compressed_writer import compressed
from .gptq_writer import awq, gptq

Writer = Callable[[tuple[int, ...], torch.Generator], tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Case:
    """A way to store weights: what the config says, and a writer of one weight, for names that contain some text."""

    config: dict[str, Any]
    write: Writer
    families: tuple[str, ...] = ("llama", "qwen3_moe")
    only: tuple[str, ...] = field(default=("",))


def _bnb(**more: Any) -> dict[str, Any]:
    bits = {"load_in_4bit": True, "load_in_8bit": False, **more}
    return {
        "quant_method": "bitsandbytes", **bits, "_load_in_4bit": bits["load_in_4bit"],
        "_load_in_8bit": bits["load_in_8bit"], "llm_int8_threshold": 6.0, "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip


def _gptq(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, "damp_percent": 0.01,
        "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None, **more,
    }  # fmt: skip


AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm", "backend": "autoawq",
    "modules_to_not_convert": None,
}  # fmt: skip


def _scheme(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
        **more,
    }


def _compressed(
    layout: str, *weights: dict[str, Any], targets: tuple[str, ...] = ("Linear",)
) -> dict[str, Any]:
    groups = {
        f"group_{i}": {
            "targets": [target],
            "weights": scheme,
            "format": "pack-quantized" if layout == "mixed-precision" else None,
            "input_activations": None,
            "output_activations": None,
        }
        for i, (target, scheme) in enumerate(zip(targets, weights, strict=True))
    }
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {},
        "transform_config": {}, "global_compression_ratio": None, "version": "0.20.1",
    }  # fmt: skip


PACKED_GROUPS = _scheme(4, "group", group_size=8, actorder=None, observer="minmax")
FP8 = _scheme(8, "block", type="float", block_structure=[24, 36])
NF4 = _bnb(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
FP4 = _bnb(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
CASES: dict[str, Case] = {
    "bnb-nf4": Case(NF4, partial(bnb.four_bit, kind="nf4", nested=False), ("llama", "qwen3_moe", "gpt2")),
    "bnb-nf4-bf16": Case(
        NF4, partial(bnb.four_bit, kind="nf4", nested=True, storage=torch.bfloat16), only=("self_attn",)
    ),
    "bnb-fp4-nested": Case(FP4, partial(bnb.four_bit, kind="fp4", nested=True)),
    "bnb-int8": Case(_bnb(load_in_4bit=False, load_in_8bit=True), bnb.eight_bit),
    "gptq-4": Case(_gptq(4, 8), partial(gptq, bits=4, size=8), ("llama", "qwen3_moe", "gpt2")),
    "gptq-4-act-v2": Case(
        _gptq(4, 12, desc_act=True, sym=False, checkpoint_format="gptq_v2"),
        partial(gptq, bits=4, size=12, less_one=False, index="shuffled"),
    ),
    "gptq-8-channel": Case(_gptq(8, -1), partial(gptq, bits=8, size=-1, index="absent")),
    "gptq-3": Case(_gptq(3, 20), partial(gptq, bits=3, size=20), ("llama",)),
    "gptq-2": Case(_gptq(2, 16), partial(gptq, bits=2, size=16), ("llama",)),
    "awq": Case(AWQ, partial(awq, size=8)),
    "awq-channel": Case({**AWQ, "group_size": -1}, partial(awq, size=-1), ("llama",)),
    "ct-pack": Case(
        _compressed("pack-quantized", PACKED_GROUPS), partial(compressed, bits=4, strategy="group", size=8)
    ),
    "ct-pack-asymmetric": Case(
        _compressed("pack-quantized", {**PACKED_GROUPS, "symmetric": False, "actorder": "group"}),
        partial(compressed, bits=4, strategy="group", size=8, symmetric=False, shuffled=True),
    ),
    "ct-pack-8": Case(
        _compressed("pack-quantized", _scheme(8, "channel")), partial(compressed, bits=8, strategy="channel")
    ),
    "ct-int8": Case(
        _compressed("int-quantized", _scheme(8, "channel")),
        partial(compressed, bits=8, strategy="channel", packed=False),
    ),
    "ct-fp8-block": Case(
        _compressed("float-quantized", FP8),
        partial(compressed, bits=8, strategy="block", block=(24, 36), packed=False, kind="float"),
    ),
    "ct-fp8-tensor": Case(
        _compressed("float-quantized", _scheme(8, "tensor", type="float")),
        partial(compressed, bits=8, strategy="tensor", packed=False, kind="float"),
    ),
    "ct-some": Case(
        _compressed(
            "mixed-precision",
            {**PACKED_GROUPS, "num_bits": 3},
            _scheme(8, "channel"),
            targets=("re:.*down", "Linear"),
        ),
        partial(compressed, bits=3, strategy="group", size=8),
        only=("down_proj",),
    ),
}
PAIRS = [(name, family) for name, case in CASES.items() for family in case.families]


def packed(name: str, family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """Two folders: a model with its blocks' maps packed, but for routers, and with what those stand for."""
    case, generator = CASES[name], torch.Generator().manual_seed(5)
    whole, plain = saved(family, folder / "packed", dtype), saved(family, folder / "plain", dtype)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for key, weight in load_file(whole / "model.safetensors").items():
        inner = ".layers." in key or ".h." in key
        if weight.ndim != 2 or not inner or "mlp.gate." in key or not any(part in key for part in case.only):
            stored[key] = meant[key] = weight
            continue
        first = (
            family != "gpt2"
        )  # whose maps have their inputs first; packed they are stored the other way round
        parts, values = case.write(tuple(weight.shape if first else weight.T.shape), generator)
        stored |= {f"{key.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        meant[key] = (values if first else values.T).to(dtype).contiguous()
    save_file(stored, whole / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    set_config(whole, quantization_config=case.config)
    return whole, plain


def set_config(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))


def set_tensors(folder: Path, **changed: Tensor | None) -> None:
    """Write tensors of a folder anew; None takes one away."""
    stored: dict[str, Any] = {**load_file(folder / "model.safetensors"), **changed}
    kept = {key: value.contiguous() for key, value in stored.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
