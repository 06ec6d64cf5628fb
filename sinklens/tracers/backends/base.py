"""What a backend is: a library that runs a model, seen through the few calls that tracing needs.

A backend is one file with one class. What it can give is data (`lacks`), so that lists, `doctor` and the refusal of an
analyzer before a run are all read from the same place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.core.manifest import package_version, required_versions
from sinklens.inputs.spec import Prompt
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Want
from sinklens.models.spec import OpenedModel

from ..attention import (
    AttentionTap,
    Edit,
    Mode,
    Site,
    editors_of,
    ignore,
    implementation_of,
    no_statistics,
    sites,
)
from ..batch import Batch, forward
from ..fallback import calls_kernel_directly, fallback_tap
from ..signals import Signal
from ..whole_heads import whole_heads

if TYPE_CHECKING:
    from ..executor import Pass, TracePlan
    from ..selfcheck import Check


class Seen(Protocol):
    """Who receives what the attention seam shows: the recorder of a trace, or a check."""

    def asks(self, site: Site, call: AttentionCall) -> Want: ...

    def on_attention(self, site: Site, call: AttentionCall, statistics: AttentionStatistics) -> None: ...


class Counter(Protocol):
    """A tap that counts the attention calls it saw."""

    calls: int


class Backend(ABC):
    """A library that runs a model.

    Class attributes: `name` (the value of `--backend`), `title`, `about` (one line), `package` (its import name, None
    if it is always there), `extra` (what to install), `lacks` (signals it cannot give, and why).

    A backend must say whether an object is its own (`owns`) and open it (`open`). Everything else has a default: the
    model is a transformers model whose parts are hooked in place.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    package: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None
    lacks: ClassVar[Mapping[Signal, str]] = {}

    @abstractmethod
    def owns(self, model: Any) -> bool:
        """Whether `model` is an object of this library. Must not import it."""

    @abstractmethod
    def open(self, model: Any, tokenizer: Any = None, **source: Any) -> OpenedModel:
        """Open an object of the library as it is, or anything that `open_model` takes in a copy of its own.

        Raises:
            ModelError: The model cannot be used through this library; the message says why.
        """

    def takes(self, model: Any) -> bool:
        """Whether it opens objects of another backend, too."""
        return self.owns(model)

    def module_of(self, model: Any) -> nn.Module | None:
        """The module inside an object of this library, as its holder sees it."""
        return model if isinstance(model, nn.Module) else None

    @property
    def installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None

    def require(self) -> None:
        """Refuse, with what to install, if the library is missing or of a release this backend was not made for."""
        install = f"Install it: pip install 'sinklens[{self.extra}]'"
        if not self.installed:
            raise ModelError(
                f"The {self.name} backend needs {self.title}, which is not installed.", hint=install
            )
        wanted = required_versions(self.package) if self.package else None
        found = package_version(self.package) if self.package else None
        if wanted is not None and found is not None and not wanted.contains(found, prereleases=True):
            raise ModelError(
                f"The {self.name} backend needs {self.title} {wanted}; {found} is installed.", hint=install
            )

    def missing(self, opened: OpenedModel) -> Mapping[Signal, str]:
        """Signals that this model cannot show here, and why."""
        return self.lacks

    def forward(self, opened: OpenedModel, batch: Batch, *, logits: bool = True) -> Any:
        """Run the model on a batch as this library runs it."""
        return forward(opened.module, batch, logits=logits)

    def attention(
        self, opened: OpenedModel, batch: Batch, seen: Seen, plan: TracePlan
    ) -> AbstractContextManager[Counter]:
        """Show every attention call of the main tower to `seen` while attached."""
        return attention_tap(opened, batch, seen, plan)

    def edited(self, opened: OpenedModel, batch: Batch, edit: Edit) -> Any:
        """The output of a pass whose attention outputs went through `edit`."""
        module = opened.module
        where = sites(module, opened.anatomy.main, "attention")
        with AttentionTap(where, no_statistics, ignore, edit=edit).attached(module):
            return self.forward(opened, batch)

    def attention_path(self, opened: OpenedModel, plan: TracePlan) -> str:
        """In words, which kernel gives the output and which the statistics."""
        return own_path(opened, plan)

    def checks(self, opened: OpenedModel, batch: Batch) -> list[Check]:
        """Checks that only this backend needs."""
        return []

    def hosted(self, opened: OpenedModel, batch: Batch, plan: TracePlan) -> Pass | None:
        """The whole pass where the model is not in this process; None where it is."""
        return None

    def self_checks(
        self, opened: OpenedModel, prompts: Sequence[Prompt], plan: TracePlan
    ) -> list[Check] | None:
        """All checks, where the model is not in this process; None where it is, and checked like any other."""
        return None

    def for_experiments(self, opened: OpenedModel) -> OpenedModel | str:
        """The model that experiments change parts of, or a sentence why none can be made."""
        return opened


def in_memory(model: Any) -> bool:
    """Whether `model` is held by the caller, so that a backend must copy it before it changes it."""
    return isinstance(model, nn.Module | OpenedModel)


def attention_tap(
    opened: OpenedModel, batch: Batch, seen: Seen, plan: TracePlan
) -> AbstractContextManager[Counter]:
    """The registered attention function, or what stands in for it in families that do not route through one."""
    module, tower = opened.module, opened.anatomy.main
    if not opened.anatomy.routed:
        return fallback_tap(module, tower, batch, seen)
    where = sites(module, tower, "attention")
    whole = whole_heads(opened.spread, tower)
    tap = AttentionTap(where, seen.asks, seen.on_attention, mode=plan.mode, plan=plan.blocks, whole=whole)
    tap.counted = counted_rows(batch)
    if plan.sampling is not None:
        tap.samples = plan.sampling.of_batch(batch)
    return tap.attached(module)


def counted_rows(batch: Batch) -> Tensor | None:
    """Real tokens, or None where all are: kernels have less to do then, and saying so costs one look."""
    return None if batch.valid is None or bool(batch.valid.all()) else batch.valid


def own_path(opened: OpenedModel, plan: TracePlan) -> str:
    """In words, what `attention_tap` does."""
    if not opened.anatomy.routed and calls_kernel_directly(opened.module):
        return "faithful: the model's own call of torch's kernel gives the output, a blocked sweep the statistics"
    if not opened.anatomy.routed:
        return "the model's eager attention; statistics from its weights, one layer at a time"
    own = implementation_of(opened.module.config) or "own"
    shares = "" if opened.spread is None else "; each process measures its own heads"
    if editors_of(sites(opened.module, opened.anatomy.main, "attention")):
        return (
            f"edited: the model's own {own} kernel, then the mitigations, a blocked sweep of the edited map"
        )
    if plan.mode is Mode.FUSED:
        return f"fused: one blocked pass gives output and statistics (in place of {own}){shares}"
    if plan.sampling is not None:
        return (
            f"faithful: the model's own {own} kernel gives the output, a sweep of sampled query rows the statistics"
            f"{shares}"
        )
    return f"faithful: the model's own {own} kernel gives the output, a blocked sweep the statistics{shares}"
