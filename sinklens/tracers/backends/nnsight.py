"""nnsight: a model handed over as it is, or one of our own, with every pass inside one of its traces.

nnsight leaves a transformers model in place and interleaves with its forward pass, so what transformers shows is shown
here too, and edits that the model carries (`model.edit`) are in effect. A pass that needs no logits ends after the last
block.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sinklens.core.errors import ModelError
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel

from ..batch import Batch, forward_inputs, under_way
from .base import Backend, in_memory


class NNsight(Backend):
    """Signals from hooks inside the traces of nnsight."""

    name = "nnsight"
    title = "nnsight"
    about = (
        "A model of nnsight as it is, edits included; every pass inside one of its traces, with early stop."
    )
    package = "nnsight"
    extra = "nnsight"

    def owns(self, model: Any) -> bool:
        return any(cls.__module__.partition(".")[0] == "nnsight" for cls in type(model).__mro__)

    def module_of(self, model: Any) -> nn.Module | None:
        return getattr(model, "_module", None)

    def open(self, model: Any, tokenizer: Any = None, **source: Any) -> OpenedModel:
        if self.owns(model):
            module = module_inside(model)
            own = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
            return replace(open_model(module, tokenizer=own, **source), backend=self.name, handle=model)
        from nnsight import NNsight as Wrapped

        opened = open_model(model, tokenizer=tokenizer, **source)
        # Wrapping replaces the forward of every module for good.
        module: Any = copy.deepcopy(opened.module) if in_memory(model) else opened.module
        return replace(opened, module=module, backend=self.name, handle=Wrapped(module))

    def forward(self, opened: OpenedModel, batch: Batch, *, logits: bool = True) -> Any:
        import nnsight

        inputs = forward_inputs(opened.module, batch, logits=logits)
        model, last = opened.handle, opened.anatomy.main.final_norm
        if not logits and last is not None:
            after = part(model, last)
            with under_way(batch), torch.no_grad(), model.trace(**inputs) as tracer:
                after.input  # noqa: B018  the pass has reached the end of the last block
                tracer.stop()
            return None
        with under_way(batch), torch.no_grad(), model.trace(**inputs):
            output = nnsight.save(model.output)
        return output

    def for_experiments(self, opened: OpenedModel) -> OpenedModel | str:
        """The module outside of traces: experiments copy it and run it as transformers does."""
        if edits := len(opened.handle._edits):
            return (
                f"The model was measured with {edits} edit{'s' * (edits > 1)} that it carries, and experiments run "
                "on the model without them."
            )
        return replace(opened, backend="hf", handle=None)


def part(model: Any, path: str) -> Any:
    """The envoy at a module path."""
    return model.get(path)


def module_inside(model: Any) -> nn.Module:
    """The transformers model that an object of nnsight wraps.

    Raises:
        ModelError: It wraps none, or one without weights.
    """
    module = getattr(model, "_module", None)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"A {type(model).__name__} of nnsight cannot be profiled.",
            detail="Expected one that wraps a transformers model.",
            hint="nnsight.NNsight(model) and nnsight.modeling.transformers.TransformersModel(model) do.",
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ModelError(
            "This model of nnsight has no weights yet (they are on the meta device).",
            hint="Load them: TransformersModel(name, dispatch=True). Or run it on NDIF: --remote",
        )
    return module
