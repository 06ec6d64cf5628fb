"""What every change of a model has in common, whether it moves attention, edits states or rounds weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from sinklens.core.errors import UsageError
from sinklens.core.reference import Reference
from sinklens.core.registry import Registry
from sinklens.models.spec import OpenedModel

from .effect import Outcome

if TYPE_CHECKING:
    from .calibration import Search


FOUND = "found"
"""A parameter with this value is filled in by a run, with what it finds on the model."""


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

    grid: ClassVar[Mapping[str, Sequence[Any]]] = MappingProxyType({})
    """Values that a calibration tries, of methods that have no search of their own."""

    finders: ClassVar[tuple[str, ...]] = ()
    """Analyzers of a run that find what the method is about; `sinklens mitigate` asks them too."""

    @property
    def wants(self) -> str:
        """What a run has to find before it can be put on a model; "" if nothing is open."""
        return ""

    def refuse_open(self) -> None:
        """Refuse to be put on a model while something is open.

        Raises:
            UsageError: Naming it.
        """
        if self.wants:
            raise UsageError(
                f"{self.name}: {self.wants} are not named.",
                detail=f"`{FOUND}` is filled in by a run: sinklens mitigate --with {self.name}",
                hint="Or name them.",
            )

    def search(self, **settings: Any) -> Search | None:
        """How a calibration chooses parameters; None if there is nothing to choose."""
        from .calibration import GridSearch

        return GridSearch(self.grid, **settings) if self.grid else None

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
