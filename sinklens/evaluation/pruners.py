"""Token pruners as rules: which visual tokens of a prompt stay, told from what was recorded while it was read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from sinklens.core.errors import UsageError
from sinklens.core.papers import DIVPRUNE, FASTV
from sinklens.core.recency import no_outliers, recency_fit
from sinklens.core.reference import Reference
from sinklens.core.registry import Registry
from sinklens.core.suggest import did_you_mean

from .token_ranking import detrended, largest, most_different, without_padding

Queries = Literal["text", "last"]
Sinks = Literal["ranked", "kept", "dropped"]


@dataclass(frozen=True)
class Read:
    """What a pruner can know of a prompt's visual tokens, in their order.

    Attributes:
        attention: By layer, what the text behind the picture (`text`) and the last token (`last`) give each one: mean
            over heads and queries.
        features: States that enter the first block.
        sinks: Visual sinks of any layer by their states; None if the model has no sink dims.
        padding: Part of each token's cell that is padding.
    """

    attention: dict[str, Float[np.ndarray, "layer visual"]]
    features: Float[np.ndarray, "visual dim"]
    sinks: Bool[np.ndarray, " visual"] | None
    padding: Float[np.ndarray, " visual"]

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """Base of all pruners.

    Args:
        sinks: `ranked` treats visual sinks as any other token; `kept` takes them first; `dropped` takes them last. The
            number of tokens that stay is the same.
    """

    sinks: Sinks = "ranked"

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[Reference]

    def __post_init__(self) -> None:
        if self.sinks not in ("ranked", "kept", "dropped"):
            raise UsageError(f"{self.name}: sinks must be ranked, kept or dropped, got {self.sinks!r}.")

    @property
    def leaves_at(self) -> int:
        """The first layer without the pruned tokens."""
        return 0

    @property
    def label(self) -> str:
        """The name and the parameters that are not the usual ones."""
        own = [
            f"{f.name}={_shown(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return ":".join([self.name, *own])

    @property
    def corrections(self) -> dict[str, Any]:
        """Fields that correct the ranking, with the value that does not."""
        return {"sinks": "ranked"}

    @property
    def simpler(self) -> list[str]:
        """Labels of the same pruner with one correction less, and with none: what it is compared with."""
        own = [name for name, usual in self.corrections.items() if getattr(self, name) != usual]
        steps = [[name] for name in own] + ([own] if len(own) > 1 else [])
        return [self.without(step).label for step in steps]

    def without(self, corrections: Sequence[str]) -> Self:
        """The same pruner without some corrections."""
        return replace(self, **{name: self.corrections[name] for name in corrections})

    def why_not(self, read: list[Read]) -> str | None:
        """Why this pruner has no meaning on these prompts, a sentence; None if it has."""
        if self.sinks == "ranked":
            return None
        if any(one.sinks is None for one in read):
            return "the model has no sink dims, so no visual token is known to be a sink."
        if not any(one.sinks is not None and one.sinks.any() for one in read):
            return "no visual token is a sink."
        return None

    def calibrated(self, read: list[Read]) -> Self:
        """With what has to be learned from other prompts filled in."""
        return self

    @abstractmethod
    def kept(self, read: Read, count: int) -> Int[np.ndarray, " kept"]:
        """Places of the `count` visual tokens that stay."""

    def _first_and_never(self, read: Read) -> dict[str, list[int]]:
        places = [] if read.sinks is None else np.flatnonzero(read.sinks).tolist()
        return {
            "first": places if self.sinks == "kept" else [],
            "never": places if self.sinks == "dropped" else [],
        }


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


registry: Registry[type[Pruner]] = Registry("pruner", "sinklens probe pruning --help")


@registry.register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(Pruner):
    """Keeps the visual tokens that a shallow layer attends to most.

    How it is computed: in layer K - 1 (counted from 0; the K-th) the attention of the last token of the prompt to each
    visual token, mean over heads, is its score; the largest stay, and the others are gone from layer K on. Tokens that
    stay keep their positions. With `recency` the scores are divided by an exponential of the place, fitted to the mean
    score over other prompts, without tokens that are sinks or outliers; with `padding` tokens of padded cells score 0.

    Compared with the paper: FastV ranks by the last token with K = 2 and keeps half or a quarter; its two programs
    mask the pruned tokens or cut them out, here they are masked, which gives the same output. Both corrections are
    those of arXiv 2508.17807 (PD and PAS), which fits the exponential per data set on the data it is tested on; here
    it is fitted on prompts that are not judged. Its file for FastV holds a cubic in place of the exponential.

    When not to trust it: one query is one word, and what it attends to depends on the wording. A fit on few prompts
    holds what their pictures show; where attention hardly depends on the place, dividing by the fit only adds noise
    (see R² beside it).

    Args:
        layer: K, the first layer without the pruned tokens.
        queries: `last`, or `text` for all text after the picture.
        recency: Whether scores are corrected for the place (PD).
        padding: Whether padded cells score 0 (PAS).
        sigma: Rate of the exponential; None fits it.
    """

    layer: int = 2
    queries: Queries = "last"
    recency: bool = False
    padding: bool = False
    sigma: float | None = None

    name = "fastv"
    title = "FastV"
    reference = FASTV.at("token pruning after layer K; corrections: arXiv 2508.17807")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise UsageError(
                f"fastv: layer must be 1 or more, for the layer before it is read; got {self.layer}."
            )
        if self.queries not in ("text", "last"):
            raise UsageError(f"fastv: queries must be last or text, got {self.queries!r}.")
        if self.sigma is not None and not np.isfinite(self.sigma):
            raise UsageError(f"fastv: sigma must be a number, got {self.sigma}.")

    @property
    def leaves_at(self) -> int:
        return self.layer

    @property
    def corrections(self) -> dict[str, Any]:
        return {"sinks": "ranked", "recency": False, "padding": False}

    def without(self, corrections: Sequence[str]) -> Self:
        return replace(super().without(corrections), **({"sigma": None} if "recency" in corrections else {}))

    def why_not(self, read: list[Read]) -> str | None:
        why = super().why_not(read)
        if why is None and self.padding and not any((one.padding >= 0.5).any() for one in read):
            why = "no visual token shows padding: the processor does not pad, or the pictures fill their squares."
        return why

    def scores(self, read: Read) -> Float[np.ndarray, " visual"]:
        """Attention in the layer before the pruned tokens leave; 0 for tokens outside of its window."""
        return np.nan_to_num(read.attention[self.queries][self.layer - 1].astype(np.float64), nan=0.0)

    def calibrated(self, read: list[Read]) -> Self:
        """With sigma fitted to the mean score of these prompts; those with the most frequent number of tokens count."""
        return (
            self
            if not self.recency or self.sigma is not None
            else replace(self, sigma=self.fit(read)["sigma"])
        )

    def fit(self, read: list[Read]) -> dict[str, float | int]:
        """`sigma, mu, explained` (R²) of the mean score, and `n` prompts, `n_visual` tokens, tokens `left_out`."""
        sizes = [len(one) for one in read]
        size = max(set(sizes), key=lambda n: (sizes.count(n), n))
        same = [one for one in read if len(one) == size]
        # A sink is left out where it is one; what then still stands out of the mean is left out as well.
        rows = np.array([np.where(_sinks(one), np.nan, self.scores(one)) for one in same])
        seen = np.asarray(~np.isnan(rows).all(0))
        mean = np.zeros(size)
        mean[seen] = np.nanmean(rows[:, seen], axis=0)
        kept = seen.copy()
        kept[seen] = no_outliers(mean[seen])
        mu, sigma, explained = recency_fit(mean, kept)
        return {
            "sigma": sigma,
            "mu": mu,
            "explained": explained,
            "n": len(same),
            "n_visual": size,
            "left_out": int((~kept).sum()),
        }

    def kept(self, read: Read, count: int) -> Int[np.ndarray, " kept"]:
        scores = self.scores(read)
        if self.recency:
            assert self.sigma is not None  # calibrated has filled it in
            scores = detrended(scores, self.sigma)
        if self.padding:
            scores = without_padding(scores, read.padding)
        return largest(scores, count, **self._first_and_never(read))


def _sinks(read: Read) -> Bool[np.ndarray, " visual"]:
    return np.zeros(len(read), dtype=bool) if read.sinks is None else read.sinks


@registry.register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Keeps the visual tokens that differ most from each other.

    How it is computed: tokens are chosen one by one by their states where they enter the language model: first the one
    whose nearest other token is farthest, then always the one that is farthest from the nearest of those chosen, the
    distance being 1 - cosine. The others are gone from all layers; those that stay keep their positions.

    Compared with the paper: the same greedy solution of the max-min diversity problem, with its share of 0.098 as the
    usual one there. The program can choose one token twice where others are copies of each other; that is not copied,
    and positions are kept where it closes the gaps.

    When not to trust it: it asks neither the question nor the attention, so what is rare in a picture is kept whether
    it matters or not: sinks, edges and noise are rare too.
    """

    name = "divprune"
    title = "DivPrune"
    reference = DIVPRUNE.at("the greedy solution of the max-min diversity problem")

    def kept(self, read: Read, count: int) -> Int[np.ndarray, " kept"]:
        return most_different(read.features, count, **self._first_and_never(read))


def chosen_pruners(asked: Iterable[str]) -> tuple[Pruner, ...]:
    """Pruners from `name:field=value:field=value`.

    Raises:
        UsageError: No such pruner or field, or a value of another kind.
    """
    return tuple(_pruner(text.strip()) for text in asked)


def _pruner(text: str) -> Pruner:
    name, *settings = text.split(":")
    cls = registry[name]
    kinds = {"recency": bool, "padding": bool, "layer": int, "sigma": float}
    given: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in (known := {f.name for f in fields(cls)}):
            raise UsageError(
                f"{name} has no field {key!r}.",
                detail=did_you_mean(key, known) or f"It has: {', '.join(sorted(known))}.",
                hint=f"Write {name}:field=value.",
            )
        given[key] = _value(f"{name}:{key}", value, kinds.get(key, str))
    return cls(**given)


def _value(what: str, text: str, kind: type) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"{what} must be {wanted}, got {text!r}.") from None


USUAL: tuple[Pruner, ...] = (
    FastV(),
    FastV(recency=True),
    FastV(padding=True),
    FastV(sinks="kept"),
    FastV(sinks="dropped"),
    FastV(recency=True, sinks="dropped"),
    DivPrune(),
    DivPrune(sinks="kept"),
    DivPrune(sinks="dropped"),
)
"""Both pruners with and without what is known of sinks."""
