"""A learned sink for inference: a logit beside all keys that takes its share of every row and writes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.papers import WHEN_SINKS_EMERGE
from sinklens.kernels.edits import MapEdit
from sinklens.kernels.transfer import Transferred, row_lse

from .attention_method import AttentionMethod
from .method import registry
from .seen import Seen


@registry.register("learned-sink")
@dataclass(frozen=True, kw_only=True)
class LearnedSink(AttentionMethod):
    """Gives every row a place to put its attention that is no token: softmax off by one, or any other sink logit.

    How it is computed: with the sink logit s, every weight becomes exp(z_k) / (exp(s) + sum_j exp(z_j)), so that the
    output of the kernel is multiplied by 1 - m, with m = exp(s) / (exp(s) + sum_j exp(z_j)) from the row's
    log-sum-exp. With s = 0 this is the softmax off by one. The sink is seen by every real row, in prompt and
    generated tokens, also outside of a sliding window. A trace records m as the mass on a learned sink.

    Compared with the paper: models with such a sink are trained with it, with one s per head; Gu et al. show that they
    then grow no sink on the first token. Put on a model that was not trained so, it shows what its rows would
    give away, and is no remedy. Where a model has a learned sink logit already, this one is a second beside it.

    When not to trust it: rows add up to less than 1 over the tokens, so the output shrinks; a loss in quality shows
    that the model was trained otherwise, and not that a sink is needed.

    Args:
        logit: The sink logit s.
    """

    logit: float = 0.0

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.logit):
            raise UsageError(f"{self.name}: logit must be a number, got {self.logit}.")

    @property
    def conserves(self) -> bool:
        return False

    def edit(self, seen: Seen, output: Tensor, *, remember: bool) -> Transferred | None:
        call = seen.call
        if call.edits:
            raise UsageError(
                f"{self.name} changes the softmax, so it must be put on before what edits its result.",
                hint="Put it on first.",
            )
        if torch.is_grad_enabled() and output.requires_grad:
            raise UsageError(f"{self.name} has no gradient here.", hint="Run under torch.no_grad().")
        with torch.no_grad():
            lse = row_lse(call) if seen.lse is None else seen.lse
            edited = (seen.rows[:, None] & seen.chosen[:, None]).expand(lse.shape)
            mass = torch.where(edited, torch.sigmoid(self.logit - lse), 0.0)
            left = 1.0 - mass
            changed = (output.to(left.dtype) * left.transpose(1, 2)[..., None]).to(output.dtype)
            changed = torch.where(edited.transpose(1, 2)[..., None], changed, output)
            edit = None
            if remember:
                sets = torch.zeros(1, 1, call.key.shape[2], dtype=torch.long, device=lse.device)
                edit = MapEdit(sets, left[..., None], left, mass)
            moved = mass.sum(dtype=torch.float64)
        return Transferred(changed, edited.sum(), moved, edited.sum() * 0, edit)
