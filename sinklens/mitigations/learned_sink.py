"""A learned sink for inference: a logit beside all keys that takes its share of every row and writes nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.papers import WHEN_SINKS_EMERGE
from sinklens.models.spec import Tower

from .beside_keys import BesideKeys
from .method import registry
from .seen import Seen
from .tables import fits, nested, shape_of

PerHead = float | Collection[float] | Collection[Collection[float]]


@registry.register("learned-sink")
@dataclass(frozen=True, kw_only=True)
class LearnedSink(BesideKeys):
    """Gives every row a place to put its attention that is no token: softmax off by one, or any other sink logit.

    How it is computed: with the sink logit s, every weight becomes exp(z_k) / (exp(s) + sum_j exp(z_j)), so that the
    output of the kernel is multiplied by 1 - m, with m = exp(s) / (exp(s) + sum_j exp(z_j)) from the row's
    log-sum-exp. With s = 0 this is the softmax off by one. The sink is seen by every real row, in prompt and
    generated tokens, also outside of a sliding window. A trace records m as the mass on a learned sink. With
    `replaces` the keys of some tokens are hidden from other rows, and the sums leave them out; then
    `learned_sink_for` finds the s per head that takes over the share of attention those tokens had.

    Compared with the paper: models with such a sink are trained with it, with one s per head; Gu et al. show that they
    then grow no sink on the first token. Put on a model that was not trained so, it shows what its rows would
    give away, and is no remedy. A sink that stands for a token writes nothing, where the token wrote its value.
    Where a model has a learned sink logit already, this one is a second beside it.

    When not to trust it: rows add up to less than 1 over the tokens, so the output shrinks; a loss in quality shows
    that the model was trained otherwise, and not that a sink is needed.

    Args:
        logit: The sink logit s: one number, one per head, or a row of one per head for every layer.
    """

    logit: PerHead = 0.0

    name = "learned-sink"
    title = "Learned sink logit"
    formula = (
        '<math display="block"><msub><msup><mi>A</mi><mo>′</mo></msup><mrow><mi>q</mi><mi>k</mi></mrow></msub>'
        "<mo>=</mo><mfrac><msup><mi>e</mi><msub><mi>z</mi><mrow><mi>q</mi><mi>k</mi></mrow></msub></msup><mrow><msup>"
        "<mi>e</mi><mi>s</mi></msup><mo>+</mo><munder><mo>∑</mo><mi>j</mi></munder><msup><mi>e</mi><msub><mi>z</mi>"
        "<mrow><mi>q</mi><mi>j</mi></mrow></msub></msup></mrow></mfrac></math>"
    )
    reference = WHEN_SINKS_EMERGE.at(
        "attention with a learnable sink token, key biases and other normalisers"
    )

    tables = frozenset({"logit"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "logit", nested(self.name, "logit", self.logit, (0, 1, 2)))

    def check(self, tower: Tower) -> None:
        super().check(tower)
        shape = shape_of(self.logit)
        fits(self.name, "logit", self.logit, tower, (tower.heads,), first=len(shape) == 2)

    def place(self, seen: Seen) -> Float[Tensor, "#batch #head #query"]:
        found = torch.tensor(self.logit, dtype=torch.float64, device=seen.call.query.device)
        return (found[seen.site.layer] if found.ndim == 2 else found).reshape(1, -1, 1)
