"""What every method has in common that acts where attention is computed: heads, layers, company, and being put on.

What it does to a call is its own (`edit`). Finding the attention of the model, padding, cache, decoding and the proof
that something happened are here and in `EditTap`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sinklens.core.canonical import plain
from sinklens.core.errors import ModelError, UsageError
from sinklens.kernels.transfer import Transferred
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import OpenedModel, Tower
from sinklens.tracers.announced import announced
from sinklens.tracers.attention import editors_of, sites

from .edit_tap import EditTap
from .effect import Effect, NothingEdited
from .method import Method
from .seen import Seen
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """Base of all methods that act at the attention seam; see `Method` for what their classes say of themselves.

    Args:
        heads: `(layer, head)` pairs, 0-based; None means every head.
        shared_heads: Head indices that are meant in every layer; None means every index.
        layers: Layers (0-based); None leaves it to the method.

    Several may be on a model at once: the one that was put on first edits first, the next one edits what that left.

    Example:
        >>> with ZeroTuning(gamma=2.0)(model) as effect:
        ...     model.generate(**inputs)
        >>> print(effect.require().verdict)
    """

    moves: ClassVar[bool] = True
    """Whether it moves attention; otherwise it changes only what heads write."""

    heads: Collection[tuple[int, int]] | None = None
    shared_heads: Collection[int] | None = None
    layers: Collection[int] | None = None

    def __post_init__(self) -> None:
        for key in ("heads", "shared_heads", "layers"):
            value = getattr(self, key)
            if value is None:
                continue
            found = sorted({tuple(item) if key == "heads" else int(item) for item in value})
            if not found:
                raise UsageError(f"{self.name}: {key} is empty, so nothing could be edited.")
            object.__setattr__(self, key, tuple(found))

    @abstractmethod
    def edit(self, seen: Seen, output: Tensor, *, remember: bool) -> Transferred | None:
        """What becomes of one attention call; None if nothing does.

        Args:
            output: `[batch query head value_dim]`, after the kernel and earlier edits.
            remember: Say in `Transferred.edit` what was done to the map.
        """

    def fitted(self, model: nn.Module | OpenedModel, tower: Tower) -> Self:
        """The mitigation with what it must know of the model filled in.

        Raises:
            ModelError: The model has nothing that it could edit.
            UsageError: What it must know cannot be found out.
        """
        return self

    def watching(self, model: nn.Module, tower: Tower, tokens: Tokens) -> AbstractContextManager[Any]:
        """What else looks at the model while the mitigation is on; `Seen.watch` is what it gives."""
        return nullcontext()

    def own_layers(self, count: int) -> Collection[int]:
        """Layers of a model of `count` that the method takes where none are given."""
        return range(count)

    def check(self, tower: Tower) -> None:
        """Refuse parameters that do not fit a model; methods with parameters per head add to it.

        Raises:
            UsageError: A layer or head that the model does not have.
        """
        for layer in self.layers or ():
            check_head(self.name, tower, layer)
        for layer, head in self.heads or ():
            check_head(self.name, tower, layer, head)
        for head in self.shared_heads or ():
            check_head(self.name, tower, None, head)

    @property
    def named(self) -> frozenset[int]:
        """Positions that its parameters name; methods that look for their tokens name none."""
        return frozenset()

    @property
    def removes(self) -> bool:
        """Whether it leaves the tokens it names no attention at all."""
        return False

    @property
    def conserves(self) -> bool:
        """Whether rows add up to 1 afterwards."""
        return True

    def _check_company(
        self, earlier: AttentionMethod, mine: dict[int, Tensor], theirs: dict[int, Tensor]
    ) -> None:
        """Refuse to act after another mitigation where the two together mean nothing."""
        both = mine.keys() & theirs.keys()
        if not any(bool((mine[layer].cpu() & theirs[layer].cpu()).any()) for layer in both):
            return
        why = None
        if type(self) is type(earlier):
            why = "The same method would act twice on the same heads. One with the parameters that are meant does it."
        elif not earlier.conserves:
            why = f"Its rows do not add up to 1, and {self.name} would take shares of them. It can be put on last."
        elif (shared := self.named & earlier.named) and (self.removes or earlier.removes):
            remover, other = (self, earlier) if self.removes else (earlier, self)
            why = (
                f"{remover.name} takes all attention from {_tokens(shared)}, so there is nothing that {other.name} "
                "could scale."
            )
        if why is not None:
            raise UsageError(
                f"{self.name} cannot be put on beside {earlier.name}.",
                detail=why,
                hint="Give them different heads or layers, or leave one out.",
            )

    def chosen(self, layer: int, tower: Tower) -> Bool[Tensor, " head"]:
        """Heads of a layer that are edited."""
        layers = self.layers if self.layers is not None else self._default_layers(tower)
        out = torch.full((tower.heads,), layer in layers)
        if self.heads is not None:
            pairs = cast("Collection[tuple[int, int]]", self.heads)
            out &= torch.tensor([(layer, head) in pairs for head in range(tower.heads)])
        if self.shared_heads is not None:
            out &= torch.tensor([head in self.shared_heads for head in range(tower.heads)])
        return out

    def _default_layers(self, tower: Tower) -> Collection[int]:
        # Heads asked for by name are edited wherever they are.
        return range(len(tower.blocks)) if self.heads is not None else self.own_layers(len(tower.blocks))

    def __call__(self, model: nn.Module | OpenedModel) -> AbstractContextManager[Effect]:
        """Put the mitigation on a model; everything is taken off again, also after an error.

        Warns:
            NothingEdited: On leaving, if nothing was edited and the parameters do not make it the identity.

        Raises:
            ModelError: The model's attention cannot be reached.
            UsageError: The parameters do not fit the model, or what is on it already.
        """
        return self._on(model)

    @contextmanager
    def _on(self, model: nn.Module | OpenedModel) -> Iterator[Effect]:
        module = model.module if isinstance(model, OpenedModel) else model
        anatomy = model.anatomy if isinstance(model, OpenedModel) else find_anatomy(module)
        tower = anatomy.main
        if not tower.routed:
            raise ModelError(
                f"{self.title} cannot be put on this model.",
                detail=f"{type(module).__name__} does not call its attention through transformers' registry.",
            )
        self.check(tower)
        effect = Effect(self.name, identity=self.identity, moves=self.moves)
        if self.identity:
            yield effect
            return
        with self.fitted(model, tower)._attached(module, tower, effect):
            yield effect
        if not effect.acted:
            warnings.warn(effect.verdict, NothingEdited, stacklevel=3)

    @contextmanager
    def _attached(self, module: nn.Module, tower: Tower, effect: Effect) -> Iterator[None]:
        where = sites(module, tower, "attention")
        chosen = {site.layer: self.chosen(site.layer, tower) for site in where.values()}
        where = {part: site for part, site in where.items() if bool(chosen[site.layer].any())}
        if not where:
            raise UsageError(
                f"{self.name}: none of the heads asked for has softmax attention in this model.",
                detail=f"The model has {len(tower.blocks)} layers of {tower.heads} heads.",
                hint="Give layers=...; the method leaves some out by itself."
                if self.layers is None
                else None,
            )
        for tap in editors_of(where):
            if isinstance(tap, EditTap):
                self._check_company(tap.mitigation, chosen, tap.chosen)
        with ExitStack() as stack:
            what = {"name": self.name, "parameters": plain(self.parameters)}
            stack.enter_context(announced(module, tower, what))
            tokens = stack.enter_context(Tokens().watched(module, tower))
            watch = stack.enter_context(self.watching(module, tower, tokens))
            tap = EditTap(
                self, where, chosen, tokens, effect, watch, config=module.config, causal=tower.causal
            )
            stack.enter_context(tap.attached(module))
            yield


def _tokens(positions: Collection[int]) -> str:
    listed = ", ".join(map(str, sorted(positions)))
    return f"token {listed}" if len(positions) == 1 else f"tokens {listed}"


def check_head(name: str, tower: Tower, layer: int | None, head: int = 0) -> None:
    """Refuse a head that a model does not have; a `layer` of None checks the head only."""
    if layer is not None and not 0 <= layer < len(tower.blocks):
        raise UsageError(
            f"{name}: there is no layer {layer}.",
            detail=f"The model has layers 0 to {len(tower.blocks) - 1}.",
        )
    if not 0 <= head < tower.heads:
        raise UsageError(
            f"{name}: there is no head {head}.", detail=f"The model has heads 0 to {tower.heads - 1}."
        )
    if layer is not None and tower.blocks[layer].attention is None:
        raise UsageError(f"{name}: layer {layer} has no softmax attention.")
