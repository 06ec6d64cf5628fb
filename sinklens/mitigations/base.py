"""What a mitigation of attention is: a rule for moving it, put on a model for the length of a `with`.

A method says which keys (`sets`) and what becomes of their mass (`factors`). Everything else is here: finding the
attention of the model, heads, padding, cache and decoding, the arithmetic (`kernels.transfer`), and the proof that
something happened.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sinklens.core.canonical import plain
from sinklens.core.errors import ModelError, UsageError
from sinklens.kernels.edits import edited_map
from sinklens.kernels.key_sets import Factors, KeySets, Shares
from sinklens.kernels.spec import AttentionCall
from sinklens.kernels.transfer import transfer
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import OpenedModel, Tower
from sinklens.tracers.announced import announced
from sinklens.tracers.attention import Attended, AttentionTap, Site, editors_of, ignore, no_statistics
from sinklens.tracers.executor import sites

from .effect import Effect, NothingEdited
from .method import Method
from .method import registry as registry
from .tokens import Tokens


@dataclass
class Seen:
    """One attention call as a method sees it.

    Attributes:
        call: The tensors, after RoPE and cache.
        lse: Log-sum-exp of its rows from the model's own kernel, None where that does not tell it.
        tokens: Of the running pass.
        chosen: Query heads that the mitigation is meant for.
        causal: Whether tokens see earlier ones only.
        memory: The method's own notes on this layer; empty at the start of every input.
    """

    site: Site
    call: AttentionCall
    lse: Tensor | None
    tokens: Tokens
    chosen: Bool[Tensor, " head"]
    causal: bool
    memory: dict[str, Any]

    @property
    def first(self) -> bool:
        """Whether this is the first pass over an input (prefill), rather than a continuation from a cache."""
        return self.tokens.past == 0

    @property
    def total(self) -> int:
        """Tokens of the sequence, cached ones and padding included."""
        return self.tokens.past + self.call.query.shape[2]

    @property
    def dropped(self) -> int:
        """Tokens that a sliding cache no longer holds: column `j` is token `j + dropped`."""
        return max(0, self.total - self.call.key.shape[2])

    @property
    def rows(self) -> Bool[Tensor, "batch query"]:
        """Rows of real tokens."""
        return self.tokens.real(self.call)[:, self.tokens.past :]

    def sets_of(self, places: Tensor, valid: Tensor, *, keep_own: bool = False) -> KeySets:
        """Sets of tokens, given by their place among all tokens `[batch, 1|head, group, width]`."""
        columns = places - self.dropped
        own = torch.arange(self.call.query.shape[2], device=columns.device) + self.tokens.past - self.dropped
        return KeySets(columns, valid & (columns >= 0), keep_own, own)

    def positions(self, positions: tuple[int, ...], *, keep_own: bool = False) -> KeySets:
        """One set: the given positions of each prompt's own tokens, for all heads."""
        places, valid = self.tokens.places(positions, self.call)
        key = "sets", positions, keep_own, self.dropped, places.device
        if key not in self.tokens.memo:
            self.tokens.memo[key] = self.sets_of(
                places[:, None, None], valid[:, None, None], keep_own=keep_own
            )
        return self.tokens.memo[key]


@dataclass(frozen=True, kw_only=True)
class Mitigation(Method):
    """Base of all methods that move attention; see `Method` for what their classes say of themselves.

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
    def sets(self, seen: Seen) -> KeySets | None:
        """The keys whose mass is moved; None if there are none in this call."""

    @abstractmethod
    def factors(self, seen: Seen, shares: Shares) -> Factors:
        """What becomes of a block of rows. Heads that are not chosen are left alone by the caller."""

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        """Rows that may be edited: real tokens, unless a method says otherwise."""
        return seen.rows

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

    def _check_company(self, earlier: Mitigation, mine: dict[int, Tensor], theirs: dict[int, Tensor]) -> None:
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
        effect = Effect(self.name, identity=self.identity)
        if self.identity:
            yield effect
            return
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
            if isinstance(tap, _EditTap):
                self._check_company(tap.mitigation, chosen, tap.chosen)
        with ExitStack() as stack:
            what = {"name": self.name, "parameters": plain(self.parameters)}
            stack.enter_context(announced(module, tower, what))
            tokens = stack.enter_context(Tokens().watched(module, tower))
            tap = _EditTap(self, where, chosen, tokens, effect, causal=tower.causal)
            stack.enter_context(tap.attached(module))
            yield effect
        if not effect.acted:
            warnings.warn(effect.verdict, NothingEdited, stacklevel=3)


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


class _EditTap(AttentionTap):
    """The attention tap of a mitigation: the model's own kernel, its log-sum-exp if it tells it, and the transfer."""

    edits_map = True

    def __init__(
        self,
        mitigation: Mitigation,
        where: dict[nn.Module, Site],
        chosen: dict[int, Tensor],
        tokens: Tokens,
        effect: Effect,
        *,
        causal: bool,
    ) -> None:
        super().__init__(where, no_statistics, ignore)
        self.mitigation, self.tokens, self.effect, self.chosen = mitigation, tokens, effect, chosen
        self.causal = causal
        self.heads = {layer: int(heads.sum()) for layer, heads in chosen.items()}
        self._memory: dict[int, tuple[int, dict[str, Any]]] = {}

    def rewrite(self, site: Site, attended: Attended) -> Attended:
        self.effect.calls += 1
        if attended.dropout:
            raise ModelError(
                "A mitigation needs attention without dropout.",
                detail=f"Layer {site.layer} drops {attended.dropout:.0%} of its attention: it is in training mode.",
                hint="Call model.eval() first.",
            )
        call, kernel = attended.call, attended.kernel
        # The kernel's own is float32 at best.
        lse = None if kernel is None or call.query.dtype == torch.float64 else kernel.lse_for(call)
        seen = Seen(site, call, lse, self.tokens, self._heads(site, call), self.causal, self._notes(site))
        with torch.no_grad():
            sets = self.mitigation.sets(seen)
            rows = self.mitigation.rows(seen)
        if sets is None:
            return attended
        done = transfer(
            call,
            attended.output,
            sets,
            self._rule(seen),
            seen.lse,
            rows=rows,
            remember=attended.remember or attended.weights is not None,
        )
        self.effect.add(site.layer, done, seen.rows.sum() * self.heads[site.layer])
        if done.edit is None:
            return replace(attended, output=done.output)
        weights = None if attended.weights is None else edited_map(attended.weights, done.edit)
        return replace(
            attended,
            call=replace(call, edits=(*call.edits, done.edit)),
            output=done.output,
            weights=weights,
        )

    def _rule(self, seen: Seen) -> Callable[[Shares], Factors]:
        def rule(shares: Shares) -> Factors:
            found = self.mitigation.factors(seen, shares)
            return replace(found, edited=found.edited & seen.chosen[:, None])

        return rule

    def _heads(self, site: Site, call: AttentionCall) -> Tensor:
        heads = self.chosen[site.layer] = self.chosen[site.layer].to(call.query.device)
        return heads

    def _notes(self, site: Site) -> dict[str, Any]:
        """The method's notes on a layer, begun anew with every input."""
        begun, notes = self._memory.get(site.layer, (0, {}))
        if begun != self.tokens.inputs:
            notes = {}
            self._memory[site.layer] = (self.tokens.inputs, notes)
        return notes
