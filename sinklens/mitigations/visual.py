"""What methods on visual tokens share: sink dims, the tokens of a call by kind and sink, rows of text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sinklens.core.errors import ModelError, UsageError
from sinklens.inputs.spans import Kind
from sinklens.kernels.key_sets import KeySets, key_sets
from sinklens.models.spec import OpenedModel, Tower
from sinklens.tracers.sink_dims import TAU, Cut, SinkDims, cut_for, known, published

from .base import Mitigation, Seen
from .kinds import SinkWatch, kinds_of, needs_pictures
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class VisualSinkMethod(Mitigation):
    """Base of methods that tell visual sinks from other visual tokens.

    Args:
        dims: Sink dims of the model: indices, or what a search found. None takes published ones of the model's name.
        tau: Threshold of φ, see `tracers.sink_dims`.
        tau_energy: The same as a share of the state's energy; given, it counts instead of `tau`.
        update_decode: Whether generated tokens can become sinks; otherwise those of the prompt are kept.
    """

    dims: SinkDims | Collection[int] | int | None = None
    tau: float = TAU
    tau_energy: float | None = None
    update_decode: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.dims, Mapping):  # of a recipe
            object.__setattr__(self, "dims", SinkDims.from_json(cast("dict[str, Any]", self.dims)))
        if self.dims is not None and not isinstance(self.dims, SinkDims):
            given = (self.dims,) if isinstance(self.dims, int) else self.dims
            dims = tuple(dict.fromkeys(int(dim) for dim in given))
            if not dims or min(dims) < 0:
                raise UsageError(
                    f"{self.name}: dims must be dims of the hidden state from 0 on, got {list(dims)}."
                )
            object.__setattr__(self, "dims", dims)
        cut_for(4096, self.tau, self.tau_energy)  # refuses thresholds that mean nothing

    @property
    def strict(self) -> bool:
        """Whether a sink lies above the threshold rather than at it."""
        return False

    def fitted(self, model: nn.Module | OpenedModel, tower: Tower) -> Self:
        config = needs_pictures(self.title, model)
        names = [getattr(config, "_name_or_path", None)]
        if isinstance(model, OpenedModel):
            names.insert(0, model.info.id)
        found = self._dims_for([name for name in names if name], tower.hidden_size)
        if not found:
            raise ModelError(
                f"{self.title} has nothing to edit in this model: no sink dims are known of it.",
                detail=found.failed,
                hint="Give dims=... if you know better.",
            )
        return replace(self, dims=found)

    def _dims_for(self, names: list[str], hidden_size: int) -> SinkDims:
        if isinstance(self.dims, SinkDims):
            if self.dims.hidden_size != hidden_size:
                raise UsageError(
                    f"{self.name}: these sink dims are of {self.dims.hidden_size} dims; this model has {hidden_size}."
                )
            return self.dims
        if self.dims is not None:
            return SinkDims.given(cast("tuple[int, ...]", self.dims), hidden_size)
        for name in names:
            if published(name) is not None:
                return known(name, hidden_size)
        raise UsageError(
            f"{self.name} needs the sink dims of the model, and none are published for {names[0] if names else 'it'}.",
            detail="They are the dims of the hidden state in which sinks are large.",
            hint="Find them: search_sink_dims(opened, prompts) of sinklens.tracers.calibrate_dims; then give dims=...",
        )

    def cut(self, hidden_size: int) -> Cut:
        """The threshold of φ."""
        return cut_for(hidden_size, self.tau, self.tau_energy, strict=self.strict)

    def watching(self, model: nn.Module, tower: Tower, tokens: Tokens) -> AbstractContextManager[Any]:
        assert isinstance(self.dims, SinkDims)  # fitted has filled it in
        return SinkWatch(tokens, self.dims.indices, self.cut(tower.hidden_size), self.update_decode).attached(
            model, tower
        )

    def groups(self, seen: Seen) -> tuple[Bool[Tensor, "batch token"], Bool[Tensor, "batch token"]] | None:
        """Visual tokens, and sinks of all kinds, among the tokens of the pass; None, with the reason, without both."""
        real = seen.tokens.real(seen.call)
        visual = kinds_of(seen.tokens, seen.call, seen.config) == int(Kind.VISUAL)
        sinks = seen.watch.sinks(seen.site.layer, real)
        if not bool(visual.any()):
            seen.nothing("no prompt has visual tokens")
            return None
        if not bool(sinks.any()):
            seen.nothing("no token is a sink by its state")
            return None
        return visual, sinks

    def text_rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        """Rows of real text tokens."""
        kinds = kinds_of(seen.tokens, seen.call, seen.config)
        return seen.rows & (kinds[:, seen.tokens.past :] != int(Kind.VISUAL))

    def placed(self, seen: Seen, members: list[Bool[Tensor, "batch token"]]) -> KeySets | None:
        """Sets of tokens as the sets of the call; None if all are empty."""
        found = key_sets(torch.stack(members))
        return seen.sets_of(found.columns, found.valid) if found.columns.shape[-1] else None
