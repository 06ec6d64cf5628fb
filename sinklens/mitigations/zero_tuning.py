"""ZeroTuning: the attention to the first token times gamma."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.reference import Reference
from sinklens.kernels.key_sets import Factors, KeySets, Shares
from sinklens.models.spec import Tower

from .base import Mitigation, Seen, check_head, registry
from .scaling import scaled, sees_more_than

if TYPE_CHECKING:
    from .calibration import Search

PerHead = Mapping[tuple[int, int], float] | Collection[tuple[int, int, float]]


@registry.register("zero-tuning")
@dataclass(frozen=True, kw_only=True)
class ZeroTuning(Mitigation):
    """Makes heads attend more (gamma > 1) or less (gamma < 1) to the first token, which flattens or sharpens the rest.

    How it is computed: in every row of the chosen heads the weight a_0 on the first token becomes gamma a_0 / D and
    every other weight a_i becomes a_i / D, with D = 1 + (gamma - 1) a_0. It equals adding ln(gamma) to the first
    token's logit. The first token is the first one that is not padding. Its own row is left alone where it sees
    nothing else, that is in causal models. Every head has its own gamma if `gammas` says so, also where heads share a
    key head. Prompt and generated tokens are edited alike.

    Compared with the paper: Han et al. choose heads and gamma on validation data (heads that gain from more, or from
    less, attention to the first token; the best 40 % of the stronger kind). This class applies a choice, which
    `ZeroTuningSearch` makes. For kernels without a map the paper scales the first key or the queries; that is not equal
    to the formula
    (a negative logit would grow more negative, a whole key head would change), so it is not offered. Where a model
    has a learned sink logit, it takes part in D. `recipe="code"` scales column 0 of the padded batch as the
    authors' program does: under left padding that is a column nobody sees, and nothing happens. The program
    explores one head index in all layers at once: `shared_heads`.

    When not to trust it: without a calibration on data that are not reported, a gain is a gain of the choice. A large
    part of published gains on classification are answers that became readable at all, so look at valid answers
    apart. A lower entropy of the next token is not a better answer.

    Args:
        gamma: Factor of the first token's weight, above 0. 1 is the identity.
        gammas: `(layer, head)` to factor, for heads that differ from `gamma`; heads without an entry keep `gamma`.
        recipe: `paper` or `code`, see above.
    """

    gamma: float = 2.0
    gammas: PerHead = ()
    recipe: Literal["paper", "code"] = "paper"

    name = "zero-tuning"
    title = "ZeroTuning"
    formula = (
        '<math display="block"><msubsup><mi>a</mi><mn>0</mn><mo>′</mo></msubsup><mo>=</mo><mfrac><mrow><mi>γ</mi>'
        "<msub><mi>a</mi><mn>0</mn></msub></mrow><mi>D</mi></mfrac><mo>,</mo><mspace width='1em'/><msubsup><mi>a</mi>"
        "<mi>i</mi><mo>′</mo></msubsup><mo>=</mo><mfrac><msub><mi>a</mi><mi>i</mi></msub><mi>D</mi></mfrac>"
        "<mo>,</mo><mspace width='1em'/><mi>D</mi><mo>=</mo><mn>1</mn><mo>+</mo><mo>(</mo><mi>γ</mi><mo>−</mo>"
        "<mn>1</mn><mo>)</mo><msub><mi>a</mi><mn>0</mn></msub></math>"
    )
    reference = Reference(
        key="han2025zerotuning",
        title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
        authors="Han, Feijiang and Yu, Xiaodong and Tang, Jianheng and Ungar, Lyle",
        year=2025,
        arxiv="2505.11739",
        section="the tuning formula, with the head-specific procedure left to calibration",
        code="https://github.com/FeijiangHan/ZeroTuning",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.gammas
        rows = [(*pair, gamma) for pair, gamma in given.items()] if isinstance(given, Mapping) else given
        table = tuple(sorted((int(layer), int(head), float(gamma)) for layer, head, gamma in rows))
        if len({row[:2] for row in table}) < len(table):
            raise UsageError(f"{self.name}: a head has two gammas.")
        object.__setattr__(self, "gammas", table)
        for gamma in (self.gamma, *(row[2] for row in table)):
            if not math.isfinite(gamma) or gamma <= 0:
                raise UsageError(
                    f"{self.name}: gamma must be a number above 0, got {gamma}.",
                    detail="At 0 the first token would see nothing, and its row would be undefined.",
                    hint="To take the first token out of sight use knock-out.",
                )
        if self.recipe not in ("paper", "code"):
            raise UsageError(f"{self.name}: recipe must be 'paper' or 'code', got {self.recipe!r}.")

    def search(self, **settings: Any) -> Search:
        from .zero_tuning_search import ZeroTuningSearch

        return ZeroTuningSearch(**settings)

    @property
    def _table(self) -> tuple[tuple[int, int, float], ...]:
        return cast("tuple[tuple[int, int, float], ...]", self.gammas)

    @property
    def identity(self) -> bool:
        return self.gamma == 1.0 and all(gamma == 1.0 for *_, gamma in self._table)

    def check(self, tower: Tower) -> None:
        super().check(tower)
        for layer, head, _ in self._table:
            check_head(self.name, tower, layer, head)

    def per_head(self, layer: int, heads: int) -> Float[Tensor, " head"]:
        """Gamma of every head of a layer."""
        gamma = torch.full((heads,), self.gamma, dtype=torch.float64)
        for at, head, value in self._table:
            if at == layer:
                gamma[head] = value
        return gamma

    @property
    def named(self) -> frozenset[int]:
        return frozenset({0})

    def sets(self, seen: Seen) -> KeySets | None:
        if self.recipe == "code":
            batch, device = seen.call.query.shape[0], seen.call.query.device
            column = torch.zeros(batch, 1, 1, 1, dtype=torch.long, device=device)
            return seen.sets_of(column, torch.ones_like(column, dtype=torch.bool))
        return seen.positions((0,))

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        return sees_more_than(seen)

    def factors(self, seen: Seen, shares: Shares) -> Factors:
        gamma = self.per_head(seen.site.layer, seen.call.query.shape[1])
        return scaled(shares, gamma.to(shares.mass)[:, None])
