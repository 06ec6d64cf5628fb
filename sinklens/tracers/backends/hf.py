"""The default: transformers runs the model, hooks and its two registries show it."""

from __future__ import annotations

from typing import Any

from torch import nn

from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel

from .base import Backend


class Transformers(Backend):
    """Every signal, at the model's own speed: attention through the registry, nothing reimplemented."""

    name = "hf"
    title = "transformers"
    about = "The model as transformers runs it, with its own attention kernels; every signal."

    def owns(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def open(self, model: Any, tokenizer: Any = None, **source: Any) -> OpenedModel:
        return open_model(model, tokenizer=tokenizer, **source)
