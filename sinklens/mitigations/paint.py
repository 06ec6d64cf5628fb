"""PAINT: as PAI, with one strength for tokens of detail and another for tokens of summary, told by the vision tower."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import pad

from sinklens.core.errors import UsageError
from sinklens.core.papers import INFORMED_TOKENS
from sinklens.inputs.spans import Kind
from sinklens.kernels.key_sets import Gains, KeySets, Shares
from sinklens.models.spec import OpenedModel, Tower

from .base import Seen, registry
from .class_token import ClassTokenWatch, tower_with_class_token
from .kinds import kinds_of, needs_pictures
from .looking import LooksHarder, raised
from .tokens import Tokens


@registry.register("paint")
@dataclass(frozen=True, kw_only=True)
class PAINT(LooksHarder):
    """Makes the token that is about to be generated look harder at what the vision tower says carries information.

    How it is computed: in the first layer of the vision tower, the `local` part of the patches that the class token
    attends to most (all heads together) are local tokens; in its last layer but one, those whose attention from the
    class token lies above the upper quartile by more than one and a half times the distance of the quartiles are
    summary tokens; a token that is both is a summary. In the rows that choose a token (that of the last prompt token,
    and those of the answer) the logit z of a local token becomes z + alpha·|z| and that of a summary token
    z + beta·|z|, in the layers from `start` to before `end`. A learned sink logit takes its part in the softmax.

    Compared with the paper: this is the method of Arif et al. as in their program, which is built on PAI's. alpha is
    0.7 in both; beta is 0.4 here, a value noted of the paper that was not verified, and 0.3 in the program. The summary
    tokens are called bottom tokens in the program, and are those with most attention. It takes one picture of 576
    patches; here every view of a batch has its own. It counts the outliers, and takes as many of the largest by a
    product that rounding can make one smaller; here all outliers are taken.

    When not to trust it: a summary token is an outlier of the class token's attention, which is what a sink of the
    vision tower is, so this raises attention on sinks. |z| has no meaning under a shift of all logits. Where several
    patches make one visual token, or a tower has no class token, it is refused. The authors report fewer named objects
    and a lower F1 beside less hallucination, so report coverage.

    Args:
        alpha: Share of |z| that is added on local tokens, at least 0.
        beta: The same on summary tokens.
        local: Part of the patches of a view that are local, 0 to 1.
    """

    alpha: float = 0.7
    beta: float = 0.4
    local: float = 0.25

    name = "paint"
    title = "PAINT (paying attention to informed tokens)"
    formula = (
        '<math display="block"><msub><msup><mi>z</mi><mo>′</mo></msup><mrow><mi>n</mi><mi>k</mi></mrow></msub>'
        "<mo>=</mo><msub><mi>z</mi><mrow><mi>n</mi><mi>k</mi></mrow></msub><mo>+</mo><msub><mi>α</mi><mi>k</mi></msub>"
        "<mo>|</mo><msub><mi>z</mi><mrow><mi>n</mi><mi>k</mi></mrow></msub><mo>|</mo><mspace width='1em'/><msub>"
        "<mi>α</mi><mi>k</mi></msub><mo>∈</mo><mo>{</mo><mi>α</mi><mo>,</mo><mi>β</mi><mo>,</mo><mn>0</mn><mo>}</mo>"
        "</math>"
    )
    reference = INFORMED_TOKENS.at("attention to local and summary tokens")
    grid = MappingProxyType({"alpha": (0.3, 0.7), "beta": (0.0, 0.4)})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "beta"):
            value = getattr(self, key)
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{self.name}: {key} must be a number of at least 0, got {value}.")
        if not 0.0 <= self.local <= 1.0:
            raise UsageError(f"{self.name}: local must be from 0 to 1, got {self.local}.")

    @property
    def identity(self) -> bool:
        return self.alpha == 0.0 and self.beta == 0.0

    def fitted(self, model: nn.Module | OpenedModel, tower: Tower) -> Self:
        needs_pictures(self.title, model)
        tower_with_class_token(self.title, model.module if isinstance(model, OpenedModel) else model)
        return self

    def watching(self, model: nn.Module, tower: Tower, tokens: Tokens) -> AbstractContextManager[Any]:
        own = tower_with_class_token(self.title, model)
        return ClassTokenWatch(model, own, tokens, self.local).attached()

    def sets(self, seen: Seen) -> KeySets | None:
        """Every local and every summary token as a set of its own."""
        visual = kinds_of(seen.tokens, seen.call, seen.config) == int(Kind.VISUAL)
        if not bool(visual.any()):
            seen.nothing("no prompt has visual tokens")
            return None
        if not seen.tokens.whole(seen.call.query.shape[2]):
            return None
        local, summary = self._groups(seen, visual)
        member = local | summary
        if not bool(member.any()):
            seen.nothing("no visual token is local or a summary")
            return None
        strength = self.alpha * local.double() + self.beta * summary.double()
        sets = seen.one_by_one(member)
        places = sets.columns[:, 0, :, 0] + seen.dropped
        seen.memory["paint"] = strength.gather(1, places)[:, None, None]
        return sets

    def _groups(self, seen: Seen, visual: Tensor) -> tuple[Tensor, Tensor]:
        if "paint" not in seen.shared:
            seen.shared["paint"] = seen.watch.groups(visual)
        groups: tuple[Tensor, Tensor] = seen.shared["paint"]
        local, summary = (
            pad(group.to(visual.device), (0, visual.shape[1] - group.shape[1]), value=False)
            for group in groups
        )
        return local, summary

    def factors(self, seen: Seen, shares: Shares) -> Gains:
        assert shares.logits is not None  # `logits_needed` asks for them
        return raised(shares.logits, seen.memory["paint"])
