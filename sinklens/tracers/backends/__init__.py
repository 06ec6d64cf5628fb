"""The libraries that can run a model, and which of them holds the one at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sinklens.core.errors import UsageError
from sinklens.core.registry import Registry
from sinklens.models.spec import OpenedModel

from .base import Backend
from .hf import Transformers
from .ndif import Ndif
from .nnsight import NNsight
from .transformer_lens import TransformerLens

backends: Registry[Backend] = Registry("backend", "sinklens ls backends")
for _backend in (Transformers(), TransformerLens(), NNsight(), Ndif()):
    backends.register(_backend.name)(_backend)


def backend_of(opened: OpenedModel) -> Backend:
    """The backend that runs an opened model."""
    return backends[opened.backend]


def owner_of(model: Any) -> Backend | None:
    """The backend whose object `model` is; None for names and folders. Those that wrap come before what they wrap."""
    others = [backend for _, backend in backends.items() if backend.name != Transformers.name]
    return next((backend for backend in (*others, backends[Transformers.name]) if backend.owns(model)), None)


def open_with(
    model: Any = None, tokenizer: Any = None, *, backend: str | None = None, **source: Any
) -> OpenedModel:
    """Open a model with the backend asked for, or with the one whose object it is, or with transformers.

    Raises:
        UsageError: Unknown backend, or another one than the object belongs to.
        ModelError: The backend's library is missing, or it cannot run this model.
    """
    owner = owner_of(model)
    asked = backends[backend] if backend is not None else owner or backends[Transformers.name]
    if owner is not None and owner.name not in (asked.name, Transformers.name) and not asked.takes(model):
        raise UsageError(
            f"This model is held by {owner.title}, so it cannot be run with --backend {asked.name}.",
            hint=f"Leave the backend out, or pass the transformers model inside to {asked.name}.",
        )
    asked.require()
    return asked.open(model, tokenizer, **source)


@contextmanager
def modes_restored(model: Any) -> Iterator[None]:
    """Measuring needs eval mode; a caller's model gets back the mode each of its modules was in."""
    owner = owner_of(model)
    module = owner.module_of(model) if owner is not None else None
    before = [(part, part.training) for part in module.modules()] if module is not None else []
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
