"""Attention scaling: the attention to chosen tokens times a factor, in every row that sees them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.reference import Reference
from sinklens.kernels.key_sets import Factors, KeySets, Shares

from .base import Mitigation, Seen, registry


def scaled(shares: Shares, factor: Tensor | float) -> Factors:
    """One set times `factor`, the row divided so that it adds up to 1 again: a shift of the logits by `ln factor`.

    A learned sink logit takes part in the division, as it does in the softmax. Rows without attention elsewhere are
    left alone where the factor is 0.
    """
    mass = shares.mass[..., 0]
    factor = torch.as_tensor(factor, dtype=mass.dtype, device=mass.device)
    # A sum of what remains: 1 + (factor - 1) mass would lose its digits where the set has nearly everything.
    divisor = factor * mass + shares.rest + shares.learned
    return Factors(factor.expand_as(mass)[..., None], divisor, (factor != 1.0) & (divisor > 0))


def sees_more_than(seen: Seen) -> Bool[Tensor, "batch query"]:
    """Real rows but those of the first real token: what sees only itself has nothing to move."""
    if not seen.causal:
        return seen.rows
    first, valid = seen.tokens.places((0,), seen.call)
    key = "sees more", first.device
    if key not in seen.tokens.memo:
        own = torch.arange(seen.call.query.shape[2], device=first.device) + seen.tokens.past
        seen.tokens.memo[key] = seen.rows & ~((own == first) & valid)
    return seen.tokens.memo[key]


@registry.register("attention-scaling")
@dataclass(frozen=True, kw_only=True)
class AttentionScaling(Mitigation):
    """Scales the attention that chosen tokens receive, to see or to use what depends on it.

    How it is computed: in every row of the chosen heads the weights on the tokens at `positions` are multiplied by
    `factor` and the row is divided by its new sum. This equals adding ln(factor) to these logits before the
    softmax, a learned sink logit included. With `renormalise=False` nothing is divided: the row then adds up to more
    or less than 1. Positions count each prompt's own tokens from 0, padding left out. In causal models the first
    token's own row sees nothing else and stays as it is.

    Compared with the paper: Zhang et al. scale all tokens but the highlighted ones by 0.01 and renormalise, which is
    the same as scaling the highlighted ones by 100. They choose heads by profiling on several tasks and steer the
    prompt while it is read; here the rows of generated tokens are edited too, and heads are given.

    When not to trust it: factors far from 1 push the model to states it was not trained on. Without renormalisation
    the size of the output changes too, and an effect may come from that alone.

    Args:
        factor: Of the attention, at least 0. 0 removes it.
        positions: Tokens, 0-based.
        renormalise: Whether rows add up to 1 again.
    """

    factor: float
    positions: Collection[int] = (0,)
    renormalise: bool = True

    name = "attention-scaling"
    title = "Attention scaling"
    formula = (
        '<math display="block"><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>q</mi><mi>k</mi></mrow></msub>'
        "<mo>=</mo><mfrac><mrow><mi>c</mi><mo>·</mo><msub><mi>A</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub></mrow><mrow><mn>1</mn>"
        "<mo>+</mo><mo>(</mo><mi>c</mi><mo>−</mo><mn>1</mn><mo>)</mo><msub><mi>m</mi><mi>q</mi></msub></mrow></mfrac>"
        "<mspace width='1em'/><mi>k</mi><mo>∈</mo><mi>S</mi></math>"
    )
    reference = Reference(
        key="zhang2023tell",
        title="Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
        authors="Zhang, Qingru and Singh, Chandan and Liu, Liyuan and Liu, Xiaodong and Yu, Bin and Gao, Jianfeng and "
        "Zhao, Tuo",
        year=2023,
        arxiv="2311.02262",
        section="the attention steering step",
        code="https://github.com/QingruZhang/PASTA",
        venue="ICLR 2024",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "positions", checked_positions(self.name, self.positions))
        if not math.isfinite(self.factor) or self.factor < 0:
            raise UsageError(f"{self.name}: factor must be a number of at least 0, got {self.factor}.")

    @property
    def identity(self) -> bool:
        return self.factor == 1.0

    @property
    def named(self) -> frozenset[int]:
        return frozenset(self.positions)

    @property
    def removes(self) -> bool:
        return self.factor == 0.0

    @property
    def conserves(self) -> bool:
        return self.renormalise

    def sets(self, seen: Seen) -> KeySets | None:
        return seen.positions(tuple(self.positions))

    def rows(self, seen: Seen) -> Bool[Tensor, "batch query"]:
        return sees_more_than(seen)

    def factors(self, seen: Seen, shares: Shares) -> Factors:
        if self.renormalise:
            return scaled(shares, self.factor)
        one = torch.ones_like(shares.rest)
        return Factors(torch.full_like(shares.mass, self.factor), one, one > 0)


def checked_positions(name: str, positions: Collection[int]) -> tuple[int, ...]:
    """Positions in order, once each."""
    found = tuple(sorted(set(positions)))
    if not found or found[0] < 0:
        raise UsageError(
            f"{name}: positions must be token positions from 0 on, got {list(positions)}.",
            hint="Positions count each prompt's own tokens; padding does not count.",
        )
    return found
