"""What every change of a model has in common, whether it moves attention, edits states or rounds weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from sinklens.core.reference import Reference
from sinklens.core.registry import Registry
from sinklens.models.spec import OpenedModel

from .effect import Outcome


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen dataclass whose fields are its parameters, put on a model for the length of a `with`.

    Class attributes: `name` (registry key), `title`, `formula` (MathML), `reference`. The docstring must have the
    paragraphs "How it is computed:", "Compared with the paper:" and "When not to trust it:".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    reference: ClassVar[Reference]

    @property
    def identity(self) -> bool:
        """Whether the parameters make it change nothing."""
        return False

    @property
    def parameters(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @abstractmethod
    def __call__(self, model: nn.Module | OpenedModel) -> AbstractContextManager[Outcome]:
        """Put it on a model; everything is taken off again, also after an error.

        Warns:
            NothingEdited: On leaving, if nothing was changed and the parameters do not make it the identity.
        """


registry: Registry[type[Method]] = Registry("mitigation", "sinklens ls mitigations")
