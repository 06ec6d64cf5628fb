"""Stored tensors of packed weights, seen as if the weights themselves were stored: they are dequantised when read.

Whoever puts parameters together asks for weights by the names and shapes that an unquantised checkpoint has, so that
experts are fused, names changed and layouts converted as for any other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError

from ..catalog import Source
from ..checkpoint import TensorHeader
from ..packed import PACKED, PackedWeight
from ..quantised import check_dtype, format_of, settings_of
from .recipe import Recipes
from .tensors import DTYPES, NUMBERS, StoredTensors

VALUES = "F32"
"""What a weight is computed in, as safetensors calls it."""


@dataclass
class UnpackedTensors(StoredTensors):
    """Stored tensors, with weights in the place of what they are packed in.

    Attributes:
        packed: By the name of the weight.
        pieces: File and header entry of the tensors that weights are packed in.
        turned: Weights that the model holds with inputs first.
    """

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    pieces: dict[str, tuple[Path, TensorHeader]] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)

    @classmethod
    def over(cls, stored: StoredTensors, method: str, settings: Any) -> UnpackedTensors:
        """The same tensors, packed weights unpacked.

        Args:
            method: The format, one of `PACKED`.
            settings: What the format's `settings` gave.

        Raises:
            ModelError: Tensors do not fit together, or integers are stored that no scale belongs to.
        """
        packed = {weight.name: weight for weight in PACKED[method].weights(stored, settings)}
        used = {key for weight in packed.values() for key in weight.parts.values()}
        where = {key: place for key, place in stored.where.items() if key not in used}
        for key in where:
            if key in packed or (key.endswith(".weight") and stored.dtype_of(key) not in NUMBERS):
                raise cls._alone(stored, key)
        for name, weight in packed.items():
            pieces = [stored.where[key] for key in weight.parts.values()]
            path, _ = max(pieces, key=lambda place: place[1].nbytes)
            where[name] = path, TensorHeader(VALUES, weight.shape, sum(one.nbytes for _, one in pieces))
        pieces = {key: stored.where[key] for key in used}
        return cls(stored.name, where, stored.written, {}, packed, pieces)

    @staticmethod
    def _alone(stored: StoredTensors, key: str) -> ModelError:
        kind = str(stored.dtype_of(key)).removeprefix("torch.")
        return ModelError(
            f"{key} in {stored.file_of(key)} of {stored.name!r} is stored as {kind}, and no scales belong to it.",
            detail="What its numbers stand for is unknown.",
            hint="Check that config.json and the weights belong together.",
        )

    def turn(self, key: str) -> None:
        """Hand this weight out with inputs first."""
        path, header = self.where[key]
        self.where[key] = path, replace(header, shape=header.shape[::-1])
        self.turned.add(key)

    def read_into(self, key: str, target: Tensor) -> None:
        weight = self.packed.get(key)
        if weight is None:
            if target.is_floating_point() and self.dtype_of(key) not in NUMBERS:
                raise self._alone(self, key)
            super().read_into(key, target)
            return
        if tuple(target.shape) != self.shape_of(key):
            raise ModelError(
                f"{key}, packed in {self.file_of(key)} of {self.name!r}, has the shape {list(self.shape_of(key))}.",
                detail=f"The model's config asks for {list(target.shape)}.",
                hint="Check that config.json and the weights belong together.",
            )
        with torch.no_grad():
            values = weight.dequantise(
                {part: self._piece(key, piece) for part, piece in weight.parts.items()}
            )
            target.copy_(values.T if key in self.turned else values)
        self.check(key, target)

    def _piece(self, key: str, piece: str) -> Tensor:
        """A tensor as it is stored. Codes may be stored as floats: only the weight that comes out is looked at."""
        path, header = self.pieces[piece]
        found = torch.empty(header.shape, dtype=DTYPES[header.dtype])
        if header.nbytes:
            self._fill(path, header, piece, found)
            if piece != key:  # counted as the weight's
                self.bytes_read[key] = self.bytes_read.get(key, 0) + self.bytes_read.pop(piece)
        return found


def unpacked(stored: StoredTensors, source: Source, config: Any, dtype: Any) -> StoredTensors:
    """Stored tensors with packed weights unpacked; other tensors as they are.

    Args:
        dtype: The dtype asked for, or `auto`.

    Raises:
        ModelError: The config or the tensors say something that is not known, or that does not fit together.
    """
    method = format_of(config)
    if method not in PACKED:
        return stored
    check_dtype(source, config, dtype)
    return UnpackedTensors.over(stored, method, settings_of(config, source.id))


def unquantised(config: Any) -> Any:
    """The config of the model that is traced: its weights are not quantised any more."""
    if format_of(config) not in PACKED:
        return config
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return config


def turn_inputs_first(module: nn.Module, recipes: Recipes) -> None:
    """Have weights turned that the model holds with inputs first (GPT-2): packed they are stored outputs first."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(stored := recipes.stored, UnpackedTensors):
        return
    for recipe in recipes.groups.values():
        for target, parts in recipe.parts.items():
            owner = module.get_submodule(target.rpartition(".")[0])
            for part in parts:
                if isinstance(owner, Conv1D) and part.key in stored.packed:
                    stored.turn(part.key)


def refuse_lost_biases(recipes: Recipes) -> None:
    """Refuse biases beside packed weights that the model has no place for. Some writers store zeros for every map.

    Raises:
        ModelError: One is not zero.
    """
    if not isinstance(stored := recipes.stored, UnpackedTensors):
        return
    used = {key for recipe in recipes.groups.values() for key in recipe.keys}
    for name in stored.packed.keys() & used:
        bias = f"{name.removesuffix('weight')}bias"
        if bias in stored.where and bias not in used and bool(stored.read(bias).any()):
            raise ModelError(
                f"{bias} in {stored.file_of(bias)} of {stored.name!r} has no place in the model, and is not zero.",
                detail="By the model's config this map adds nothing.",
                hint="Check that config.json and the weights belong together.",
            )
