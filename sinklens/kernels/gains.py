"""What a rule makes of a row: changed logits as factors that are numbers whatever the logits are, factors as scale."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UsageError
from .key_sets import Factors, Gains, Shares

LEAST_TOLD = 1e-36
"""Least weight before an edit that a sweep in float32 still sees."""
_NOTHING = 1e-7


def in_range(found: Gains, logs: Float[Tensor, "batch head row group"], shares: Shares) -> Factors:
    """The factors of changed logits, all of them divided by the largest weight if that is above 1.

    Args:
        logs: Logarithm of the weight of each key, `-inf` where the row does not see it. It has digits where the
            weight itself is 0.
    """
    gains = torch.where(torch.isfinite(logs), found.gains, 0.0)
    raised = logs + gains
    top = raised.amax(-1).clamp(min=0.0)
    made, kept = torch.exp(raised - top[..., None]), torch.exp(-top)
    divisor = made.sum(-1) + kept * (shares.rest + shares.learned)
    # Only for rows whose factors are numbers is this one; what is made of the others is in `made`.
    factors = torch.exp(gains - top[..., None])
    edited = found.edited & (gains != 0.0).any(-1) & (divisor > 0)
    return Factors(factors, divisor, edited, kept=kept, made=made)


def scale_of(shares: Shares, found: Factors) -> Float[Tensor, "batch head row group"]:
    """By what the weight of every set is multiplied, the division by `D` included.

    Raises:
        UsageError: A key had no weight to speak of and has one now, which no factor tells.
    """
    if found.made is None:
        return (found.factors / found.divisor[..., None]).expand_as(shares.mass)
    lost = (shares.mass < LEAST_TOLD) & (found.made / found.divisor[..., None] > _NOTHING)
    if bool((lost & found.edited[..., None]).any()):
        raise UsageError(
            "The edited attention cannot be measured: a key without any weight gets one.",
            detail=f"Its softmax weight was below {LEAST_TOLD:g}, and single precision has no factor from there.",
            hint="The model's output is right; run it without a trace, or raise logits less.",
        )
    return torch.where(shares.mass < LEAST_TOLD, 0.0, found.factors / found.divisor[..., None])


def moved_by(shares: Shares, found: Factors) -> Float[Tensor, "batch head row"]:
    """Half the sum of `|A' - A|`: every set and the rest are scaled as a whole."""
    if found.made is None:
        gone = (shares.mass * (found.factors / found.divisor[..., None] - 1.0)).abs().sum(-1)
    else:
        gone = (found.made / found.divisor[..., None] - shares.mass).abs().sum(-1)
    others = shares.rest + shares.learned if found.learned else shares.rest
    return 0.5 * (gone + others * (found.kept / found.divisor - 1.0).abs())
