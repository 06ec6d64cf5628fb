"""Key knock-out: other queries no longer attend to chosen tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sinklens.core.reference import Reference
from sinklens.kernels.key_sets import Factors, KeySets, Shares

from .base import Mitigation, Seen, registry
from .scaling import checked_positions, scaled


@registry.register("knock-out")
@dataclass(frozen=True, kw_only=True)
class KnockOut(Mitigation):
    """Takes chosen tokens out of everyone else's sight, so that nothing can be read from them.

    How it is computed: in every row of the chosen heads the weights on the tokens at `positions` become 0 and the
    others are divided by their sum, as if these keys were masked before the softmax; a learned sink logit takes its
    part. A token keeps seeing itself, so that its own row is never empty. Positions count each prompt's own tokens
    from 0, padding left out. Rows whose attention lies almost entirely on these tokens are computed again without
    them, because a difference would leave only rounding.

    Compared with the paper: Geva et al. block the edges from some tokens to others in windows of neighbouring layers;
    here the sources are all queries, and `layers` gives the window.

    When not to trust it: a model that has always had a sink may answer its removal with states it was not trained on,
    so a drop in quality does not show that the token carried information. Compare with knocking out as many other
    tokens.

    Args:
        positions: Tokens, 0-based.
    """

    positions: Collection[int] = (0,)

    name = "knock-out"
    title = "Key knock-out"
    formula = (
        '<math display="block"><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>q</mi><mi>k</mi></mrow></msub>'
        "<mo>=</mo><mrow><mo>{</mo><mtable><mtr><mtd><mn>0</mn></mtd><mtd><mi>k</mi><mo>∈</mo><mi>S</mi><mo>,</mo><mi>k</mi>"
        "<mo>≠</mo><mi>q</mi></mtd></mtr><mtr><mtd><msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub><mo>/</mo>"
        "<mo>(</mo><mn>1</mn><mo>−</mo><msub><mi>m</mi><mi>q</mi></msub><mo>)</mo></mtd><mtd><mtext>otherwise</mtext>"
        "</mtd></mtr></mtable></mrow></math>"
    )
    reference = Reference(
        key="geva2023dissecting",
        title="Dissecting Recall of Factual Associations in Auto-Regressive Language Models",
        authors="Geva, Mor and Bastings, Jasmijn and Filippova, Katja and Globerson, Amir",
        year=2023,
        arxiv="2304.14767",
        section="attention knockout",
        venue="EMNLP 2023",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "positions", checked_positions(self.name, self.positions))

    @property
    def named(self) -> frozenset[int]:
        return frozenset(self.positions)

    @property
    def removes(self) -> bool:
        return True

    def sets(self, seen: Seen) -> KeySets | None:
        return seen.positions(tuple(self.positions), keep_own=True)

    def factors(self, seen: Seen, shares: Shares) -> Factors:
        return scaled(shares, 0.0)
