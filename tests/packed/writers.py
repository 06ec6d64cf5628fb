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


NF4 = _bnb(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
FP4 = _bnb(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
CASES: dict[str, Case] = {
    "bnb-nf4": Case(NF4, partial(bnb.four_bit, kind="nf4", nested=False), ("llama", "qwen3_moe", "gpt2")),
    "bnb-nf4-bf16": Case(
        NF4, partial(bnb.four_bit, kind="nf4", nested=True, storage=torch.bfloat16), only=("self_attn",)
    ),
    "bnb-fp4-nested": Case(FP4, partial(bnb.four_bit, kind="fp4", nested=True)),
    "bnb-int8": Case(_bnb(load_in_4bit=False, load_in_8bit=True), bnb.eight_bit),
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
