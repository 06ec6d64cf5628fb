"""PAI: the logits of image tokens raised by a share of their size, in the row that chooses the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from sinklens.core.errors import UsageError
from sinklens.core.papers import PAYING_ATTENTION_TO_IMAGE
from sinklens.inputs.spans import Kind
from sinklens.kernels.key_sets import Gains, KeySets, Shares

from .base import Seen, registry
from .kinds import kinds_of
from .looking import LooksHarder, raised


@registry.register("pai")
@dataclass(frozen=True, kw_only=True)
class PAI(LooksHarder):
    """Makes the token that is about to be generated look harder at the picture.

    How it is computed: in the rows that choose a token (that of the last prompt token, and those of the answer) the
    logit z of every visual token becomes z + alpha·|z| before the softmax, in the layers from `start` to before `end`.
    z is what the softmax sees: scaled, capped, with what an additive mask adds. A learned sink logit takes its part in
    the softmax. The weights are worked out from logits, so no strength is too large for them.

    Compared with the paper: this is the attention step of Liu et al., as in their program, whose defaults (alpha 0.2,
    from the third layer to the last) are the defaults here; values of the paper for single models were not verified.
    They also subtract, at the output, what the model says without the picture; that changes logits of words, not
    attention, and is not part of this method.

    When not to trust it: |z| has no meaning under a shift of all logits, which the softmax ignores, so the strength
    differs from head to head for no reason of the picture's. Visual sinks are raised with everything else, and with
    the largest logits they can take most of it. Captions get shorter and name fewer objects, so report coverage
    beside hallucination. Rows inside of a prompt do not change, so scores of its tokens do not.

    Args:
        alpha: Share of |z| that is added, at least 0.
    """

    alpha: float = 0.2

    name = "pai"
    title = "PAI (pay attention to image)"
    formula = (
        '<math display="block"><msub><msup><mi>z</mi><mo>′</mo></msup><mrow><mi>n</mi><mi>k</mi></mrow></msub>'
        "<mo>=</mo><msub><mi>z</mi><mrow><mi>n</mi><mi>k</mi></mrow></msub><mo>+</mo><mi>α</mi><mo>|</mo><msub><mi>z</mi>"
        "<mrow><mi>n</mi><mi>k</mi></mrow></msub><mo>|</mo><mspace width='1em'/><mi>k</mi><mo>∈</mo><mi>V</mi></math>"
    )
    reference = PAYING_ATTENTION_TO_IMAGE.at("attention to image tokens, before the softmax")
    grid = MappingProxyType({"alpha": (0.2, 0.5, 0.8)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise UsageError(f"{self.name}: alpha must be a number of at least 0, got {self.alpha}.")

    @property
    def identity(self) -> bool:
        return self.alpha == 0.0

    def sets(self, seen: Seen) -> KeySets | None:
        """Every visual token as a set of its own."""
        visual = kinds_of(seen.tokens, seen.call, seen.config) == int(Kind.VISUAL)
        if not bool(visual.any()):
            seen.nothing("no prompt has visual tokens")
            return None
        return seen.one_by_one(visual)

    def factors(self, seen: Seen, shares: Shares) -> Gains:
        assert shares.logits is not None  # `logits_needed` asks for them
        return raised(shares.logits, self.alpha)
