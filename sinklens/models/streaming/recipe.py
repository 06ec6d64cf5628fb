"""How stored tensors become the parameters of a model, worked out once and carried out block by block.

transformers knows how a checkpoint's names and layouts turn into those of its classes (its weight conversions); that
knowledge is asked here, not repeated. Two cases are carried out directly, because they need no second copy: a tensor
that is stored as it is used, and experts that are stored one by one and used fused. Everything else runs through the
conversion itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError

from .tensors import Spare, StoredTensors


@dataclass(frozen=True)
class Part:
    """A stored tensor and its place in a parameter: all of it, or rows of one expert."""

    key: str
    expert: int | None = None
    start: int = 0

    def of(self, parameter: Tensor, rows: int) -> Tensor:
        return parameter if self.expert is None else parameter[self.expert, self.start : self.start + rows]


@dataclass
class Conversion:
    """Stored tensors that a conversion of transformers turns into one parameter or several.

    Attributes:
        target: The first of those parameters.
        sources: Stored tensors and the pattern each one matched.
    """

    target: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Recipe:
    """How to make the parameters of a part of the model.

    Attributes:
        parts: Parameter to the tensors it is put together from.
        conversions: What transformers has to convert.
    """

    parts: dict[str, list[Part]] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """The stored tensors that are read."""
        direct = [part.key for parts in self.parts.values() for part in parts]
        return [*direct, *(key for one in self.conversions for key, _ in one.sources)]


class Recipes:
    """The recipes of a model: one for each group that `group_of` puts its parameters into.

    Args:
        model: Without weights, or with: names, shapes and dtypes are looked at.
        dtype: That of the model.
        quantizer: transformers' object for a checkpoint that is to be dequantised.
    """

    def __init__(
        self, model: Any, stored: StoredTensors, dtype: torch.dtype, group_of: Any, quantizer: Any = None
    ) -> None:
        self.model, self.stored, self.dtype, self.quantizer = model, stored, dtype, quantizer
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {
            name: (value.shape, value.dtype) for name, value in model.state_dict().items()
        }
        plan = model._get_dtype_plan(dtype)
        self._plan = {re.compile(name.replace("*", r".*")): kind for name, kind in plan.items()}
        self.groups: dict[Any, Recipe] = {}
        for conversion in self._matched():
            recipe = self.groups.setdefault(group_of(conversion.target), Recipe())
            parts = None if self.quantizer is not None else self._parts(conversion)
            if parts is None:
                recipe.conversions.append(conversion)
            else:
                recipe.parts[conversion.target] = parts

    def _matched(self) -> Iterable[Conversion]:
        """Every parameter that the checkpoint has something for."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model, None, self.quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, known = self.model.base_model_prefix, dict.fromkeys(self.shapes, True)
        found: dict[str, Conversion] = {}
        for key in sorted(self.stored.where, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if target not in known and key in known:
                target, pattern = rename_source_key(key, [], [], prefix, known)
            if target not in known:
                continue
            converter = by_pattern.get(pattern) if pattern is not None else WeightRenaming(key, target)
            one = found.setdefault(target, Conversion(target, converter))
            one.sources.append((key, pattern if pattern is not None else key))
        return found.values()

    def _parts(self, conversion: Conversion) -> list[Part] | None:
        """The same as places in the parameter; None where it is more than putting side by side."""
        operations = getattr(conversion.converter, "operations", None)
        if not operations:
            return [Part(conversion.sources[0][0])]
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in operations]
        if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            return None
        shape = self.shapes[conversion.target][0]
        if len(conversion.converter.target_patterns) != 1 or len(shape) != 3:
            return None
        parts, start = [], 0
        for pattern in conversion.converter.source_patterns:
            keys = [key for key, matched in conversion.sources if matched == pattern]
            shapes = {self.stored.shape_of(key) for key in keys}
            if len(keys) != shape[0] or len(shapes) != 1:
                return None
            rows, columns = next(iter(shapes))
            parts += [Part(key, expert, start) for expert, key in enumerate(keys)]
            start += rows
            if columns != shape[2]:
                return None
        return parts if start == shape[1] else None

    def make(self, group: Any, spare: Spare | None = None) -> dict[str, Tensor]:
        """Read a group's tensors and make its parameters, on the CPU. Nothing is put into the model.

        Args:
            spare: Memory that may be used.

        Raises:
            ModelError: A file or tensor cannot be used; it is named.
        """
        recipe, spare = self.groups.get(group, Recipe()), spare or Spare()
        made: dict[str, Tensor] = {}
        for target, parts in recipe.parts.items():
            shape, _ = self.shapes[target]
            made[target] = spare.take(tuple(shape), self.dtype_of(target))
            for part in parts:
                rows = self.stored.shape_of(part.key)[0] if part.expert is not None else 0
                self.stored.read_into(part.key, part.of(made[target], rows))
        for conversion in recipe.conversions:
            made |= self._converted(conversion)
        return made

    def dtype_of(self, target: str) -> torch.dtype:
        """What a parameter is loaded as: its own type, or the one that the model keeps it in."""
        kept = next((kind for name, kind in self._plan.items() if name.search(target)), None)
        return kept or self.shapes[target][1]

    @torch.no_grad()
    def _converted(self, conversion: Conversion) -> dict[str, Tensor]:
        converter = copy.deepcopy(conversion.converter)
        for key, pattern in conversion.sources:
            converter.add_tensor(conversion.target, key, pattern, self._reader(conversion, key))
        try:
            found = converter.convert(
                conversion.target,
                model=self.model,
                config=self.model.config,
                hf_quantizer=self.quantizer,
            )
        except ModelError:
            raise
        except Exception as error:
            key = conversion.sources[0][0]
            raise ModelError(
                f"{key} in {self.stored.file_of(key)} of {self.stored.name!r} cannot be converted: {error}",
                detail=f"It is to become {conversion.target} (transformers raised {type(error).__name__}).",
                hint="Check that config.json and the weights belong together.",
            ) from error
        values = {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
        for name, value in values.items():
            expected = self.shapes.get(name)
            if expected is not None and value.shape != expected[0]:
                key = conversion.sources[0][0]
                raise ModelError(
                    f"{key} in {self.stored.file_of(key)} of {self.stored.name!r} gives {name} the shape "
                    f"{list(value.shape)}.",
                    detail=f"The model's config asks for {list(expected[0])}.",
                    hint="Check that config.json and the weights belong together.",
                )
            if self.quantizer is not None:  # what is stored has no NaN that could be looked for
                self.stored.check(conversion.sources[0][0], value)
        return values

    def _reader(self, conversion: Conversion, key: str) -> Any:
        wanted = self.dtype_of(conversion.target)
        if self.quantizer is not None:
            wanted = self.quantizer.get_new_dtype(conversion.converter, self.stored.lazily(key), wanted)
        return lambda: self.stored.read(key).to(dtype=wanted)


def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Make these tensors the model's parameters and buffers."""
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if last not in module._buffers and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        value._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        setattr(module, last, value)
