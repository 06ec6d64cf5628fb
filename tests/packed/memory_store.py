"""Stored tensors that are in memory, and what a format makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinklens.models.packed import PACKED


@dataclass
class Held:
    """Tensors by name, as formats look at those of files."""

    where: dict[str, Tensor]
    name: str = "m"

    def file_of(self, key: str) -> str:
        return "model.safetensors"

    def dtype_of(self, key: str) -> torch.dtype:
        return self.where[key].dtype

    def shape_of(self, key: str) -> tuple[int, ...]:
        return tuple(self.where[key].shape)

    def read(self, key: str) -> Tensor:
        return self.where[key]


def weight_of(method: str, parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """The one weight that some tensors of a module `x` stand for, in float32."""
    held = Held({f"x.{part}": tensor for part, tensor in parts.items()})
    packed = PACKED[method]
    (weight,) = packed.weights(held, packed.settings(settings, "m"))
    found = weight.dequantise({part: held.where[key] for part, key in weight.parts.items()})
    assert weight.name == "x.weight"
    assert tuple(found.shape) == weight.shape
    assert found.dtype == torch.float32
    return found
