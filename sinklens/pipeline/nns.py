"""From findings back into nnsight: `sl.nns`.

run = sl.profile(model)
with sl.nns.on(sl.mitigations.ZeroTuning(gamma=2.0), model) as effect, model.trace(text):
    logits = model.output.logits.save()
edited = sl.nns.without_massive(run, model)
with edited.trace(text):
    logits = edited.output.logits.save()
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.models.spec import OpenedModel
from sinklens.tracers.backends import backend_of, open_with

from .run import Run


@contextmanager
def on(what: Any, model: Any) -> Iterator[Any]:
    """Put a mitigation, or a recipe, on the model inside an nnsight model, for traces and generation alike.

    Args:
        what: A mitigation, or the recipe that a calibration gave (refused if it belongs to another model).
        model: A model of nnsight, or what `open_with` made of it.

    Yields:
        The effect, as with a transformers model.
    """
    opened = _opened(model)
    with what(opened) as effect:
        yield effect


def without_massive(run: Run, model: Any, *, value: float = 0.0) -> Any:
    """A copy of an nnsight model whose massive activations are overwritten after their blocks.

    The model itself stays as it is; weights are shared. The edit is nnsight's own (`model.edit`), so it can be removed
    with `clear_edits` and travels with a remote trace.

    Args:
        run: Whose massive activations; their positions are those of unpadded prompts.

    Raises:
        DataError: The run found none.
    """
    found = run.findings.get("massive-activations")
    entries = {(row["layer"], row["position"], row["dim"]) for row in (found.rows if found else ())}
    if not entries:
        raise DataError("This run found no massive activations that could be overwritten.")
    return set_entries(model, entries, value)


def set_entries(model: Any, entries: Collection[tuple[int, int, int]], value: float = 0.0) -> Any:
    """A copy of an nnsight model with entries of the residual stream overwritten after their blocks.

    Args:
        entries: `(layer, position, dim)`.
        value: What they become, in the unit of the activations.

    Raises:
        UsageError: An entry that the model does not have.
    """
    opened = _opened(model)
    tower, handle = opened.anatomy.main, opened.handle
    for layer, position, dim in entries:
        if not (0 <= layer < len(tower.blocks) and position >= 0 and 0 <= dim < tower.hidden_size):
            raise UsageError(
                f"There is no entry (layer {layer}, position {position}, dim {dim}).",
                detail=f"The model has {len(tower.blocks)} layers of width {tower.hidden_size}.",
            )
    layers = sorted({layer for layer, _, _ in entries})
    for layer in layers:
        if tower.blocks[layer].residual_norm is not None:
            raise ModelError(f"Block {layer} ends with a norm, so its output is not the residual stream.")
    plan = [
        (tower.blocks[layer].path, [(p, d) for at, p, d in sorted(entries) if at == layer])
        for layer in layers
    ]
    with handle.edit() as (_, edited):
        for path, places in plan:
            made = edited.get(path).output
            state = made[0] if isinstance(made, tuple) else made
            for position, dim in places:
                state[:, position, dim] = value
    return edited


def _opened(model: Any) -> OpenedModel:
    opened = model if isinstance(model, OpenedModel) else open_with(model)
    if backend_of(opened).name != "nnsight":
        raise ModelError(
            f"Expected a model of nnsight, found one of {backend_of(opened).title}.",
            hint="nnsight.modeling.transformers.TransformersModel(model, tokenizer=...) gives one.",
        )
    return opened
