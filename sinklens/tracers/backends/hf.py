"""The default: transformers runs the model, hooks and its two registries show it."""

from __future__ import annotations

from typing import Any

from torch import nn

from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel

from .base import Backend

SPREAD = (
    "The model is spread over processes by a tensor-parallel plan; experiments change parts of a model that one "
    "process holds."
)


class Transformers(Backend):
    """Every signal, at the model's own speed: attention through the registry, nothing reimplemented."""

    name = "hf"
    title = "transformers"
    about = "The model as transformers runs it, with its own attention kernels; every signal."

    def owns(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def open(self, model: Any, tokenizer: Any = None, **source: Any) -> OpenedModel:
        return open_model(model, tokenizer=tokenizer, **source)

    def for_experiments(self, opened: OpenedModel) -> OpenedModel | str:
        return opened if opened.spread is None else SPREAD
